"""Assembled files: readable, lintable, self-contained."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flexmask.ir import SCORE, B, K, Q, const, load, make, parse, scalar
from flexmask.lowering import CaptureSpec, TensorSpec, emit_function, emit_row_bounds, plan_forward
from flexmask.templates.assemble import assemble

SPEC = CaptureSpec((TensorSpec("doc", 2, "int32"),), (("window", "int"),))
WINDOW = make("eq", (load(0, "int", B, Q), load(0, "int", B, K))) & (K <= Q) & (scalar(0, "int") > Q - K)
SOFTCAP = const(5.0) * make("tanh", (make("truediv", (SCORE, const(5.0))),))


def window_file(**plan):
    chosen = plan_forward(16, dtype="float32", arch=90, score=True, map_form="list", **plan)
    mask, score = emit_function("window", WINDOW, SPEC, "mask"), emit_function("softcap", SOFTCAP, CaptureSpec(), "score")
    return assemble(chosen, mask, score, ["mask window @ user.py:12", "keep: ..."])


def causal_file():
    plan = plan_forward(16, dtype="float32", arch=90, map_form="range", pieces=1)
    spec = CaptureSpec((), (("window", "int"),))
    piece = SimpleNamespace(start=parse("q_idx - s0 + 1", (), ["int"]), stop=parse("q_idx + 1"))
    return assemble(plan, row_bounds=emit_row_bounds(SimpleNamespace(pieces=[piece], sorted_tables=()), spec))


FILES = {
    "list": window_file,
    "flagged": lambda: window_file(runs="fail"),
    "range": causal_file,
    "plain": lambda: assemble(plan_forward(128, loads="tma")),
}


@pytest.mark.parametrize("name", FILES)
def test_files_pass_ruff_and_are_formatted(name, tmp_path):
    (tmp_path / "kernel.py").write_text(FILES[name]())
    ruff = [sys.executable, "-m", "ruff"]
    done = subprocess.run([*ruff, "check", "--isolated", "kernel.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    flags = ["--isolated", "--line-length", "140", "--check", "--diff"]
    done = subprocess.run([*ruff, "format", *flags, "kernel.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_header_says_what_made_the_file_and_holds_no_code():
    text = assemble(plan_forward(64), header=["mask evil\nimport os\r\nx = 1\x0cy = 2\u2028z = 3"])
    assert text.startswith("# mask evil\n# import os?\n# x = 1?y = 2?z = 3\n# plan: forward D64 bfloat16 sm_90, no mask")


def test_only_helpers_that_are_called_are_copied():
    text = window_file()
    assert "def tanh(" in text
    assert "def number(" in text
    assert "def floor_div(" not in text


def test_what_the_plan_needs_must_be_given():
    with pytest.raises(ValueError, match="mask's text"):
        assemble(plan_forward(64, map_form="list"))
    with pytest.raises(ValueError, match="score mod"):
        assemble(plan_forward(64, score=True))
    with pytest.raises(ValueError, match="score mod"):
        assemble(plan_forward(64), score="def score_mod(): ...")


RUN_ALONE = """
import sys
sys.modules["flexmask"] = None  # importing it fails
import torch
from triton.runtime import interpreter
original = interpreter._patch_lang_tensor
def patched(tensor, scope):  # numpy 2.4 makes no numbers of one-element arrays
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
interpreter._patch_lang_tensor = patched
import document_kernel, causal_kernel
torch.manual_seed(0)
q, k, v = torch.randn(2, 2, 21, 16), torch.randn(2, 1, 35, 16), torch.randn(2, 1, 35, 16)
doc = (torch.arange(35)[None] // torch.tensor([[9], [6]])).int()
i, j = torch.arange(21)[:, None], torch.arange(35)[None]
s = (q.double() @ k.double().mT) / 4
keep = (doc[:, :21, None] == doc[:, None, :])[:, None] & (j <= i) & (i - j < 5)
for module, captured, score, keep in (
    (document_kernel, [(doc,), (5,)], lambda s: 5 * torch.tanh(s / 5), keep),
    (causal_kernel, [(), (7,)], lambda s: s, (j <= i) & (i - j < 7)),
):
    out, lse = module.attention(q, k, v, *captured)
    p = score(s).masked_fill(~keep, float("-inf"))
    torch.testing.assert_close(out.double(), p.softmax(-1) @ v.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), p.logsumexp(-1), atol=1e-5, rtol=1e-5)
print("agrees")
"""


def test_files_run_without_flexmask(tmp_path):
    (tmp_path / "document_kernel.py").write_text(window_file())
    (tmp_path / "causal_kernel.py").write_text(causal_file())
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", RUN_ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == "agrees", done.stderr[-2000:]
