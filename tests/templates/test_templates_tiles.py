"""The tiles kernel: exact states whatever decides a tile; its file; and what the compilers make of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from maps_compiled import LISTS, RANKS, TILES
from tiles_cases import BOX_ARGUMENTS, CASES

from flexmask.ir import K, Q, load
from flexmask.lowering import CaptureSpec, TensorSpec, emit_function
from flexmask.templates.assemble import assemble_tiles

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# the installed triton, and the newer one that `make test` puts beside it
TRITONS = ["", *(str(path) for path in [ROOT / ".triton-next"] if (path / "triton").is_dir())]
SPEC = CaptureSpec((TensorSpec("evict", 1, "int32"),))
EVICT = emit_function("evict", (K <= Q) & (Q < load(0, "int", K)), SPEC, "mask")
SIZES = {"axis": "row", "block_q": 128, "block_kv": 64}


@pytest.fixture(scope="session")
def interpreted():
    """Every case run once, in a process where Triton interprets kernels."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", HERE / "tiles_cases.py"], capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("case", CASES)
def test_states_equal_brute_force(interpreted, case, axis):
    assert interpreted[f"{case}, {axis}"] == "", interpreted[f"{case}, {axis}"]


@pytest.fixture(scope="session", params=TRITONS, ids=lambda path: Path(path).name or "installed")
def compiled(request):
    """Every case compiled once, in a process that does not interpret kernels; those of lists and ranks with them."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([request.param, str(ROOT)] if request.param else [str(ROOT)])
    command = [sys.executable, "-W", "ignore", HERE / "maps_compiled.py"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)


@pytest.mark.parametrize("case", [*TILES, *LISTS, *RANKS])
def test_no_register_is_spilled(compiled, case):
    assert compiled[case]["spills"] == 0


def test_other_lengths_and_numbers_are_no_other_kernels(compiled):
    assert compiled["tiles kernels"] == 1
    assert {compiled[case]["kernels"] for case in (*LISTS, *RANKS)} == {1}


def test_the_file_is_readable_and_passes_ruff(tmp_path):
    box = f'@triton.jit\ndef box_test({BOX_ARGUMENTS}):\n    """By hand."""\n    return kv_idx >= 0, kv_idx < 0'
    text = assemble_tiles(**SIZES, mask=EVICT, box=box, bounds=[(), (0, 2)], header=["mask evict\nimport os"])
    assert text.startswith("# mask evict\n# import os\n# tiles of 128 x 64, by row\n")
    assert "BOXED = tl.constexpr(True)\nHULLS = tl.constexpr(2)" in text
    assert "found = tl.load(broken + 1) | tl.load(broken + 3)" in text
    assert "flexmask" not in text
    (tmp_path / "kernel.py").write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--isolated"], ["format", "--isolated", "--line-length", "140", "--check", "--diff"]):
        done = subprocess.run([*ruff, *command, "kernel.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_what_it_cannot_do_it_says():
    with pytest.raises(ValueError, match="'row' or 'column', not 'both'"):
        assemble_tiles(axis="both", block_q=16, block_kv=16, mask=EVICT, box=None, bounds=[])
    with pytest.raises(ValueError, match="blocks of 1 to 8192; got 16 x 10000"):
        assemble_tiles(axis="row", block_q=16, block_kv=10000, mask=EVICT, box=None, bounds=[])
