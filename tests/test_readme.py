"""The README's first example runs as it stands."""

import re
from pathlib import Path


def test_the_first_example_runs(capsys):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["out"].shape == (2, 4, 512, 64)
    assert "kept keys of row q_idx" in capsys.readouterr().out
