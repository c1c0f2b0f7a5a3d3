"""Triton's interpreter (TRITON_INTERPRET=1), made to run with numpy 2.4 and later, and to keep comparisons bools."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def repair_interpreter() -> None:
    """Let scalars bound loops: the interpreter keeps them as arrays of one element, which numpy 2.4 no longer turns into numbers.
    Let comparisons of floats be joined: it takes them for floats, on which `&` and `|` fail. Let `functions.gather` be the load that it is
    in assembly, which is not interpreted."""
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
    _gather(interpreter)


def _keep_bools(interpreter: Any) -> None:
    builder, bools = interpreter.InterpreterBuilder, interpreter.tl.int1
    compute = builder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        output = op(lhs.data, rhs.data)
        return interpreter.TensorHandle(output, bools) if output.dtype == bool else compute(self, lhs, rhs, op)

    builder.binary_op = binary_op


def _gather(interpreter: Any) -> None:
    builder = interpreter.InterpreterBuilder

    def create_inline_asm(self: Any, text: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> Any:
        if "ld.global" not in text:
            raise NotImplementedError(f"the interpreter runs no assembly: {text}")
        address, inside = values
        entry = types[0]
        pointers = interpreter.TensorHandle(address.data.astype("uint64"), interpreter.tl.pointer_type(entry))
        found = self.create_masked_load(pointers, interpreter.TensorHandle(inside.data != 0, interpreter.tl.int1), None, None, None, False)
        return SimpleNamespace(get_result=lambda number: found)

    builder.create_inline_asm = create_inline_asm
