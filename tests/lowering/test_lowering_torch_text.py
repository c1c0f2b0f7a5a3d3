"""Row bounds as torch code, against `ir.evaluate`."""

from types import SimpleNamespace

import pytest
import torch

from flexmask.ir import Env, evaluate, parse
from flexmask.lowering import CaptureSpec, emit_row_bounds

DOC = torch.tensor([0, 0, 1, 1, 1, 3, 3, 7, 7, 7, 7, 9], dtype=torch.int32)
TABLES = [DOC, torch.stack([DOC, DOC // 2, DOC // 3]), torch.arange(12) * 3 % 11, torch.linspace(-2, 9, 12)]
SCALARS = [4, 2.5]
BOUNDS = [
    ("0", "q_idx + 1"),
    ("q_idx - s0 + 1", "q_idx + 1"),
    ("left(t0, t0[q_idx])", "right(t0, t0[q_idx])"),
    ("left(t1, b, t1[b, q_idx])", "min(right(t1, b, t1[b, q_idx]), q_idx + 1)"),
    ("q_idx // s0 * s0", "(q_idx // s0 + 1) * s0"),
    ("max(q_idx - 3, t2[q_idx])", "kv_len - 1"),
    ("where(q_idx < 5, 2, h)", "kv_len"),
    ("-q_idx % 5", "(q_idx - 20) // 3 + kv_len"),
    ("int64(t3[q_idx] * s1)", "abs(q_idx - 6) + (q_idx & 3) + (1 << h)"),
    ("t0[-1]", "right(t3, q_idx)"),
]


@pytest.mark.parametrize(("start", "stop"), BOUNDS)
def test_bounds_in_torch_equal_their_meaning(start, stop):
    kinds = ["int", "int", "int", "float"]
    pieces = [SimpleNamespace(start=parse(start, kinds, ["int", "float"]), stop=parse(stop, kinds, ["int", "float"]))]
    spec = CaptureSpec.of(TABLES, ["doc", "docs", "shape", "torch"], SCALARS, ["window", "starts"])
    form = SimpleNamespace(pieces=pieces * 2, sorted_tables=(0,))
    space: dict = {"torch": torch}
    exec(emit_row_bounds(form, spec), space)
    starts, stops = space["row_bounds"](TABLES, SCALARS, 12, 10, 3, 2, torch.device("cpu"))
    assert starts.dtype == torch.int32 and starts.shape == (3, 2, 12, 2)
    indices = {"b": torch.arange(3)[:, None, None], "h": torch.arange(2)[None, :, None], "q_idx": torch.arange(12)[None, None]}
    env = Env({**indices, "q_len": 12, "kv_len": 10}, TABLES, SCALARS)
    for found, bound in ((starts, pieces[0].start), (stops, pieces[0].stop)):
        expected = torch.as_tensor(evaluate(bound, env)).expand(3, 2, 12).clamp(0, 10).int()
        torch.testing.assert_close(found[..., 0], expected)
        torch.testing.assert_close(found[..., 1], expected)


def test_a_table_that_does_not_ascend_is_an_error():
    form = SimpleNamespace(pieces=[SimpleNamespace(start=parse("left(t0, q_idx)", ["int"]), stop=parse("kv_len"))], sorted_tables=(0,))
    space: dict = {"torch": torch}
    exec(emit_row_bounds(form, CaptureSpec.of([DOC], ["doc"], [], [])), space)
    with pytest.raises(ValueError, match="doc must ascend"):
        space["row_bounds"]([DOC.flip(0)], [], 12, 12, 1, 1, torch.device("cpu"))
