"""Every error flexmask raises on purpose, and how it points at the user's line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """A place in the user's source: file, 1-based line, 0-based [column, end_column) of that line, and the line itself."""

    file: str
    line: int
    column: int = 0
    end_column: int = 0
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def render(self) -> str:
        """`file:line`, the source line, and carets under the expression (two lines fewer when the source is not at hand)."""
        if not self.text.strip():
            return str(self)
        code = self.text.rstrip("\n")
        indent = len(code) - len(code.lstrip())
        width = max(1, self.end_column - self.column)
        caret = " " * max(0, self.column - indent) + "^" * width
        return f"{self}\n    {code.strip()}\n    {caret}"


class FlexmaskError(Exception):
    """Base of all errors raised by flexmask. `at` is the user's line where one is known."""

    def __init__(self, message: str, at: Location | None = None):
        super().__init__(message)
        self.message = message
        self.at = at

    def __str__(self) -> str:
        return self.message if self.at is None else f"{self.message}\n  at {self.at.render()}"


class TraceError(FlexmaskError):
    """A mask or score function does something that cannot be compiled; the message says what to write instead."""


class NotInterval(FlexmaskError):
    """The kept set of a row (or column) has no interval form; `reason` says why, `culprit` is the expression's text.

    The analysis *returns* it as a value (a "don't know" with a reason); the public API raises it.
    """

    def __init__(self, reason: str, culprit: str = "", at: Location | None = None):
        super().__init__(f"no interval form: {reason}" + (f" (in `{culprit}`)" if culprit else ""), at)
        self.reason = reason
        self.culprit = culprit


class PromiseError(FlexmaskError, ValueError):
    """A tensor that cannot be promised to ascend, or one that was promised and does not; see `flexmask.sorted`."""


class ConversionError(FlexmaskError, TypeError):
    """Something of another library's that cannot be taken over as a mask; the message says what to pass."""


class ShapeError(FlexmaskError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit together, or captures that an index would run out of."""


class BackendError(FlexmaskError, RuntimeError):
    """The chosen backend cannot do what was asked; never replaced by another backend silently."""
