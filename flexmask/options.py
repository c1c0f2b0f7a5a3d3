"""Environment variables, read in this file alone.

FLEXMASK_CACHE_DIR   where generated kernels and derived facts are kept between processes (default: the user's cache directory)
FLEXMASK_DEBUG       0 nothing; 1 the path chosen and why; 2 also facts and maps; 3 also every pass; 4 also file paths;
                     from 1 on, tensors promised to ascend (flexmask.sorted) are looked through whenever a map is built from them
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import FlexmaskError


@dataclass(frozen=True)
class Options:
    """Settings of the process: `cache_dir` (None: the user's cache directory) and `debug` (0 to 4)."""

    cache_dir: str | None = None
    debug: int = 0


def read_options() -> Options:
    """The options as the environment states them now. Raises FlexmaskError for a debug level that is no number from 0 to 4."""
    level = os.environ.get("FLEXMASK_DEBUG", "0") or "0"
    if level not in {"0", "1", "2", "3", "4"}:
        raise FlexmaskError(f"FLEXMASK_DEBUG is a number from 0 to 4, got {level!r}.")
    return Options(os.environ.get("FLEXMASK_CACHE_DIR") or None, int(level))
