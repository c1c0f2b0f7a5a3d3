"""From facts to a kernel's plan, and from expressions to the text of small device functions."""

from .body import is_gathered
from .captures import CaptureSpec, TensorSpec
from .emit import emit_function, emit_values
from .emit_column import crowds_registers, emit_column
from .emit_gradient import emit_gradient, gradient_tables, most_additions
from .plan import KernelPlan, plan_forward, shrink
from .plan_backward import BackwardPlan, plan_backward
from .plan_hopper import HopperPlan, plan_hopper
from .plan_hopper_backward import HopperBackwardPlan, plan_hopper_backward
from .torch_text import emit_row_bounds
from .tuned import Plan, candidates, from_table

__all__ = [
    "BackwardPlan", "CaptureSpec", "HopperBackwardPlan", "HopperPlan", "KernelPlan", "Plan", "TensorSpec", "candidates",
    "crowds_registers", "emit_column", "emit_function", "emit_gradient", "emit_row_bounds", "emit_values", "from_table", "gradient_tables",
    "is_gathered", "most_additions", "plan_backward", "plan_forward", "plan_hopper", "plan_hopper_backward", "shrink",
]  # fmt: skip
