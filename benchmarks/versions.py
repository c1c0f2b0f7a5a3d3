"""What a figure was measured with."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("triton", "fa3-fwd", "flash-attn-4", "nvidia-cutlass-dsl")


@cache
def versions() -> dict[str, str]:
    commit = _told("git", "describe", "--always", "--dirty")
    found = {"date": datetime.date.today().isoformat(), "commit": commit, "python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        driver = _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return {**found, "gpu": torch.cuda.get_device_name(), "driver": driver}
    return {**found, "gpu": f"none, {platform.machine()}"}


def _told(*command: str) -> str:
    """The first line that a command prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""
