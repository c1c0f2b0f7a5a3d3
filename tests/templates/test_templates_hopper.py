"""The Hopper forward kernel: on the CPU, as threads and barriers, against dense attention; compiled for an absent GPU; as a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hopper_cases
import hopper_compiled
import hopper_on_cpu
import pytest
import torch
import zoo
from hopper_cases import CASES, Case, plan_of, source_of
from test_templates_offline import TRITONS

from flexmask.ir import simplify
from flexmask.lowering import emit_column, emit_function
from flexmask.lowering.plan_hopper import plan_hopper
from flexmask.lowering.plan_hopper_backward import plan_hopper_backward
from flexmask.runtime.recipes import captures_of
from flexmask.runtime.variants import is_costly, reads_by_score
from flexmask.templates.assemble_hopper import assemble_hopper, decided, in_gluon
from flexmask.templates.assemble_hopper_backward import assemble_hopper_backward

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILED = [
    pytest.param(case, marks=[] if case in hopper_compiled.ALWAYS else [pytest.mark.slow]) for case in hopper_compiled.CASES
]  # fmt: skip


def output_of(script, *arguments, triton=""):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([triton, str(ROOT)] if triton else [str(ROOT)])
    command = [sys.executable, "-W", "ignore", HERE / script, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)


@pytest.fixture(scope="session")
def on_cpu():
    """Every case run once, in a process of its own, as torch is told to use one thread."""
    return output_of("hopper_on_cpu.py")


@pytest.mark.parametrize("case", CASES)
def test_output_equals_that_of_dense_attention(on_cpu, case):
    assert on_cpu[case] == "", on_cpu[case]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of compute capability 9.0"
)
def test_output_equals_that_of_dense_attention_on_a_gpu():
    assert output_of("hopper_cases.py") == dict.fromkeys(CASES, "")


LEAVES = "store_parts(out, last_b, last_h, start, times(acc, share), out_ring, buffer * Q_PARTS)"
PLACE_IS_FREE = "mbarrier.arrive(q_empty.index(buffer))"
MISTAKES = {
    "a wait for the other phase": ("phase ^ 1", "phase"),
    "a slot that is not given back": ("mbarrier.arrive(v_empty.index(before))", "pass"),
    "a warpgroup that does not pass the turn on": ("pass_by(8 + (W + 1) % CONSUMERS, 256)", "pass"),
    "half of the bytes expected": ("BLOCK_KV * PADDED_DIM * 2", "BLOCK_KV * PADDED_DIM"),
    "a tile row of the first key only": ("b.to(gl.int64) * stride_mb + h.to(gl.int64) * stride_mh + m", "b.to(gl.int64)"),
    "cuts of another tile": (
        "load_cuts(cut_ring.index(slot), cut, b, h, tile, m)",
        "load_cuts(cut_ring.index(slot), cut, b, h, tile, m + 1)",
    ),
    "cuts that begin with the first row": ("gl.minimum(gl.maximum(start - base, 0), BLOCK)", "start * 0"),
    "cuts of one column for two": ("last, LENGTH, 1, BLOCK, STARTS)", "last, LENGTH, 0, BLOCK, STARTS)"),
    "a queue that is not reset": ("if taken == tiles - 1:", "if taken == tiles:"),
    "apart, long lines that are forgotten on the way": ("turn, turns, call, tile_map\n", "turn, (0, 0), call, tile_map\n"),
    "apart, a long line that comes twice": ("gl.where(is_last, long, 0) + rest", "rest"),
    "bits of another tile": ("gl.load(tile_map[6] + part_at + i,", "gl.load(tile_map[6] + part_at + i - 1,"),
    "bits where the first tile is FULL": ("gl.where(full > 0, ALL, NOTHING)", "0"),
    "bits of the first warpgroup for all": ("* QUERIES + W * APART) * WORDS", "* QUERIES) * WORDS"),
    "wide, queries over output that has not left": ("tma.store_wait(0)\n", "pass\n"),
    "wide, a place given back before the output": (f"{LEAVES}\n        {PLACE_IS_FREE}", f"{PLACE_IS_FREE}\n        {LEAVES}"),
    "wide, a product of the scores that is not waited for": ("warpgroup_mma_wait(V_PARTS,", "warpgroup_mma_wait(V_PARTS + 1,"),
    "wide, one part of the keys for all": ("slot * PARTS + i", "slot * PARTS"),
    "wide, parts that replace each other": ("use_acc=i > 0", "use_acc=False"),
    "wide, one part of the output for all": ("start, i * PART]", "start, 0]"),
    "split, all FULL tiles for each portion": ("range(first_full, last_full)", "range(full)"),
    "split, a portion that begins with the walk": ("first = gl.where(low > 0, chosen, first)", "first = first + 0"),
    "split, a tile for a portion that has none": ("gl.where(low < following, first, gl.cdiv(kv_len, BLOCK_KV))", "first"),
    "split, all portions to one place": ("portion.to(gl.int64) * all_rows", "gl.to_tensor(0).to(gl.int64)"),
    "2 heads, the queries of one for both": ("h + w * HEADS_APART", "h"),
    "8 heads, bits of rows that are other heads": ("row = row % SPAN", "row = row + 0"),
    "8 heads, a head of its own for each row": ("// SPAN", "// ROWS"),
    "2 heads, output of one for both": ("h += W * HEADS_APART", "h += 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_simulation_notices(mistake, monkeypatch):
    monkeypatch.setattr(hopper_on_cpu, "PATIENCE", 0.5)
    monkeypatch.setattr(hopper_on_cpu, "LATE", 0.02)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    right, wrong = MISTAKES[mistake]
    kinds = {
        "bits": "bits", "wide": "192, window", "apart": "heads apart", "split": "split, two", "2 heads": "2 heads a tile",
        "8 heads": "8 heads a tile, bits",
    }  # fmt: skip
    case = CASES[next((case for kind, case in kinds.items() if mistake.startswith(kind)), "crossed")]
    text = source_of(case)
    assert right in text
    module = hopper_on_cpu.loaded(text.replace(right, wrong))
    assert any(goes_wrong(case, module) for _ in range(20))  # a race may come out well at times


def goes_wrong(case, module):
    try:
        return hopper_cases.check(case, module, "cpu") != ""
    except (hopper_on_cpu.Hang, AssertionError):
        return True


@pytest.fixture(scope="session", params=TRITONS, ids=lambda path: Path(path).name or "installed")
def compiled(request):
    """Every case that a test is going to look at compiled once, by each triton there is."""
    mine = [item for item in request.session.items if item.path == Path(__file__) and "compiled" in item.fixturenames]
    wanted = {item.callspec.params["case"] for item in mine}
    return output_of("hopper_compiled.py", *sorted(wanted), triton=request.param)


@pytest.mark.parametrize("case", COMPILED)
def test_registers_are_not_spilled(compiled, case, request):
    """But for a few that some compilers put aside: where a score mod reads a table by key, round the loops of narrow warpgroups and
    of kernels that read bits, and where the output of a wide head leaves few registers. A newer one also puts some aside where PARTIAL
    tiles read bits beside a score mod."""
    wide, newer = plan_of(hopper_compiled.CASES[case]).wide, request.node.callspec.params["compiled"] != ""
    in_loops = 40 if "gate" in case else 80 if "bits, score" in case and newer else 4 if wide else 0
    assert compiled[case]["loop_spills"] <= in_loops
    few = {
        "gate": 160,
        "bits, score": 220 if newer else 40,
        "256, bits, score": 140 if newer else 100,
        "192/128, gate": 180,
        "256, gate": 140,
        "split, gate": 160,
        "three warpgroups": 64,
    }
    assert compiled[case]["spills"] <= few.get(case, 100 if wide else 40)


@pytest.mark.parametrize("case", COMPILED)
def test_products_stay_asynchronous(compiled, case):
    """Where the compiler gives up on that, it waits after every instruction: WARPGROUP counts them."""
    opcodes, plan = compiled[case]["opcodes"], plan_of(hopper_compiled.CASES[case])
    steps = 2 if plan.map_form == "none" else 3  # the first tile, PARTIAL ones, FULL ones; each with its P V
    parts, v_parts = (plan.padded_dim // plan.part, plan.padded_v_dim // plan.part) if plan.wide else (1, 1)
    early = not plan.wide  # the first product of the next tile stands at the end of the loop, and once before it
    assert opcodes["HGMMA"] == plan.consumers * ((steps + early) * plan.padded_dim + steps * v_parts * plan.block_kv) // 16
    assert opcodes["WARPGROUP"] == plan.consumers * (steps * (parts + v_parts + 2) + 2 * early)
    assert opcodes["UTMALDG"] == (plan.consumers * plan.padded_dim + 2 * (plan.padded_dim + plan.padded_v_dim)) // 64
    assert opcodes.get("UTMASTG", 0) == (0 if plan.split else plan.consumers * v_parts)


@pytest.mark.parametrize("case", COMPILED)
def test_the_softmax_hides_behind_products(compiled, case):
    """The assembler does not move the wait for P V up past the exponentials of FULL tiles; three warpgroups have no registers for that."""
    plan = plan_of(hopper_compiled.CASES[case])
    exponentials = (plan.block_kv // 2 + 4) * (1 + plan.score)  # of a thread, in a step; here and there one more by row
    masked = 2 * exponentials if plan.map_form != "none" else 0
    assert compiled[case]["exposed"] <= masked or plan.consumers == 3


@pytest.mark.parametrize("case", COMPILED)
def test_nothing_is_read_before_it_is_written(compiled, case):
    assert compiled[case]["undefined"] == []


@pytest.mark.parametrize("case", COMPILED)
def test_shared_memory_is_as_estimated(compiled, case):
    assert abs(compiled[case]["shared_bytes"] - plan_of(hopper_compiled.CASES[case]).shared_bytes()) < 512


@pytest.mark.slow
@pytest.mark.parametrize("case", hopper_compiled.LIMITS)
def test_plans_refuse_what_spills(compiled, case):
    """What a plan says of registers agrees with the compiler: a few spills in the loops at its limit, many beyond it."""
    found = compiled[case]["loop_spills"]
    assert found <= 8 if case.startswith("at") else found >= 30
    if not case.startswith("at"):
        with pytest.raises(ValueError, match="registers a thread are needed"):
            plan_of(hopper_compiled.LIMITS[case])


def test_files_of_plans_that_split_nothing_say_nothing_of_it():
    whole, split = (source_of(CASES[case]) for case in ("causal", "split, causal"))
    assert "portion_of" not in whole and "join_portions" not in whole and "if SPLIT" not in split and "join_portions" in split


def test_warpgroups_with_heads_of_their_own_are_two():
    with pytest.raises(ValueError, match="heads that share a tile are 2, 4, 8 or 16"):
        plan_hopper(64, pack=3)


def test_files_of_narrow_plans_say_nothing_of_wide_ones():
    narrow, wide = (assemble_hopper(plan_hopper(d, map_form="range", pieces=1)) for d in (128, 256))
    assert "WIDE" not in narrow and "load_parts" not in narrow and "if WIDE" not in wide and "load_parts" in wide
    assert "if kind" in decided("if kind:\n    a()", True) and decided("if not WIDE:\n    a()\nb()", True) == "b()"


def ruff(folder, *command):
    given = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "140", "."]
    done = subprocess.run(given, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_files_name_what_they_use_and_are_formatted(tmp_path):
    """Rules of style beyond that are left out: Triton specialises an `if`, so that two of them may not be joined."""
    for number, case in enumerate(
        ["full", "three", "crossed", "bits", "gate", "256, bits", "split, crossed", "split, 192/128", "2 heads a tile"]
    ):
        (tmp_path / f"kernel_{number}.py").write_text(source_of(CASES[case]))
    ruff(tmp_path, "check", "--select", "E,F,I")
    ruff(tmp_path, "format", "--check", "--diff")


def test_every_score_finds_what_it_calls(tmp_path):
    for name, make in zoo.SCORES.items():
        score = make(2, 4, 300, 300).traced()
        if is_costly(score.expr) or reads_by_score(score.expr):
            continue  # which plain kernels are for
        spec, expr = captures_of(score), simplify(score.expr)
        forward = assemble_hopper(plan_hopper(64, score=True), emit_function("score_mod", expr, spec, "score"))
        backward = assemble_hopper_backward(plan_hopper_backward(64, score=True), emit_column("score_mod", expr, spec))
        for part, text in (("forward", forward), ("backward", backward)):
            (tmp_path / f"{name}_{part}.py").write_text(text)
    ruff(tmp_path, "check", "--select", "F")


def test_a_file_says_what_it_is_and_needs_no_flexmask():
    text = assemble_hopper(plan_hopper(128, map_form="range", pieces=1), header=["mask causal"])
    assert text.startswith("# mask causal\n# plan: hopper forward D128 bfloat16 sm_90, range map, 1 interval a row")
    assert "flexmask" not in text and "import_" not in text
    compile(text, "generated", "exec")


def test_a_score_mod_must_be_given_where_the_plan_has_one():
    with pytest.raises(ValueError, match="the plan has a score mod, but none was given"):
        assemble_hopper(plan_hopper(64, score=True))


def test_what_gluon_has_not_is_refused():
    with pytest.raises(ValueError, match="the score mod calls sort, which Gluon has not"):
        in_gluon("@triton.jit\ndef score_mod(score):\n    return tl.sort(score)")


def test_kernels_that_differ_in_length_only_are_one():
    texts = {source_of(Case({"head_dim": 64}, sizes=(1, 1, 1, n, n))) for n in (128, 4096)}
    assert len(texts) == 1


WRONG_BITS = {
    "missing": ("bits", {"words": None}, "it needs `patterns` and `words`"),
    "not asked for": ("two", {"patterns": torch.zeros(1), "words": torch.zeros(1)}, "reads no bits"),
    "of another size": ("bits", {"words": torch.zeros(1, 64, 4)}, r"words must be \[pool, 128, 4\]; got \[1, 64, 4\]"),
}


@pytest.mark.parametrize("wrong", WRONG_BITS)
def test_bits_that_the_kernel_cannot_read_are_refused(wrong):
    name, change, message = WRONG_BITS[wrong]
    given = hopper_cases.arguments(CASES[name], plan_of(CASES[name])) | change
    q = torch.zeros(1, 2, 128, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        hopper_on_cpu.loaded(source_of(CASES[name])).forward(q, q, q, 1.0, **given)
