"""An expression as the text of small Triton device functions, named as the user named things.

`mask_row(tables, numbers, b, h, q_idx)` computes what depends on the query row only, once a tile row;
`mask_mod(tables, numbers, row, b, h, q_idx, kv_idx)` the rest, once a tile; a score mod likewise, with `score` after `row`.
Indices are int32: b and h numbers, q_idx [BLOCK_Q, 1], kv_idx [1, BLOCK_KV]. `emit_values` writes several expressions as one function.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir import Expr, show, walk
from .body import LINE, Body, Row, write_function, write_result, write_tuple
from .captures import CaptureSpec
from .rules import loose


def emit_function(name: str, expr: Expr, captures: CaptureSpec, kind: str) -> str:
    """The text of two device functions, `{kind}_row` and `{kind}_mod`, for `expr`; kind is "mask" or "score".

    `name` is the user's name for the mod, for the docstrings. Raises BackendError for the lengths, which the functions are not given.

    >>> from flexmask.ir import Q, K
    >>> print(emit_function("causal", Q >= K, CaptureSpec(), "mask").split("return")[-1].strip())
    kv_idx <= q_idx
    """
    title = _comment(name)[:80]
    row = Row.of(expr, captures)
    row_head = f"{kind}_row(tables, numbers, b, h, q_idx)"
    row_text = write_function(row_head, f"What `{title}` needs of a query row.", row.lines, write_tuple(row.names))
    body = Body(captures, ("b", "h", "q_idx", "kv_idx", "score")[: 5 if kind == "score" else 4], frozenset(), row.given)
    lines = body.lines([expr])
    head = f"{kind}_mod(tables, numbers, row, {'score, ' if kind == 'score' else ''}b, h, q_idx, kv_idx)"
    doc = f"`{title}`: {_shown(expr, captures)}"
    mod_text = write_function(head, doc, row.unpacked + lines, write_result(body.done[expr], kind))
    return f"{row_text}\n\n\n{mod_text}"


def emit_values(name: str, parameters: str, exprs: Sequence[Expr], captures: CaptureSpec, doc: str) -> str:
    """The text of a device function `{name}(tables, numbers, {parameters})` that returns a tuple of one value for each of `exprs`.

    `parameters` names indices, "b, h, q_idx, q_len, kv_len" for example: int32 numbers or tensors that broadcast. Integers come back
    as int32 or int64, bools as int1, floats as float32, each as wide as what it is computed from. What several expressions share is
    computed once. `doc` becomes the docstring. Raises BackendError for an index that is no parameter.

    >>> from flexmask.ir import Q, const
    >>> print(emit_values("bounds", "q_idx", (const(0), Q + 1), CaptureSpec(), "Kept keys."))
    @triton.jit
    def bounds(tables, numbers, q_idx):
        \"\"\"Kept keys.\"\"\"
        return (tl.full((), 0, tl.int32), q_idx + 1)
    """
    body = Body(captures, tuple(parameters.split(", ")), frozenset(), {})
    lines = body.lines(list(exprs))
    results = [loose(body.done[e]).text for e in exprs]
    text = write_tuple(results)
    if len(results) > 1 and len(text) > LINE:
        text = "(\n        " + ",\n        ".join(results) + ",\n    )"
    return write_function(f"{name}(tables, numbers, {parameters})", _comment(doc, '"\\'), lines, text)


def _shown(expr: Expr, captures: CaptureSpec) -> str:
    """The expression as text, unless sharing makes its text much longer than itself."""
    size: dict[Expr, int] = {}
    for node in walk(expr):
        size[node] = 1 + sum(size[a] for a in node.args)
    return show(expr, captures.identifiers) if size[expr] <= 300 else f"an expression of {len(size)} operations"


def _comment(text: str, unwanted: str = "\"'`\\") -> str:
    """Text as it may stand in a docstring: one line, printable, without what would end or escape it."""
    return "".join(c if c.isprintable() and c not in unwanted else "?" for c in text)
