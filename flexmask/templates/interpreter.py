"""Triton's interpreter (TRITON_INTERPRET=1), made to run with numpy 2.4 and later, and to keep comparisons bools."""

from __future__ import annotations

from typing import Any


def repair_interpreter() -> None:
    """Let scalars bound loops: the interpreter keeps them as arrays of one element, which numpy 2.4 no longer turns into numbers.
    Let comparisons of floats be joined: it takes them for floats, on which `&` and `|` fail."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    if getattr(original, "repaired", False):
        return

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch
    _keep_bools(interpreter)


def _keep_bools(interpreter: Any) -> None:
    builder, bools = interpreter.InterpreterBuilder, interpreter.tl.int1
    compute = builder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        output = op(lhs.data, rhs.data)
        return interpreter.TensorHandle(output, bools) if output.dtype == bool else compute(self, lhs, rhs, op)

    builder.binary_op = binary_op
