"""The bits kernel: every PARTIAL tile's bits, equal tiles once; what has no room; its file; and what the compilers make of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bits_cases import CASES
from bits_compiled import BITS

from flexmask.ir import K, Q, load
from flexmask.lowering import CaptureSpec, TensorSpec, emit_function
from flexmask.templates.assemble_bits import assemble_bits, slots_for

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# the installed triton, and the newer one that `make test` puts beside it
TRITONS = ["", *(str(path) for path in [ROOT / ".triton-next"] if (path / "triton").is_dir())]
EVICT = emit_function("evict", (K <= Q) & (Q < load(0, "int", K)), CaptureSpec((TensorSpec("evict", 1, "int32"),)), "mask")


@pytest.fixture(scope="session")
def interpreted():
    """Every case run once, in a process where Triton interprets kernels."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-W", "ignore", HERE / "bits_cases.py"], capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("case", CASES)
def test_patterns_are_the_tiles_and_equal_tiles_share_one(interpreted, case, axis):
    assert interpreted[f"{case}, {axis}"] == "", interpreted[f"{case}, {axis}"]


@pytest.mark.parametrize("masks", ["zoo", "random"])
def test_masks_that_people_write(interpreted, masks):
    assert interpreted[masks] == "", interpreted[masks]


@pytest.fixture(scope="session", params=TRITONS, ids=lambda path: Path(path).name or "installed")
def compiled(request):
    """Every case compiled once, in a process that does not interpret kernels."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([request.param, str(ROOT)] if request.param else [str(ROOT)])
    command = [sys.executable, "-W", "ignore", HERE / "bits_compiled.py"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)


@pytest.mark.parametrize("case", BITS)
def test_no_register_is_spilled(compiled, case):
    assert compiled[case]["spills"] == 0


def test_other_lengths_and_numbers_are_no_other_kernels(compiled):
    assert compiled["kernels"] == 1


def test_the_file_is_readable_and_passes_ruff(tmp_path):
    text = assemble_bits(axis="column", block_q=100, block_kv=72, mask=EVICT, header=["mask evict\nimport os"])
    assert text.startswith("# mask evict\n# import os\n# bits of tiles of 100 x 72, by column\n")
    assert "WORDS = tl.constexpr(4)\nSIZE = tl.constexpr(288)\nPADDED = tl.constexpr(512)" in text
    assert "flexmask" not in text
    (tmp_path / "kernel.py").write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--isolated"], ["format", "--isolated", "--line-length", "140", "--check", "--diff"]):
        done = subprocess.run([*ruff, *command, "kernel.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_what_it_cannot_do_it_says():
    with pytest.raises(ValueError, match="'row' or 'column', not 'both'"):
        assemble_bits(axis="both", block_q=16, block_kv=16, mask=EVICT)
    with pytest.raises(ValueError, match="1 to 2048 words of 32 keys; got 512 x 160, which takes 512 x 5 words"):
        assemble_bits(axis="row", block_q=512, block_kv=160, mask=EVICT)
    with pytest.raises(ValueError, match="of 32 queries; got 160 x 512, which takes 512 x 5 words"):
        assemble_bits(axis="column", block_q=160, block_kv=512, mask=EVICT)


def test_half_of_the_hash_table_stays_empty():
    assert [slots_for(pool) for pool in (1, 2, 1000, 4096)] == [3, 5, 2049, 8193]
