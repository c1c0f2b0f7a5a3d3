"""What cannot be compiled is refused with the user's line, a caret under the construct, and what to write instead."""

from __future__ import annotations

import linecache
import math
import random

import numpy as np
import pytest
import torch

from flexmask.errors import TraceError
from flexmask.frontend import trace

doc = torch.arange(18).view(2, 9)
flags = torch.ones(9, dtype=torch.bool)
one = torch.tensor(True)
zero = 0
table = [1, 2, 3]


def refused(mod, kind: str = "mask") -> TraceError:
    with pytest.raises(TraceError) as caught:
        trace(mod, kind)
    return caught.value


def pointed_at(error: TraceError) -> str:
    assert error.at is not None and error.at.file == __file__
    return error.at.text[error.at.column : error.at.end_column]


# (the function, the text that the caret stands under, a part of the message)
# fmt: off
REFUSED = {
    # control flow
    "if expression": (
        lambda b, h, q, k: True if q > k else False, "q > k", "`if ... else` needs one bool now. Write `torch.where("),  # noqa: SIM210
    "and": (lambda b, h, q, k: q > k and k > 2, "q > k and k > 2", "Write `&` between the conditions"),
    "or": (lambda b, h, q, k: q > k or k > 2, "q > k or k > 2", "`or` needs one bool now. Write `|` between"),
    "and in an if": (lambda b, h, q, k: 1 if (q > k and k > 2) else 0, "q > k", "`and` needs one bool now"),
    "not": (lambda b, h, q, k: not q > k, "not q > k", "`not` needs one bool now. Write `~a`"),
    "chain": (lambda b, h, q, k: 0 < q < k, "0 < q < k", "Write `(a < b) & (b < c)`"),
    "missing brackets": (lambda b, h, q, k: q > 3 & k > 2, "q > 3 & k > 2", "bind tighter than comparisons"),
    "in": (lambda b, h, q, k: q in (1, 2), "q in (1, 2)", "Write `(x == a) | (x == b)`"),
    "min": (lambda b, h, q, k: min(q, k) > 2, "min(q, k)", "Write `torch.minimum(a, b)`"),
    "max": (lambda b, h, q, k: max(q, k, 3) > 2, "max(q, k, 3)", "Write `torch.maximum(a, b)`"),
    "any": (lambda b, h, q, k: any([q > k]), "any([q > k])", "Join the conditions with `|`"),
    "all": (lambda b, h, q, k: all([q > k]), "all([q > k])", "Join the conditions with `&`"),
    "bool": (lambda b, h, q, k: bool(q), "bool(q)", "`.bool()` to convert"),
    "comprehension": (lambda b, h, q, k: [i for i in range(3) if q > i][0], "q > i", "`if` needs one bool now"),  # noqa: RUF015
    "table of bools": (lambda b, h, q, k: (q > k if one else k > q), "q > k if one else k > q", "`one` is symbolic"),
    # values
    "item": (lambda b, h, q, k: q.item() > 2, "q.item", "Use the number as it is, without `.item()`"),
    "item of a tensor": (lambda b, h, q, k: q > one.item(), "one.item()", "without `.item()`"),
    "item of an element": (lambda b, h, q, k: q > doc[0, q].item(), "doc[0, q].item", "`doc[0, q_idx]` is symbolic"),
    "tolist": (lambda b, h, q, k: doc.tolist()[0] == q, "doc.tolist()", "`.tolist()` needs a value now"),
    "int": (lambda b, h, q, k: int(q) > 2, "int(q)", "`int()` needs a value now"),
    "float": (lambda b, h, q, k: float(q) > 2, "float(q)", "`float()` needs a value now"),
    "range": (lambda b, h, q, k: [1 for i in range(q)] == [], "range(q)", "`range()` needs a value now"),
    "list index": (lambda b, h, q, k: table[q] > 2, "table[q]", "capture a tensor and index that"),
    "dict index": (lambda b, h, q, k: {1: 2}[q] > 2, "{1: 2}[q]", "A dict, set or cache needs a value now"),
    "math": (lambda b, h, q, k: math.tanh(q) > 2, "math.tanh(q)", "Write `torch.tanh`"),
    "math.floor": (lambda b, h, q, k: math.floor(q / 2) > 2, "math.floor(q / 2)", "Write `torch.floor`"),
    "numpy": (lambda b, h, q, k: np.tanh(q) > 2, "np.tanh(q)", "Write `torch.tanh`"),
    "numpy.where": (lambda b, h, q, k: np.where(q > k, 1, 0) > 0, "np.where(q > k, 1, 0)", "Write `torch.where`"),
    "iteration": (lambda b, h, q, k: [x + 1 for x in q] == [], "[x + 1 for x in q]", "cannot be iterated"),
    "unpacking": (lambda b, h, q, k: [*q] == [], "[*q]", "cannot be iterated"),
    "len": (lambda b, h, q, k: len(q) > 0, "len(q)", "has no length"),
    "round": (lambda b, h, q, k: round(q / 2) > 0, "round(q / 2)", "Write `torch.round(x)`"),
    "index of an index": (lambda b, h, q, k: q[0] > k, "q[0]", "Index the captured tensor"),
    # kinds
    "integer and condition": (lambda b, h, q, k: (q > k) & h, "(q > k) & h", "Write `(h != 0)`"),
    "float bits": (lambda b, h, q, k: (q / 2) & k, "(q / 2) & k", "does not take floats"),
    "conditions subtracted": (lambda b, h, q, k: (q > k) - (q > 3), "(q > k) - (q > 3)", "Write `a & ~b` or `a ^ b`"),
    "negated condition": (lambda b, h, q, k: -(q > k), "-(q > k)", "Write `~` to negate a condition"),
    "float shift": (lambda b, h, q, k: (q / 2) << 1, "(q / 2) << 1", "shifts integers only"),
    "negative shift": (lambda b, h, q, k: q << -1, "q << -1", "shift amounts are not negative"),
    "negative power": (lambda b, h, q, k: q ** -1 > k, "q ** -1", "Write `q_idx.float() ** -1`"),
    "narrow cast": (lambda b, h, q, k: q.to(torch.int8) > k, "q.to(torch.int8)", "a cast to torch.int8"),
    "byte": (lambda b, h, q, k: q.byte() > k, "q.byte()", "a cast to torch.uint8"),
    "where of a number": (lambda b, h, q, k: torch.where(q, k, h) > 0, "torch.where(q, k, h)", "Write `q_idx != 0`"),
    "huge number": (lambda b, h, q, k: q > 2**63, "q > 2**63", "does not fit into 64 bits"),
    "zero divisor": (lambda b, h, q, k: q // zero == k, "q // zero", "division by zero: `zero` is 0"),
    "zero modulus": (lambda b, h, q, k: q % 0 == k, "q % 0", "division by zero"),
    "None": (lambda b, h, q, k: q > None, "q > None", "found None"),
    # tables
    "table without index": (lambda b, h, q, k: doc > q, "doc > q", "`doc` is a tensor of shape (2, 9)"),
    "table on the right": (lambda b, h, q, k: q + doc > 2, "q + doc", "Index it: `doc[q_idx, kv_idx]`"),
    "table in where": (
        lambda b, h, q, k: torch.where(q > k, flags, False), "torch.where(q > k, flags, False)", "`flags` is a tensor of shape (9,)"),
    "index missing": (lambda b, h, q, k: doc[b] == k, "doc[b] == k", "`doc[b, :]` still has 1 dimension, of shape (9,)"),
    "too many indices": (lambda b, h, q, k: doc[b, q, k], "doc[b, q, k]", "too many indices: `doc` has shape (2, 9), 3 given for 2 left"),
    "too many in steps": (lambda b, h, q, k: doc[b][q, k], "doc[b][q, k]", "2 given for 1 left"),
    "float index": (lambda b, h, q, k: flags[q / 2], "flags[q / 2]", "Convert with `.long()`"),
    "bool index": (lambda b, h, q, k: flags[q > k], "flags[q > k]", "by the condition `kv_idx < q_idx`"),
    "slice beside a symbol": (lambda b, h, q, k: doc[q, 1:], "doc[q, 1:]", "indexed by a slice beside a symbolic index"),
    "None beside a symbol": (lambda b, h, q, k: doc[q, None], "doc[q, None]", "indexed by `None`"),
    "tensor beside a symbol": (lambda b, h, q, k: doc[q, flags], "doc[q, flags]", "a tensor of shape (9,)"),
    "symbolic slice": (lambda b, h, q, k: doc[0, :q], "doc[0, :q]", "has a symbolic length"),
    "out of range": (lambda b, h, q, k: doc[2, q] > k, "doc[2, q]", "index 2 is out of range: `doc` has 2 entries along dimension 0"),
    "assignment": (lambda b, h, q, k: doc.__setitem__((b, q), 1), "doc.__setitem__((b, q), 1)", "choose with `torch.where`"),
    "complex": (lambda b, h, q, k: torch.ones(9, dtype=torch.complex64)[q] == 1, "torch.ones(9, dtype=torch.complex64)[q]", "complex64"),
    # torch
    "in place": (lambda b, h, q, k: doc.add_(q), "doc.add_(q)", "`add_`, which changes a tensor in place"),
    "in place on real tensors": (lambda b, h, q, k: flags.zero_(), "flags.zero_()", "in place"),
    "in place on a symbol": (lambda b, h, q, k: q.add_(1), "q.add_", "`add_`, which changes a tensor in place"),
    "out": (lambda b, h, q, k: torch.add(q, k, out=doc), "torch.add(q, k, out=doc)", "`out=` writes into a tensor"),
    "unsupported function": (
        lambda b, h, q, k: torch.cumsum(q, 0), "torch.cumsum(q, 0)", "torch.cumsum is not supported in a mask or score"),
    "unsupported method": (lambda b, h, q, k: q.view(1), "q.view", "Tensor.view is not supported"),
    "similar function": (lambda b, h, q, k: torch.log1pp(q) if False else torch.logit(q), "torch.logit(q)", "torch.logit is not supported"),
    "stack": (lambda b, h, q, k: torch.stack([q, k]), "torch.stack([q, k])", "torch.stack is not supported"),
    "random": (lambda b, h, q, k: torch.rand(9)[q] > 0.5, "torch.rand(9)", "Draw them outside and capture the tensor"),
    "dropout": (
        lambda b, h, q, k: torch.nn.functional.dropout(q.float()), "torch.nn.functional.dropout(q.float())", "`dropout` draws random"),
    "shape": (lambda b, h, q, k: q.new_ones((3,)), "q.new_ones((3,))", "use shape `()`"),
    "tensor of symbols": (lambda b, h, q, k: torch.tensor([q, k]), "torch.tensor([q, k])", "a tensor of symbolic numbers"),
    "where with one argument": (lambda b, h, q, k: torch.where(q > k), "torch.where(q > k)", "Write `torch.where(condition, x, y)`"),
    "decimals": (lambda b, h, q, k: torch.round(q / 2, decimals=1) > k, "torch.round(q / 2, decimals=1)", "to decimals"),
    "clamp without bounds": (lambda b, h, q, k: q.clamp() > k, "q.clamp()", "needs `min`, `max` or both"),
    # results
    "an integer mask": (lambda b, h, q, k: q - k, "q - k", "a mask returns a condition; `lambda` returns the int `q_idx - kv_idx`. Write"),
    "a float mask": (lambda b, h, q, k: q * 0.5, "q * 0.5", "returns the float `q_idx * 0.5`"),
}
# fmt: on


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    mod, under, message = REFUSED[name]
    error = refused(mod)
    assert message in error.message
    assert pointed_at(error) == under


def test_the_whole_text_of_an_error():
    def keep(b, h, q_idx, kv_idx):
        if q_idx >= kv_idx:
            return True
        return h > 0

    line = keep.__code__.co_firstlineno + 1
    assert str(refused(keep)) == (
        "`kv_idx <= q_idx` is symbolic here: a mask or score is traced once, for all indices at the same time. "
        "`if` needs one bool now. Write `torch.where(condition, x, y)`; for a mask, combine conditions with `&`, `|` and `~`.\n"
        f"  at {__file__}:{line}\n"
        "    if q_idx >= kv_idx:\n"
        "       ^^^^^^^^^^^^^^^"
    )


def test_statements():
    def loop(b, h, q, k):
        while q > k:
            q = q - 1
        return q == k

    def guarded(b, h, q, k):
        if not (q > k):
            return False
        return h > 0

    def later(b, h, q, k):
        if True and (q > k or k > 3):
            return True
        return h > 0

    def assigned(b, h, q, k):
        doc[b, q] = 1
        return q > k

    def second_operand(b, h, q, k):
        return True and ((q > k) or k)

    assert "`while` needs one bool now" in refused(loop).message
    assert "`not` needs one bool now" in refused(guarded).message
    assert "`or` needs one bool now" in refused(later).message and pointed_at(refused(later)) == "q > k"
    assert "assigning to an element" in refused(assigned).message and pointed_at(refused(assigned)) == "doc[b, q] = 1"[:9]
    assert "`or` needs one bool now" in refused(second_operand).message


def test_an_error_in_a_called_function_points_there():
    def inner(q, k):
        return q > k and k > 2

    error = refused(lambda b, h, q, k: inner(q, k))
    assert error.at is not None and error.at.line == inner.__code__.co_firstlineno + 1


def test_without_source_all_remedies_are_named():
    names: dict = {}
    exec("def keep(b, h, q, k): return q > k and k > 2", names)
    exec("def negated(b, h, q, k): return not q", names)
    error = refused(names["keep"])
    assert "`torch.where` for `if`, `a & b` for `and`, `a | b` for `or`" in error.message
    assert (error.at.file, error.at.line, str(error.at.render())) == ("<string>", 1, "<string>:1")
    assert "Write `~a`" in refused(names["negated"]).message


def test_assert_in_source_that_pytest_has_not_rewritten(monkeypatch):
    source = "def keep(b, h, q, k):\n    assert q >= 0\n    return q > k\n"
    monkeypatch.setitem(linecache.cache, "keep.py", (len(source), None, source.splitlines(True), "keep.py"))
    names: dict = {}
    exec(compile(source, "keep.py", "exec"), names)
    error = refused(names["keep"])
    assert "`assert` needs one bool now" in error.message
    assert (error.at.line, error.at.text[error.at.column : error.at.end_column]) == (2, "q >= 0")


# results


def no_result(b, h, q, k):
    q > k  # noqa: B015


def test_a_mask_without_result_points_at_its_definition():
    error = refused(no_result)
    assert error.message == "the mask `no_result` returns None. Add `return`."
    assert pointed_at(error) == "def no_result(b, h, q, k):"


def test_results_of_the_wrong_type():
    assert "returns a str; it must return one condition" in refused(lambda b, h, q, k: "yes").message
    assert "returns a tuple" in refused(lambda b, h, q, k: (q, k)).message
    assert "returns more than one condition: `flags` is a tensor of shape (9,)" in refused(lambda b, h, q, k: flags).message
    assert "returns more than one condition: `doc[b, :]` still has 1 dimension" in refused(lambda b, h, q, k: doc[b]).message
    assert "a mask returns a condition; `lambda` returns the int `1`" in refused(lambda b, h, q, k: 1).message


def test_scores_that_are_conditions():
    error = refused(lambda score, q_idx, kv_idx: q_idx > kv_idx, "score")
    assert 'returns the condition `kv_idx < q_idx`. Write `torch.where(kv_idx < q_idx, score, -float("inf"))`' in error.message
    assert pointed_at(error) == "q_idx > kv_idx"
    assert "returns the condition `one`" in refused(lambda score: one, "score").message
    assert "returns the condition `True`" in refused(lambda score: True, "score").message
    assert "the score `lambda` returns None" in refused(lambda score: None, "score").message


def test_wrong_parameters_point_at_the_definition():
    def too_few(first, second):
        return first > second

    error = refused(too_few)
    assert "a mask takes (b, h, q_idx, kv_idx), by these names or in this order" in error.message
    assert "too_few takes (first, second)" in error.message
    assert pointed_at(error) == "def too_few(first, second):"


def test_symbols_do_not_leave_their_trace():
    kept = []

    def leak(b, h, q, k):
        kept.append(q)
        return q >= kept[0]

    trace(leak, "mask")
    assert "comes from another trace" in refused(leak).message


def test_what_is_no_function():
    assert refused(3).message == "a mask is a function; got int."
    assert refused("q > k", "score").message == "a score is a function; got str."


def test_what_cannot_be_in_an_expression_is_left_to_python():
    with pytest.raises(TypeError):
        trace(lambda b, h, q, k: q + "1", "mask")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        trace(lambda b, h, q, k: q.nonsense, "mask")
    with pytest.raises(ZeroDivisionError):
        trace(lambda b, h, q, k: q > 1 // random.choice([0]), "mask")
