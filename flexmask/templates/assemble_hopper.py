"""The source of a Hopper forward kernel: one self-contained file, from a plan, the emitted score mod, and the templates' own text."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from ..lowering.plan_hopper import HopperPlan
from .assemble import _branches, _comments, _functions, _helpers, _idle, _join, _sections

HOPPER_IMPORTS = """import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor
"""
# what the host side takes from the plain kernel's
_HOST = ("pack", "fits_tma", "describe", "resident_heads", "strides", "results_of", "without_keys", "rising")


def assemble_hopper(plan: HopperPlan, score: str | None = None, header: Sequence[str] = ()) -> str:
    """The source of a kernel module for `plan`, with `forward` and `pack` to call.

    `score` is a text from `emit_function`; `header` are lines about the mods, written as comments. Raises ValueError where the plan needs
    a score mod's text that is not given, and where that text calls what Gluon has not.

    >>> from flexmask.lowering.plan_hopper import plan_hopper
    >>> assemble_hopper(plan_hopper(128)).splitlines()[0]
    '# plan: hopper forward D128 bfloat16 sm_90, no mask, tiles 128x128, 2 stages, queue, 232/40 registers'
    """
    if plan.score != (score is not None):
        raise ValueError(f"the plan has{' a' if plan.score else ' no'} score mod, but {'none' if score is None else 'one'} was given")
    shared, given, launcher = _sections("hopper.py"), _sections("hopper_forward_plan.py"), _sections("hopper_launcher.py")
    host = _sections("launcher.py")
    functions = _functions(host["functions"])
    helpers = [in_gluon(text) for text in _helpers([score] if score else [])]
    mods = [in_gluon(score)] if score else [given["mods"]]
    imports = HOPPER_IMPORTS
    if plan.split or any(re.search(r"\btl\.", text) for text in helpers + mods):  # what Gluon has no name of its own for
        imports = imports.replace("import triton\n", "import triton\nimport triton.language as tl\n")
    wide = ["constants of wide plans"] * plan.wide
    constants = "".join(given[title] for title in ["constants of the plan", *wide, "kernel"])
    parts = [
        _comments([*header, f"plan: {plan}"]) + "\n" + imports,
        shared["names"],
        decided(fill(constants, _values(plan)), plan.wide),
        *([shared["numbers"]] if score else []),
        *helpers,
        *mods,
        *(shared[name] for name in ("barriers", "turns", "halves", "bits", "cuts")),
        *[_sections("hopper_forward_wide.py")["functions of wide plans"]] * plan.wide,
        *[decided(_sections("hopper_forward_portion.py")["functions of split plans"], plan.wide)] * plan.split,
        decided(_sections("hopper_forward_load.py")["the warp that loads"], plan.wide, plan.split),
        decided(_sections("hopper_forward_softmax.py")["scores"], plan.wide),
        decided(_sections("hopper_forward.py")["functions"], plan.wide, plan.split),
        *_portions(plan),
        host["constants"],
        *(functions[name] for name in _HOST),
        _sections("hopper_turns.py")["functions"],
        decided(launcher["functions"], plan.wide, plan.split),
    ]
    return _join(parts)


def _portions(plan: HopperPlan) -> list[str]:
    """What adds up the portions of a tile row, and its host side, where rows are split: plain Triton's."""
    if not plan.split:
        return []
    portions, add_sink = _sections("portions.py"), _functions(_sections("forward.py")["functions"])["add_sink"]
    return [_idle(), add_sink, portions["portions"], portions["functions"]]


def _values(plan: HopperPlan) -> dict[str, object]:
    """The template's constants by name."""
    wide = {"WIDE": True, "PART": plan.part} if plan.wide else {}
    return wide | {
        "HEAD_DIM": plan.head_dim, "V_HEAD_DIM": plan.v_head_dim, "PADDED_DIM": plan.padded_dim, "PADDED_V_DIM": plan.padded_v_dim,
        "DTYPE": Code(f"gl.{plan.dtype}"), "BLOCK_Q": plan.block_q, "BLOCK_KV": plan.block_kv, "STAGES": plan.stages,
        "Q_STAGES": plan.q_stages, "SCHEDULE": plan.schedule, "CONSUMER_REGISTERS": plan.consumer_registers,
        "PRODUCER_REGISTERS": plan.producer_registers, "MAP_FORM": plan.map_form, "PIECES": plan.pieces, "CROSSED": plan.crossed,
        "BITS": plan.bits, "STARTS": plan.starts, "RUNS": plan.runs, "SCORE": plan.score,
        "PACK": plan.pack, "SPLIT": plan.split,
    }  # fmt: skip


@lru_cache(maxsize=64)
def decided(text: str, wide: bool, split: bool = False) -> str:
    """The text with one branch of every `if WIDE:`, `if not WIDE:` and its `else`, and of the same with SPLIT.

    >>> print(decided("if WIDE:\\n    load_parts()\\nelse:\\n    # all at once\\n    load()\\nwait()", False))
    # all at once
    load()
    wait()
    """
    return _branches(_branches(text, "SPLIT", split), "WIDE", wide)


class Code(str):
    """A value of a constant that is text of the program."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def fill(text: str, values: Mapping[str, object]) -> str:
    """A Gluon template's constants with these values."""
    for name, value in values.items():
        shown = f'"{value}"' if isinstance(value, str) and not isinstance(value, Code) else repr(value)
        text, found = re.subn(rf"^{name} = gl\.constexpr\(.*\)$", f"{name} = gl.constexpr({shown})", text, flags=re.MULTILINE)
        assert found == 1, name
    return text


# what emitted functions call of Triton's language that Gluon has by the same name
_SAME = {
    "abs", "ceil", "div_rn", "erf", "exp", "exp2", "float16", "float32", "float64", "bfloat16", "floor", "int1", "int8", "int16", "int32",
    "int64", "uint8", "load", "log", "log2", "maximum", "minimum", "sqrt_rn", "static_range", "where", "constexpr",
}  # fmt: skip


def in_gluon(text: str) -> str:
    """Device functions of Triton as ones of Gluon: the same text by other names. Raises ValueError for what Gluon has not.

    >>> print(in_gluon("@triton.jit\\ndef half(x):\\n    return tl.exp2(x) * tl.full((), 0.5, tl.float32)"))
    @gluon.jit
    def half(x):
        return gl.exp2(x) * number_of(0.5, gl.float32)
    """
    text = re.sub(r"\btl\.full\(\((?:1, 1)?\), ", "number_of(", text.replace("@triton.jit", "@gluon.jit"))
    used = {
        n.attr for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "tl"
    }
    unknown = used - _SAME - {"PropagateNan"}
    if unknown:
        raise ValueError(f"the score mod calls {', '.join(sorted(unknown))}, which Gluon has not. Use a KernelPlan.")
    return re.sub(r"\btl\.(?!PropagateNan)", "gl.", text)
