"""In which order Hopper kernels take lines of tiles: the host's part. Copied into generated files, whose kernels ask `find_turn`."""

import torch

# ---- functions


def processors(device):
    """How many programs run at a time on a GPU: one a multiprocessor, as each takes most of the shared memory."""
    if device.type != "cuda":
        return 1  # where a kernel is only compiled, for a GPU that is not here
    return torch.cuda.get_device_properties(device).multi_processor_count


def long_level(resident, programs):
    """Which level behind an order of lines (`lists.order_lines`) tells of those with more work than each program has while `resident` heads
    are walked: begun with the last heads, such a line would end after all the others."""
    return min(8, ((256 * resident - 1) // programs).bit_length())
