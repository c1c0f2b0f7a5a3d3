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
import zoo
from hopper_backward_cases import CASES, column_map, mask_of, plan_of, source_of
from test_templates_offline import TRITONS

from flexmask import masks
from flexmask.lowering.plan_hopper_backward import plan_hopper_backward
from flexmask.runtime.backward_kernels import choose_fused
from flexmask.runtime.checks import Shapes
from flexmask.runtime.choice import Target
from flexmask.runtime.request import Request
from flexmask.runtime.store import Store
from flexmask.templates.assemble_hopper_backward import assemble_hopper_backward

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILED = [
    pytest.param(case, marks=[] if case in hopper_backward_compiled.ALWAYS else [pytest.mark.slow])
    for case in hopper_backward_compiled.COMPILED
]  # fmt: skip
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
    """Every case that a test is going to look at compiled once, in a process that does not interpret kernels."""
    mine = [item for item in request.session.items if item.path == Path(__file__) and "compiled" in item.fixturenames]
    wanted = {item.callspec.params["case"] for item in mine}
    return output_of("hopper_backward_compiled.py", *sorted(wanted), triton=request.param)


@pytest.mark.parametrize("case", COMPILED)
def test_products_are_made_side_by_side(compiled, case):
    """A compiler that gives up on that says so by waiting after each product. For the second product of a step each warpgroup may wait once
    more than was asked for, but not where the first two are to be in flight together."""
    opcodes, plan = compiled[case]["opcodes"], plan_of(CASES[case])
    together = plan.crossed or plan.pieces > 1
    skipped = 6 if case == "a score without products" else 0  # parts of products that nothing depends on
    assert opcodes["HGMMA"] == 64 - skipped and opcodes["WARPGROUP"] <= 20 + 2 * (not together)
    assert opcodes["UTMALDG"] and opcodes["UTMASTG"] and opcodes.get("UTMAREDG", 0) == 2 * (not plan.deterministic)
    assert opcodes.get("REDG", 0) == 17 * plan.deterministic


@pytest.mark.parametrize("case", COMPILED)
def test_few_registers_are_spilled(compiled, case):
    """At head dim 128 nothing but addresses, where a PARTIAL tile is masked; at 64 a few numbers of 240 in every step, more of them where
    a score's curve is computed, which takes longer than the products there. Kinds of tokens are int64, two registers each. A warp that
    walks bits in order spills too, but multiplies nothing."""
    plan = plan_of(CASES[case])
    wide = plan.padded_dim == 128 and case != "kinds of tokens" and not (plan.deterministic and plan.bits)
    assert compiled[case]["loop_spills"] <= (12 if wide else 176 if case.startswith("soft-cap") else 80)


@pytest.mark.parametrize("case", COMPILED)
def test_nothing_is_read_before_it_is_written(compiled, case):
    assert compiled[case]["undefined"] == []


@pytest.mark.parametrize("case", COMPILED)
def test_shared_memory_is_as_estimated(compiled, case):
    """But for what a score mod needs of queries, which its plan does not know."""
    estimate = plan_of(CASES[case]).shared_bytes()
    values = 2 * 2 * 4 * plan_of(CASES[case]).block_q * (CASES[case].score is not None)
    assert estimate <= compiled[case]["shared_bytes"] <= estimate + 1024 + values


@pytest.mark.parametrize("case", ["full", "three", "crossed", "bits", "holds", "slopes", "more for later queries"])
def test_files_pass_ruff_and_are_formatted(case, tmp_path):
    (tmp_path / "kernel.py").write_text(source_of(CASES[case]))
    for command in (["check"], ["format", "--check", "--diff"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "140", "kernel.py"]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_a_file_says_what_it_is_and_stands_alone():
    text = assemble_hopper_backward(plan_hopper_backward(64), None, ["mask causal"])
    assert text.startswith("# mask causal\n# plan: hopper backward D64")
    assert "flexmask" not in text and "from ." not in text


# they read a table at (query, key), or at places computed from the score; or compute in float64
PLAIN = {
    "relative_bias", "relative_bias_clipped", "t5_bias", "t5_bias_decoder", "swin_bias", "full_bias", "full_bias_shared_heads",
    "decomposed_bias", "group_bias", "bias_in_steps", "table_by_distance_score", "noncontiguous_bias", "table_by_sign_of_score",
    "smooth_functions",
}  # fmt: skip


@pytest.mark.parametrize("name", zoo.SCORES)
def test_most_scores_are_taken(name):
    request = Request(None, zoo.SCORES[name](2, 4, 100, 100).traced(), Shapes(2, 4, 4, 100, 100, 128, 128))
    chosen = choose_fused(Store(), request, Target(torch.bfloat16, 90, True))
    assert isinstance(chosen, str) == (name in PLAIN), chosen


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_deterministic_where_that_is_asked_for(deterministic):
    request = Request(masks.causal.traced(), None, Shapes(2, 4, 4, 100, 100, 128, 128))
    ((_, plan),) = choose_fused(Store(), request, Target(torch.bfloat16, 90, True, deterministic=deterministic))
    assert plan.deterministic is deterministic and ("deterministic" in str(plan)) is deterministic


def test_a_score_mod_must_be_given_where_the_plan_has_one():
    with pytest.raises(ValueError, match="the plan has a score mod, but none was given"):
        assemble_hopper_backward(plan_hopper_backward(64, score=True))


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].keeps])
def test_maps_of_the_cases_keep_what_the_mask_keeps(case):
    """Every kept pair lies in a tile of the map, by the intervals of a PARTIAL one."""
    plan, keep = plan_of(CASES[case]), mask_of(CASES[case], "cpu")
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
