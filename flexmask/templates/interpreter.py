"""Triton's interpreter (TRITON_INTERPRET=1), made to run with numpy 2.4 and later."""

from __future__ import annotations

from typing import Any


def repair_interpreter() -> None:
    """Let scalars bound loops: the interpreter keeps them as arrays of one element, which numpy 2.4 no longer turns into numbers."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    if getattr(original, "repaired", False):
        return

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch
