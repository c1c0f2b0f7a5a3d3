"""The backward kernels: in Triton's interpreter against autograd, compiled for GPUs that are not here, and as files to read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import backward_compiled
import pytest
from backward_cases import CASES
from test_templates_offline import TRITONS

from flexmask.lowering.plan import SHARED_BYTES
from flexmask.lowering.plan_backward import plan_backward
from flexmask.templates.assemble_backward import assemble_backward

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILED = backward_compiled.CASES


@pytest.fixture(scope="session")
def interpreted():
    """Every case run once, in a process where Triton interprets kernels."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", HERE / "backward_cases.py"], capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_dense_attention(interpreted, case):
    assert interpreted[case] == "", interpreted[case]


@pytest.fixture(scope="session", params=TRITONS, ids=lambda path: Path(path).name or "installed")
def compiled(request):
    """Every case compiled once, in a process that does not interpret kernels."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([request.param, str(ROOT)] if request.param else [str(ROOT)])
    done = subprocess.run([sys.executable, HERE / "backward_compiled.py"], capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", COMPILED)
def test_registers_are_not_spilled_where_tiles_are_multiplied(compiled, case, request):
    newer = (
        ".triton-next" in request.node.name
    )  # whose compiler spills four numbers of 255; tiles a step smaller, which spill none, are slower
    assert compiled[case]["loop_spills"] <= (8 if newer else 4)
    assert compiled[case]["spills"] <= 64  # what is put aside while a line of tiles is walked costs nothing


@pytest.mark.parametrize("case", ["hopper dkdv, causal", "hopper dkdv, full"])
def test_terms_of_rows_come_by_tma(compiled, case):
    """Each thread copied all that it needs of them, 128 copies where the products are 48."""
    assert "LDGSTS" not in compiled[case]["opcodes"]


@pytest.mark.parametrize("case", COMPILED)
def test_shared_memory_is_as_estimated(compiled, case):
    plan = plan_backward(**COMPILED[case])
    assert compiled[case]["shared_bytes"] <= min(plan.shared_bytes() * 1.2 + 8192, SHARED_BYTES[plan.arch] + 1024 * 4)


@pytest.mark.parametrize("case", COMPILED)
def test_kernels_use_what_the_gpu_is_good_at(compiled, case):
    opcodes, plan = compiled[case]["opcodes"], plan_backward(**COMPILED[case])
    warpgroups = plan.arch >= 90 and min(plan.block_q, plan.block_kv) >= 32 and max(plan.block_q, plan.block_kv) >= 64
    assert opcodes.get("HGMMA" if warpgroups else "HMMA", 0) > 0
    assert ("UTMALDG" in opcodes) == (plan.loads == "tma")
    adds = any(name in opcodes for name in ("RED", "REDG", "ATOMG"))
    assert adds == (plan.scatter != ""), "nothing but table gradients is added atomically"


READ = [
    "hopper dq, table gradients", "hopper dq, table gradients in fixed point", "hopper dkdv, busy", "hopper dkdv, full",
    "ampere dq, causal",
]  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_files_pass_ruff_and_are_formatted(case, tmp_path):
    (tmp_path / "kernel.py").write_text(backward_compiled.source_of(COMPILED[case]))
    ruff = [sys.executable, "-m", "ruff"]
    done = subprocess.run([*ruff, "check", "--isolated", "kernel.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    flags = ["--isolated", "--line-length", "140", "--check", "--diff"]
    done = subprocess.run([*ruff, "format", *flags, "kernel.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_file_holds_the_kernel_of_one_part():
    dq, dkdv = (backward_compiled.source_of({"part": part, "head_dim": 64}) for part in ("dq", "dkdv"))
    assert "def attention_backward_q(" in dq and "def backward_q(" in dq and "_kv(" not in dq
    assert "def attention_backward_kv(" in dkdv and "def backward_kv(" in dkdv and "_q(" not in dkdv
    assert "atomic_add" not in dq + dkdv


def test_what_the_plan_needs_must_be_given():
    with pytest.raises(ValueError, match="mask's text"):
        assemble_backward(plan_backward("dq", 64, map_form="list"))
    with pytest.raises(ValueError, match="score and gradient"):
        assemble_backward(plan_backward("dkdv", 64, score=True), score="def score_mod(): ...")
    with pytest.raises(ValueError, match="score mod"):
        assemble_backward(plan_backward("dkdv", 64), score="def score_mod(): ...")
    with pytest.raises(ValueError, match="score_scatter"):
        assemble_backward(plan_backward("dq", 64, score=True, scatter="float"), score="def f(): ...", gradient="def score_slope(): ...")


RUN_ALONE = """
import sys
sys.modules["flexmask"] = None  # importing it fails
import torch, dq_kernel, dkdv_kernel
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (21, 35, 35))
dout = torch.randn(1, 2, 21, 16)
s = (q @ k.mT) / 4
out = s.softmax(-1) @ v
expected = torch.autograd.grad(out, (q, k, v), dout)
q, k, v, out = (x.detach() for x in (q, k, v, out))
terms = dq_kernel.row_terms(out, s.detach().logsumexp(-1), dout)
given = q, k, v, dout, terms, 0.25
for result, wanted in zip((dq_kernel.backward_q(*given), *dkdv_kernel.backward_kv(*given)), expected):
    torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-5)
print("agrees")
"""


def test_files_run_without_flexmask(tmp_path):
    for part in ("dq", "dkdv"):
        (tmp_path / f"{part}_kernel.py").write_text(backward_compiled.source_of({"part": part, "head_dim": 16, "dtype": "float32"}))
    repair = "import sys; sys.path.insert(0, sys.argv[1]); from flexmask.templates.interpreter import repair_interpreter as r; r()"
    forget = "for name in [n for n in sys.modules if n.startswith('flexmask')]: del sys.modules[name]"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", f"{repair}\n{forget}\n{RUN_ALONE}", str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == "agrees", done.stderr[-2000:]
