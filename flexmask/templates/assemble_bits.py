"""One readable, self-contained Python file of the kernel that finds the bits of PARTIAL tiles; see `assemble`."""

from __future__ import annotations

from collections.abc import Sequence

from .assemble import _comments, _fill, _functions, _helpers, _join, _sections

# int32 words in a tile: a program holds them in registers
MOST_WORDS = 2048


def words_in_line(places: int) -> int:
    """How many int32 words hold a bit for each of so many places: the keys of a query in a tile, or by columns the queries of a key.

    >>> from flexmask.templates.assemble_bits import words_in_line
    >>> words_in_line(128), words_in_line(40)
    (4, 2)
    """
    return -(-places // 32)


def slots_for(pool: int) -> int:
    """How long the int64 `slots` should be for `pool` different tiles: at most half of the hash table is ever full.

    >>> from flexmask.templates.assemble_bits import slots_for
    >>> slots_for(4096), slots_for(1000)
    (8193, 2049)
    """
    return 1 + (1 << (2 * pool - 1).bit_length())


def assemble_bits(*, axis: str, block_q: int, block_kv: int, mask: str, header: Sequence[str] = ()) -> str:
    """The source of the bits kernel for tiles of these sizes, with `bits` and `pack` to call.

    `axis` is "row" (the map's lines are blocks of queries) or "column"; `mask` is a text from `emit_function`. Raises ValueError for
    another axis, and for tiles of more than MOST_WORDS words, which is 512 x 128 places.

    >>> from flexmask.ir import K, Q
    >>> from flexmask.lowering import CaptureSpec, emit_function
    >>> from flexmask.templates.assemble_bits import assemble_bits
    >>> mask = emit_function("dilated", (Q - K) % 3 < 1, CaptureSpec(()), "mask")
    >>> print(assemble_bits(axis="row", block_q=128, block_kv=64, mask=mask).splitlines()[0])
    # bits of tiles of 128 x 64, by row
    """
    if axis not in ("row", "column"):
        raise ValueError(f"a map is by rows or by columns: axis is 'row' or 'column', not {axis!r}")
    line, places, what = (block_q, block_kv, "keys") if axis == "row" else (block_kv, block_q, "queries")
    words = words_in_line(places)
    if min(block_q, block_kv) < 1 or line * words > MOST_WORDS:
        raise ValueError(f"tiles have 1 to {MOST_WORDS} words of 32 {what}; got {block_q} x {block_kv}, which takes {line} x {words} words")
    template, launcher = _sections("bits.py"), _functions(_sections("launcher.py")["functions"])
    padded = 1 << (line * words - 1).bit_length()
    values: dict[str, object] = {
        "AXIS": axis, "BLOCK_Q": block_q, "BLOCK_KV": block_kv, "WORDS": words, "SIZE": line * words, "PADDED": padded,
        "NUM_WARPS": min(max(padded // 64, 4), 8), "MOST_REGISTERS": 128 if padded <= 1024 else 255,
    }  # fmt: skip
    imports = (
        _comments([*header, f"bits of tiles of {block_q} x {block_kv}, by {axis}"]) + "\nimport triton\nimport triton.language as tl\n"
    )
    sizes = _fill(template["sizes"], values)
    return _join([f"{imports}\n{sizes.lstrip()}", *_helpers([mask]), mask, template["functions"], launcher["pack"]])
