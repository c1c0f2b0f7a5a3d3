"""Versions of flexmask in processes of their own, on the CPU."""

import shutil
from pathlib import Path

import pytest

from benchmarks import versus
from benchmarks.figures import Case

ROOT = Path(versus.__file__).parent.parent
TINY = Case("causal", 128, 1, 2, 2, 16)
OPTIONS = ["--device", "cpu"]


def copy_of(place, changes=()):
    """A folder with a copy of the package, some of its text changed."""
    shutil.copytree(ROOT / "flexmask", place / "flexmask", ignore=shutil.ignore_patterns("__pycache__"))
    for file, right, wrong in changes:
        text = (place / "flexmask" / file).read_text()
        assert right in text
        (place / "flexmask" / file).write_text(text.replace(right, wrong))
    return place


def compared(folders, case=TINY, parts=("forward", "backward")):
    versions = [versus.Version(name, folder, OPTIONS) for name, folder in folders.items()]
    try:
        return versus.compare(versions, case, parts, 1, 0.0)
    finally:
        for version in versions:
            version.close()


def test_each_version_runs_its_own_package_and_is_checked(tmp_path):
    wrong = copy_of(tmp_path, [("runtime/cpu.py", "import torch\n", 'import torch\n\nraise ImportError("another version")\n')])
    lines = compared({"this": ROOT, "other": wrong})
    assert lines[0] == "causal 128 D16: other failed: its process ended (1)"
    assert [line.split()[0] for line in lines[1:]] == ["forward", "backward"] and all("this" in line for line in lines[1:])


def test_versions_are_compared_with_the_first(tmp_path):
    forward, backward = compared({"this": ROOT, "copy": copy_of(tmp_path)})
    assert forward.startswith("forward  causal 128 D16: this ") and "(1.000, error " in forward and "copy" in backward


def test_a_commit_is_taken_from_git_and_a_folder_as_it_is(tmp_path):
    assert versus.folder_of(str(ROOT), tmp_path) == ROOT
    with pytest.raises(SystemExit, match="'no-such' is neither a folder with a package flexmask nor a commit"):
        versus.folder_of("no-such", tmp_path)


def test_a_version_whose_process_ends_is_told():
    version = versus.Version("this", ROOT, OPTIONS)
    version.close()
    version.ask("time", part="forward")
    assert "its process ended" in version.answer()["failed"]
