"""What a function closes over: numbers become run-time scalars, tensors tables, wherever they come from."""

from __future__ import annotations

import enum
import functools
import math
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from flexmask import ir
from flexmask.errors import TraceError
from flexmask.frontend import trace

WIDTH = 5
RATE = 0.5
config = types.ModuleType("config")
config.LIMIT = 11  # type: ignore[attr-defined]


def text(mod, kind="mask"):
    return repr(trace(mod, kind).expr)


def window(size):
    return lambda b, h, q, k: q - k < size


# numbers


def test_a_closure_variable_is_a_scalar():
    traced = trace(window(3), "mask")
    assert (repr(traced.expr), traced.scalars, traced.scalar_names) == ("q_idx - kv_idx < s0", (3,), ("size",))
    assert trace(window(70), "mask").expr is traced.expr
    assert trace(window(70.5), "mask").expr is not traced.expr  # a float is another structure


def test_globals_defaults_and_partials_are_scalars():
    def mod(b, h, q, k, near=2, *, far=9):
        return (q - k < WIDTH) & (near < k) & (k < far)

    traced = trace(functools.partial(mod, near=3), "mask")
    assert repr(traced.expr) == "(q_idx - kv_idx < s0) & (s1 < kv_idx) & (kv_idx < s2)"
    assert traced.scalars == (5, 3, 9) and traced.scalar_names == ("WIDTH", "near", "far")


def test_numbers_of_functions_that_the_mask_calls():
    inner = window(3)

    def outer(b, h, q, k):
        def nested(x):
            return x < WIDTH

        return inner(b, h, q, k) | nested(k)

    traced = trace(outer, "mask")
    assert repr(traced.expr) == "(q_idx - kv_idx < s0) | (kv_idx < s1)"
    assert traced.scalars == (3, 5)


def test_numbers_of_a_module():
    assert text(lambda b, h, q, k: k < config.LIMIT) == "kv_idx < s0"


def test_numpy_numbers_count_as_numbers_and_bools_do_not():
    size, flag = np.int32(4), True
    traced = trace(lambda b, h, q, k: (q - k < size) & flag, "mask")
    assert repr(traced.expr) == "(q_idx - kv_idx < s0) & True" and traced.scalars == (4,)
    half = np.float32(0.5)
    assert text(lambda score: np.float64(2) * score + half, "score") == "2.0 * score + s0"


def test_members_of_an_enum_are_constants():
    class Mode(enum.IntEnum):
        NEAR = 3

    mode = Mode.NEAR
    assert text(lambda b, h, q, k: (q - k < Mode.NEAR) | (q == mode)) == "(q_idx - kv_idx < 3) | (q_idx == 3)"


def test_lists_are_constants():
    cuts = [2, 5]
    assert text(lambda b, h, q, k: (k < cuts[0]) | (k > cuts[1])) == "(kv_idx < 2) | (5 < kv_idx)"


def test_a_shared_variable_is_one_scalar():
    size = 3
    left = lambda q, k: q - k < size
    right = lambda q, k: k - q < size
    assert text(lambda b, h, q, k: left(q, k) & right(q, k)) == "(q_idx - kv_idx < s0) & (kv_idx - q_idx < s0)"


def test_recursion_through_closures_and_globals():
    def ladder(q, k, n):
        return q == k if n == 0 else (q - k == n) | ladder(q, k, n - 1)

    assert text(lambda b, h, q, k: ladder(q, k, 2)) == "(q_idx - kv_idx == 2) | ((q_idx - kv_idx == 1) | (q_idx == kv_idx))"


# numbers that shape the code


