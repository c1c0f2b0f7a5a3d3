"""The Hopper backward kernel: on the CPU, as threads and barriers, against autograd; compiled for a GPU that is not here; and as a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hopper_backward_compiled
import hopper_backward_on_cpu
import pytest
import torch
from hopper_backward_cases import CASES, column_map, mask_of
from test_templates_offline import TRITONS

from flexmask.lowering.plan_hopper_backward import plan_hopper_backward
from flexmask.templates.assemble_hopper_backward import assemble_hopper_backward

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILED = hopper_backward_compiled.COMPILED
MISTAKES = hopper_backward_on_cpu.MISTAKES


def output_of(script, *arguments, triton="", interpreted=False):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    env["PYTHONPATH"] = os.pathsep.join([triton, str(ROOT)] if triton else [str(ROOT)])
    command = [sys.executable, "-W", "ignore", HERE / script, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)


@pytest.fixture(scope="session")
def on_cpu():
    """Every case run once, in a process where Triton interprets kernels."""
    return output_of("hopper_backward_on_cpu.py", interpreted=True)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_dense_attention(on_cpu, case):
    assert on_cpu[case] == "", on_cpu[case]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of compute capability 9.0"
)
def test_gradients_equal_those_of_dense_attention_on_a_gpu():
    assert output_of("hopper_backward_cases.py") == dict.fromkeys(CASES, "")


@pytest.fixture(scope="session")
def mistaken():
    return output_of("hopper_backward_on_cpu.py", "mistakes", interpreted=True)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_simulation_notices(mistaken, mistake):
    assert mistaken[mistake] != ""


@pytest.fixture(scope="session", params=TRITONS, ids=lambda path: Path(path).name or "installed")
def compiled(request):
    """Some cases compiled once, in a process that does not interpret kernels."""
    return output_of("hopper_backward_compiled.py", triton=request.param)


@pytest.mark.parametrize("case", COMPILED)
def test_products_are_made_side_by_side(compiled, case):
    """A compiler that gives up on that says so by waiting after each product."""
    opcodes = compiled[case]["opcodes"]
    assert opcodes["HGMMA"] == 64 and opcodes["WARPGROUP"] <= 24
    assert opcodes["UTMALDG"] and opcodes["UTMASTG"] and opcodes["REDG"] == 16


@pytest.mark.parametrize("case", COMPILED)
def test_few_registers_are_spilled(compiled, case):
    """At head dim 128 nothing but addresses, where a PARTIAL tile is masked; at 64 a few numbers of 240 in every step."""
    wide = plan_hopper_backward(**CASES[case].plan).padded_dim == 128
    assert compiled[case]["loop_spills"] <= (12 if wide else 64)


@pytest.mark.parametrize("case", COMPILED)
def test_shared_memory_is_as_estimated(compiled, case):
    estimate = plan_hopper_backward(**CASES[case].plan).shared_bytes()
    assert estimate <= compiled[case]["shared_bytes"] <= estimate + 1024


@pytest.mark.parametrize("case", ["full", "three", "crossed", "bits", "holds"])
def test_files_pass_ruff_and_are_formatted(case, tmp_path):
    (tmp_path / "kernel.py").write_text(assemble_hopper_backward(plan_hopper_backward(**CASES[case].plan), ["mask document"]))
    for command in (["check"], ["format", "--check", "--diff"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "140", "kernel.py"]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_a_file_says_what_it_is_and_stands_alone():
    text = assemble_hopper_backward(plan_hopper_backward(64), ["mask causal"])
    assert text.startswith("# mask causal\n# plan: hopper backward D64")
    assert "flexmask" not in text and "from ." not in text


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].keeps])
def test_maps_of_the_cases_keep_what_the_mask_keeps(case):
    """Every kept pair lies in a tile of the map, by the intervals of a PARTIAL one."""
    plan, keep = plan_hopper_backward(**CASES[case].plan), mask_of(CASES[case], "cpu")
    given = column_map(plan, keep)
    kept = torch.zeros(*keep.shape[:2], keep.shape[2] + 128, keep.shape[3] + 128, dtype=torch.bool)
    for (b, h, n), tiles in tiles_of(plan, given):
        for m in tiles:
            kept[b, h, m * plan.block_q : (m + 1) * plan.block_q, n * plan.block_kv : (n + 1) * plan.block_kv] = True
    assert torch.equal(kept[..., : keep.shape[2], : keep.shape[3]] & keep, keep)


def tiles_of(plan, given):
    """The block rows that each block column of a map names."""
    table = given["ranges" if plan.map_form == "range" else "counts"]
    for at in torch.cartesian_prod(*(torch.arange(n) for n in table.shape[:3])).view(-1, 3).tolist():
        if plan.map_form == "range":
            first, _, _, last = table[tuple(at)].tolist()
            yield at, range(first, last)
        else:
            lists = zip(table[tuple(at)].tolist(), given["offsets"][tuple(at)].tolist(), strict=True)
            yield at, [m for count, first in lists for m in given["index"][first : first + count].tolist()]
