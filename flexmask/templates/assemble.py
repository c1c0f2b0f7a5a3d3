"""One readable, self-contained Python file from a plan, the emitted mods, and the templates' own text.

The templates are read as text, so that assembling needs no triton.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ..lowering import KernelPlan

HERE = Path(__file__).parent
_MARKER = re.compile(r"^# ---- (.+)\n", re.MULTILINE)
IMPORTS = """import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
"""


def assemble(
    plan: KernelPlan, mask: str | None = None, score: str | None = None, header: Sequence[str] = (), row_bounds: str | None = None
) -> str:
    """The source of a kernel module for `plan`, with `forward`, `pack` and `attention` to call.

    `mask` and `score` are texts from `emit_function`, `row_bounds` the text from `emit_row_bounds` (for `attention` only); `header`
    are lines about the mods, written as comments. Raises ValueError where the plan needs a text that is not given.
    """
    if plan.evaluated and mask is None:
        raise ValueError("the plan evaluates the mask in the kernel, so assemble needs the mask's text")
    if plan.score != (score is not None):
        raise ValueError(f"the plan has{' a' if plan.score else ' no'} score mod, but {'none' if score is None else 'one'} was given")
    kernel, launcher = _sections("forward.py"), _sections("launcher.py")
    defaults = _functions(kernel["mods"])
    mods = [mask if plan.evaluated and mask else "\n\n\n".join(defaults[n] for n in ("mask_row", "mask_mod"))]
    mods += [score or "\n\n\n".join(defaults[n] for n in ("score_row", "score_mod"))]
    parts = [
        _header(plan, header) + "\n" + IMPORTS,
        _constants(kernel["constants of the plan"] + kernel["kernel"], plan),
        *_helpers(mods),
        *mods,
        kernel["functions"],
        launcher["constants"],
        row_bounds or launcher["bounds"],
        launcher["functions"],
    ]
    return _join(parts)


def assemble_tiles(block_q: int, block_kv: int, mask: str, header: Sequence[str] = ()) -> str:
    """The source of the planning kernel for tiles of these sizes, with `decide` to call; `mask` is a text from `emit_function`."""
    template = _sections("tile.py")
    values = {"BLOCK_Q": block_q, "BLOCK_KV": block_kv, "PADDED_KV": 1 << (block_kv - 1).bit_length()}
    sizes = re.sub(
        r"^(\w+) = tl\.constexpr\(.*\)$", lambda m: f"{m[1]} = tl.constexpr({values[m[1]]})", template["sizes"], flags=re.MULTILINE
    )
    imports = _comments(header) + "\nimport triton\nimport triton.language as tl\n"
    return _join([imports, sizes, *_helpers([mask]), mask, template["functions"]])


def _join(parts: Sequence[str]) -> str:
    """Parts two blank lines apart, imports and constants one."""
    text = "\n\n\n".join(part.strip("\n") for part in parts) + "\n"
    return text.replace("import TensorDescriptor\n\n\n", "import TensorDescriptor\n\n", 1)


def _header(plan: KernelPlan, lines: Sequence[str]) -> str:
    return _comments([*lines, f"plan: {plan}"])


def _comments(lines: Sequence[str]) -> str:
    """Whatever a line holds, it stays behind its `#`."""
    return "".join(
        f"# {''.join(c if c.isprintable() else '?' for c in part)}".rstrip() + "\n" for line in lines for part in line.split("\n")
    )


def _constants(text: str, plan: KernelPlan) -> str:
    """The template's constants with the plan's values."""
    values = {
        "HEAD_DIM": plan.head_dim, "V_HEAD_DIM": plan.v_head_dim, "PADDED_DIM": plan.padded_dim, "PADDED_V_DIM": plan.padded_v_dim,
        "BLOCK_Q": plan.block_q, "BLOCK_KV": plan.block_kv, "NUM_WARPS": plan.num_warps, "NUM_STAGES": plan.num_stages,
        "TMA": plan.loads == "tma", "MAP_FORM": plan.map_form, "PIECES": plan.pieces, "EVALUATED": plan.evaluated,
        "SCORE": plan.score, "PRECISION": plan.precision,
    }  # fmt: skip
    for name, value in values.items():
        shown = f'"{value}"' if isinstance(value, str) else repr(value)
        text, found = re.subn(rf"^{name} = tl\.constexpr\(.*\)$", f"{name} = tl.constexpr({shown})", text, flags=re.MULTILINE)
        assert found == 1, name
    return text


def _helpers(texts: Sequence[str]) -> list[str]:
    """The functions of functions.py that the texts call."""
    known = _functions((HERE / "functions.py").read_text(encoding="utf-8"))
    called = {n.id for text in texts for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
    return [text for name, text in known.items() if name in called]


def _functions(text: str) -> dict[str, str]:
    """Top-level functions by name, decorators included."""
    lines = text.split("\n")
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


@lru_cache(maxsize=8)
def _sections(name: str) -> dict[str, str]:
    """The parts of a template between its `# ---- title` lines."""
    parts = _MARKER.split((HERE / name).read_text(encoding="utf-8"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))
