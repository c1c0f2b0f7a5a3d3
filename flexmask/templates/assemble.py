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
# the planning kernel counts a tile's places on two lines in 16 bits
MOST_IN_BLOCK = 8192
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
    kernel, launcher, dropout = _sections("forward.py"), _sections("launcher.py"), _sections("dropout.py")
    defaults = _functions(kernel["mods"])
    mods = [mask if plan.evaluated and mask else "\n\n\n".join(defaults[n] for n in ("mask_row", "mask_mod"))]
    mods += [score or "\n\n\n".join(defaults[n] for n in ("score_row", "score_mod"))]
    parts = [
        _header(plan, header) + "\n" + IMPORTS,
        _constants(kernel["constants of the plan"] + kernel["kernel"], plan),
        *_helpers(mods),
        *mods,
        dropout["functions"],
        *_kernel(plan, kernel["functions"]),
        launcher["constants"],
        row_bounds or launcher["bounds"],
        *_launcher(plan, launcher["functions"]),
    ]
    return _join(parts)


def _kernel(plan: KernelPlan, text: str) -> list[str]:
    """The device functions, with the kernel for few queries where the plan is one."""
    if not plan.is_few:
        return [text]
    kept = [function for name, function in _functions(text).items() if name not in ("attention_forward", "find_tile", "store_rows")]
    portions = _functions(_sections("portions.py")["portions"])
    if not plan.split:
        del portions["join_portions"]
    return [*kept, _idle(), *portions.values(), _sections("forward_few.py")["few queries"]]


def _idle() -> str:
    """The function that says whether a kernel's partner does the work."""
    return _functions(_sections("backward.py")["functions"])["is_idle"]


def _launcher(plan: KernelPlan, text: str) -> list[str]:
    """The host functions that go with it."""
    if not plan.is_few:
        return [text]
    kept = {name: function for name, function in _functions(text).items() if name not in ("forward", "attention", "resident_heads")}
    few = _functions(_branches(_sections("few_launcher.py")["functions"], "SPLIT", plan.split))
    if plan.split:
        kept["processors"] = _functions(_sections("hopper_turns.py")["functions"])["processors"]
        kept["portions"] = _sections("portions.py")["functions"]
    else:
        del few["portions_of"]
    return [*kept.values(), *few.values(), _functions(text)["attention"]]


def assemble_tiles(
    *, axis: str, block_q: int, block_kv: int, mask: str, box: str | None, bounds: Sequence[tuple[int, ...]], header: Sequence[str] = ()
) -> str:
    """The source of the planning kernel for tiles of these sizes, with `tiles` and `pack` to call.

    `axis` is "row" (owner blocks are blocks of queries) or "column"; `mask` is a text from `emit_function`, `box` one of a device
    function `box_test(tables, numbers, b, h, q_idx, kv_idx, q_len, kv_len)` from `emit_values` or None; `bounds` holds for each hull the
    tables that must ascend for it. Raises ValueError for another axis, and for blocks of more than 8192 queries or keys.
    """
    if axis not in ("row", "column"):
        raise ValueError(f"a map is by rows or by columns: axis is 'row' or 'column', not {axis!r}")
    if not 1 <= min(block_q, block_kv) <= max(block_q, block_kv) <= MOST_IN_BLOCK:
        raise ValueError(f"the planning kernel takes blocks of 1 to {MOST_IN_BLOCK}; got {block_q} x {block_kv}")
    template, launcher = _sections("tiles.py"), _functions(_sections("launcher.py")["functions"])
    defaults = _functions(template["mods"])
    mods = [mask, box or defaults["box_test"], _distrusted(bounds) if any(bounds) else defaults["distrusted"]]
    imports = _comments([*header, f"tiles of {block_q} x {block_kv}, by {axis}"]) + "\nimport triton\nimport triton.language as tl\n"
    sizes = _tile_sizes(template["sizes"], axis, block_q, block_kv, box is not None, len(bounds))
    return _join([f"{imports}\n{sizes.lstrip()}", *_helpers(mods), *mods, template["functions"], launcher["pack"]])


def _tile_sizes(text: str, axis: str, block_q: int, block_kv: int, boxed: bool, hulls: int) -> str:
    """The planning kernel's constants. Evaluated together: 1024 places on lines, as in a strip."""
    padded_q, padded_kv = (1 << (n - 1).bit_length() for n in (block_q, block_kv))
    values = {
        "AXIS": axis, "BLOCK_Q": block_q, "BLOCK_KV": block_kv, "PADDED_Q": padded_q, "PADDED_KV": padded_kv, "BOXED": boxed,
        "HULLS": hulls, "GROUP": min(max(512 // max(padded_q, padded_kv), 2), 8), "STRIP": min(max(1024 // padded_kv, 1), padded_q),
    }  # fmt: skip
    return _fill(text, values)


def _distrusted(bounds: Sequence[tuple[int, ...]]) -> str:
    """The text of the function that looks at the flags of the tables which each hull needs."""
    lines = [
        "@triton.jit",
        "def distrusted(broken, HULL: tl.constexpr):",
        '    """Not 0 where a table that the hull needs does not ascend."""',
        "    found = 0",
    ]
    for hull, tables in enumerate(bounds):
        if tables:
            lines += [f"    if HULL == {hull}:", f"        found = {' | '.join(f'tl.load(broken + {1 + t})' for t in tables)}"]
    return "\n".join([*lines, "    return found"])


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
        "TMA": plan.loads == "tma", "MAP_FORM": plan.map_form, "PIECES": plan.pieces, "BITS": plan.bits, "STARTS": plan.starts,
        "RUNS": plan.runs, "SCORE": plan.score, "PRECISION": plan.precision, "PACK": plan.pack, "SPLIT": plan.split,
    }  # fmt: skip
    return _fill(text, values)


def _fill(text: str, values: dict[str, object]) -> str:
    """The template's constants with these values."""
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


def _branches(text: str, name: str, value: bool) -> str:
    """The text with one branch of every `if` that asks for a constant of this name and value."""
    lines = text.split("\n")
    branches = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.If)]
    for node in sorted(branches, key=lambda node: -node.lineno):  # from below, so that numbers of lines stay true
        test = node.test.operand if isinstance(node.test, ast.UnaryOp) else node.test
        if not isinstance(test, ast.Name) or test.id != name:
            continue
        otherwise = (node.body[-1].end_lineno or 0) + 1  # the line of `else`, if there is one
        taken = lines[node.lineno : otherwise - 1] if value == (test is node.test) else lines[otherwise : node.end_lineno]
        lines[node.lineno - 1 : node.end_lineno] = [line[4:] for line in taken]
    return "\n".join(lines)


@lru_cache(maxsize=8)
def _sections(name: str) -> dict[str, str]:
    """The parts of a template between its `# ---- title` lines."""
    parts = _MARKER.split((HERE / name).read_text(encoding="utf-8"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))