def test_divisors_shifts_exponents_and_factors_become_constants():
    n, m = 4, 2
    for mod, expected in [
        (lambda b, h, q, k: q // n == k // n, "q_idx // 4 == kv_idx // 4"),
        (lambda b, h, q, k: (q - k) % (n * m) == 0, "(q_idx - kv_idx) % 8 == 0"),
        (lambda b, h, q, k: q >> m == k, "q_idx >> 2 == kv_idx"),
        (lambda b, h, q, k: q**m < k, "q_idx * q_idx < kv_idx"),
        (lambda b, h, q, k: n * q < k + m, "4 * q_idx < kv_idx + s0"),
        (lambda b, h, q, k: q - k < n // 2 + m, "q_idx - kv_idx < s0 // 2 + s1"),
    ]:
        assert text(mod) == expected
    traced = trace(lambda b, h, q, k: q // n == k // n, "mask")
    assert traced.specialised == (("n", 4),) and traced.scalars == ()


def test_float_factors_stay_scalars():
    cap = 30.0
    assert text(lambda score: cap * torch.tanh(score / cap), "score") == "s0 * tanh(score / s0)"
    assert text(lambda score, q_idx: score + q_idx * RATE, "score") == "score + q_idx * s0"


def test_python_may_ask_for_the_value_of_a_captured_number():
    n, rate = 3, 0.25

    def mod(score, b, h, q, k):
        if n > 2:
            score = score + math.sqrt(n)
        for i in range(n):
            score = score * (i + 1)
        return score + {3: 1.0}[n] + int(n) + float(rate) + len(f"{n}")

    traced = trace(mod, "score")
    assert "s0" not in repr(traced.expr)
    assert dict(traced.specialised) == {"n": 3, "rate": 0.25}


def test_a_specialised_number_is_a_constant_everywhere():
    n = 3
    assert text(lambda b, h, q, k: (q - k < n) & (k % n == 0)) == "(q_idx - kv_idx < 3) & (kv_idx % 3 == 0)"


def test_caches_do_not_keep_symbols():
    @functools.lru_cache
    def doubled(n):
        return n * 2

    size = 3
    mod = lambda b, h, q, k: q - k < doubled(size)
    assert text(mod) == text(mod) == "q_idx - kv_idx < s0 * 2"
    assert doubled.cache_info().currsize == 0


# objects


class Window:
    scale = 2

    def __init__(self, size):
        self.size = size
        self._private = 1

    def near(self, q, k):
        return q - k < self.size + WIDTH

    @property
    def half(self):
        return self.size // 2

    def __call__(self, b, h, q, k):
        return self.near(q, k) & (k > self.half + self.scale) & (k < q + self._private)


def test_a_callable_object():
    traced = trace(Window(6), "mask")
    assert repr(traced.expr) == "(q_idx - kv_idx < s0 + s1) & (s0 // 2 + s2 < kv_idx) & (kv_idx < q_idx + 1)"
    assert traced.scalars == (6, 5, 2) and traced.scalar_names == ("size", "WIDTH", "scale")
    assert traced.name == "Window"


def test_a_bound_method_and_an_object_in_a_closure():
    maker = Window(6)
    assert text(lambda b, h, q, k: maker.near(q, k)) == "q_idx - kv_idx < s0 + s1"

    class Other:
        def keep(self, b, h, q, k):
            return maker(b, h, q, k)

    assert trace(Other().keep, "mask").scalars == (6, 5, 2)
    assert maker.size == 6 and type(maker) is Window  # the original is untouched


@dataclass(frozen=True, slots=True)
class Settings:
    size: int
    rate: float = 0.5


def test_a_frozen_dataclass_with_slots():
    settings = Settings(4)
    traced = trace(lambda b, h, q, k: q - k < settings.size, "mask")
    assert repr(traced.expr) == "q_idx - kv_idx < s0" and traced.scalars == (4,)


class Gate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gates = torch.nn.Parameter(torch.ones(3))
        self.cap = 20.0

    def forward(self, score, b, h, q, k):
        return self.gates[h] * torch.tanh(score / self.cap)


class TwoGates(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList([Gate(), Gate()])

    def forward(self, score, b, h, q, k):
        for part in self.parts:
            score = part(score, b, h, q, k)
        return score


def test_modules_of_torch_nn():
    gate = Gate()
    traced = trace(gate, "score")
    assert repr(traced.expr) == "t0[h] * tanh(score / s0)"
    assert traced.tensors[0] is gate.gates and traced.tensor_names == ("gates",)
    both = trace(TwoGates(), "score")
    assert repr(both.expr) == "t0[h] * tanh(t1[h] * tanh(score / s0) / s1)"
    assert both.tensor_names == ("gates", "gates_2")


class Trainer:
    """Much more than the mask needs: copying or watching all of it would be slow, and each step would look like a change."""

    def __init__(self):
        self.window = 4
        self.step = 0
        self.model = torch.nn.Linear(2, 2)
        self.parent = self

    def keep(self, b, h, q, k):
        return q - k < self.window

    def train(self):
        return self.step + WIDTH


def test_of_an_object_only_what_the_code_names_is_read():
    trainer = Trainer()
    traced = trace(trainer.keep, "mask")
    trainer.step += 1
    trainer.model = None
    assert traced.is_fresh()
    trainer.window = 5
    assert not traced.is_fresh()


def test_an_attribute_named_only_by_a_later_function():
    trainer = Trainer()

    def later(thing, k):
        return thing.parent.step > k

    traced = trace(lambda b, h, q, k: trainer.keep(b, h, q, k) | later(trainer, k), "mask")
    assert repr(traced.expr) == "(q_idx - kv_idx < s0) | (kv_idx < s1)" and traced.scalar_names == ("window", "step")
    trainer.step = 7
    assert not traced.is_fresh()


def test_numbers_too_large_for_a_scalar_do_no_harm_until_used():
    large = 2**64
    assert text(lambda b, h, q, k: (q > k) & (large > 3)) == "(kv_idx < q_idx) & True"
    with pytest.raises(TraceError, match="does not fit into 64 bits"):
        trace(lambda b, h, q, k: q < large, "mask")


def test_functions_in_containers_are_lifted():
    parts = [window(3), window(5)]

    def mod(b, h, q, k):
        keep = q >= k
        for part in parts:
            keep = keep & part(b, h, q, k)
        return keep

    traced = trace(mod, "mask")
    assert traced.scalars == (3, 5)
    parts[1] = window(6)
    assert not traced.is_fresh()


# tensors


def test_the_same_tensor_is_one_capture_and_numbers_follow_the_walk():
    doc, other, unused = torch.arange(9), torch.arange(9), torch.arange(3)
    traced = trace(lambda b, h, q, k: (unused[0] * 0 == 0) & (other[q] == doc[k]) & (doc[q] > 2) if False else (other[q] == doc[k]), "mask")
    assert repr(traced.expr) == "t0[q_idx] == t1[kv_idx]"
    assert traced.tensors[0] is other and traced.tensors[1] is doc and traced.tensor_names == ("other", "doc")


def test_other_tensors_of_the_same_kinds_give_the_same_expression():
    def document(doc):
        return lambda b, h, q, k: doc[q] == doc[k]

    first, second = trace(document(torch.arange(9)), "mask"), trace(document(torch.arange(50, dtype=torch.int32)), "mask")
    assert first.expr is second.expr
    assert trace(document(torch.arange(9.0)), "mask").expr is not first.expr


def test_lengths_of_tables_are_scalars():
    def relative(rel):
        return lambda score, q_idx, kv_idx: score + rel[q_idx - kv_idx + rel.shape[0] // 2] * rel.size(0)

    short, long = trace(relative(torch.zeros(9)), "score"), trace(relative(torch.zeros(99)), "score")
    assert short.expr is long.expr
    assert repr(short.expr) == "score + t0[q_idx - kv_idx + s0 // 2] * s0"
    assert (short.scalars, long.scalars, short.scalar_names) == ((9,), (99,), ("rel_size_0",))


def test_a_tensor_without_dimensions_is_a_load_without_indices():
    cap = torch.tensor(30.0, requires_grad=True)
    traced = trace(lambda score: cap * torch.tanh(score / cap), "score")
    assert repr(traced.expr) == "t0[()] * tanh(score / t0[()])" and traced.tensors == (cap,)


def test_constants_made_inside():
    def mod(score, b, h, q, k):
        low = torch.tensor(-1.5)
        return torch.maximum(score, low) + torch.ones((), dtype=torch.float32) + torch.full((), 3) + torch.zeros((), device=score.device)

    traced = trace(mod, "score")
    assert repr(traced.expr) == "max(score, -1.5) + 1.0 + 3 + 0.0" and not traced.volatile


def test_a_table_moved_to_the_device_of_an_index_stays():
    doc = torch.arange(9)
    traced = trace(lambda b, h, q, k: doc.to(q.device)[q] == doc.to(device=k.device)[k], "mask")
    assert traced.tensors == (doc,) and not traced.volatile


@pytest.mark.parametrize(
    "mod",
    [
        lambda b, h, q, k: TABLE.long()[q] == k,
        lambda b, h, q, k: (TABLE + 1)[q] == k,
        lambda b, h, q, k: TABLE[1:][q] == k,
        lambda b, h, q, k: (TABLE * WIDTH)[q] == k,
        lambda b, h, q, k: torch.arange(9)[q] == k,
        lambda b, h, q, k: TABLE.max() > k,
        lambda b, h, q, k: next(iter(TABLE)) > k,
        lambda b, h, q, k: (q > k) & torch.equal(TABLE, TABLE),
    ],
)
def test_tensors_computed_inside_must_be_traced_anew(mod):
    assert trace(mod, "mask").volatile


TABLE = torch.arange(9.0)


@pytest.mark.parametrize("mod", [lambda b, h, q, k: TABLE[q] == k, lambda b, h, q, k: (q >= k) & (TABLE.dim() == 1) & (len(TABLE) == 9)])
def test_plain_reading_is_not_volatile(mod):
    assert not trace(mod, "mask").volatile


# freshness


def test_rebinding_a_closure_variable():
    size, table = 3, torch.arange(9)

    def mod(b, h, q, k):
        return q - k < size + table[q]

    traced = trace(mod, "mask")
    assert traced.is_fresh()
    table += 1  # in place: the same tensor, other values
    assert traced.is_fresh()
    table = table.clone()
    assert not traced.is_fresh()
    traced = trace(mod, "mask")
    size = 4
    assert not traced.is_fresh()
    size = 3
    assert traced.is_fresh()
    size = 3.0
    assert not traced.is_fresh()


def test_rebinding_globals_defaults_attributes_and_keywords(monkeypatch):
    def mod(b, h, q, k, near=1):
        return (k < WIDTH) & (q < config.LIMIT) & (q > near)

    traced = trace(mod, "mask")
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "WIDTH", 6)
        assert not traced.is_fresh()
    with monkeypatch.context() as patch:
        patch.setattr(config, "LIMIT", 12)
        assert not traced.is_fresh()
    assert traced.is_fresh()
    mod.__defaults__ = (2,)
    assert not traced.is_fresh()

    keep = Window(3)
    traced = trace(keep, "mask")
    assert traced.is_fresh()
    keep.size = 4
    assert not traced.is_fresh()
    keep.size = 3
    assert traced.is_fresh()
    with monkeypatch.context() as patch:
        patch.setattr(Window, "scale", 3)
        assert not traced.is_fresh()
    keep.scale = 5
    assert not traced.is_fresh()

    partial = functools.partial(mod, near=3)
    traced = trace(partial, "mask")
    partial.keywords["near"] = 4
    assert not traced.is_fresh()


def test_rebinding_what_only_a_called_function_reads(monkeypatch):
    traced = trace(lambda b, h, q, k: helper(q) > k, "mask")
    assert repr(traced.expr) == "kv_idx < q_idx + s0"
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "WIDTH", 8)
        assert not traced.is_fresh()
        assert trace(lambda b, h, q, k: helper(q) > k, "mask").scalars == (8,)
    assert traced.is_fresh()


def helper(x):
    return x + WIDTH


def test_class_attributes_and_list_items_are_guarded():
    class Config:
        limit = 5

    cuts = [2, 5]
    traced = trace(lambda b, h, q, k: (k < Config.limit) | (k > cuts[0]), "mask")
    assert traced.is_fresh()
    cuts[0] = 3
    assert not traced.is_fresh()
    cuts[0] = 2
    assert traced.is_fresh()
    Config.limit = 6
    assert not traced.is_fresh()


def test_scalar_values_are_those_of_the_trace():
    size = 3
    mod = lambda b, h, q, k: q - k < size
    traced = trace(mod, "mask")
    size = 9
    assert traced.scalars == (3,) and trace(mod, "mask").scalars == (9,)
    assert ir.evaluate(traced.expr, ir.Env({"q_idx": 8, "kv_idx": 0}, (), (9,)))
