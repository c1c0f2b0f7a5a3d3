"""Where in the user's source something happened: noted cheaply as (code, instruction), resolved to a Location on demand."""

from __future__ import annotations

import functools
import linecache
import sys
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import Any

from ..errors import Location

Place = tuple[CodeType, int]  # a code object and the offset of an instruction in it

_OURS = ("flexmask.frontend", "flexmask.mods", "torch.", "contextlib")


def enter(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls the user's function; the search for the user's frame ends here, so that callers of flexmask are never blamed."""
    return function(*args, **kwargs)


def user_frame() -> FrameType | None:
    """The innermost frame of the user's code under `enter`; None where the operation was flexmask's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not enter.__code__:
        if not _is_ours(frame):
            return frame
        frame = frame.f_back
    return None


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__") or ""
    return name.startswith(_OURS) or name == "torch"


def in_traceback(traceback: TracebackType | None) -> Location | None:
    """The innermost line of the user's code that a traceback passed through."""
    place, inside = None, False
    while traceback is not None:
        frame = traceback.tb_frame
        inside = inside or frame.f_code is enter.__code__
        if inside and frame.f_code is not enter.__code__ and not _is_ours(frame):
            place = (frame.f_code, traceback.tb_lasti)
        traceback = traceback.tb_next
    return None if place is None else resolve(*place)


def positions(code: CodeType, offset: int) -> tuple[int | None, int | None, int | None, int | None]:
    """(line, end line, column, end column) of an instruction; columns count UTF-8 bytes, as in `ast`."""
    for number, found in enumerate(code.co_positions()):
        if number == offset // 2:
            return found
    return None, None, None, None


def resolve(code: CodeType, offset: int) -> Location:
    line, end_line, column, end_column = positions(code, offset)
    line = line or code.co_firstlineno
    text = linecache.getline(code.co_filename, line)
    if column is None or end_column is None:
        return _whole_line(code.co_filename, line, text)
    last = len(text.rstrip()) if end_line != line else _characters(text, end_column)
    return Location(code.co_filename, line, _characters(text, column), last, text)


def _whole_line(file: str, line: int, text: str) -> Location:
    return Location(file, line, len(text) - len(text.lstrip()), len(text.rstrip()), text)


def _characters(text: str, column: int) -> int:
    return len(text.encode()[:column].decode(errors="ignore"))


def definition(function: Any) -> Location | None:
    """The line on which a function (or the class of a callable object) is defined; None where Python does not know it."""
    while not hasattr(function, "__code__"):
        inner = _inside(function)
        if inner is None or inner is function:
            return None
        function = inner
    code = function.__code__
    line = code.co_firstlineno
    # decorators come before the `def` that the reader looks for
    while linecache.getline(code.co_filename, line).lstrip().startswith("@"):
        line += 1
    return _whole_line(code.co_filename, line, linecache.getline(code.co_filename, line))


def _inside(function: Any) -> Any:
    if isinstance(function, functools.partial):
        return function.func
    for name in ("__func__", "function", "inner"):
        if name in getattr(function, "__dict__", ()) or name == "__func__":
            found = getattr(function, name, None)
            if callable(found):
                return found
    call = vars(type(function)).get("__call__")
    return call if hasattr(call, "__code__") else None
