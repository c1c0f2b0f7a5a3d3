"""From facts to a kernel's plan, and from expressions to the text of small device functions."""

from .captures import CaptureSpec, TensorSpec
from .emit import emit_function
from .plan import KernelPlan, plan_forward, shrink
from .torch_text import emit_row_bounds

__all__ = ["CaptureSpec", "KernelPlan", "TensorSpec", "emit_function", "emit_row_bounds", "plan_forward", "shrink"]
