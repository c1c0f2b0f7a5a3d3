"""The disk cache: text and numbers only, in a directory that nobody but the user can write, each file moved into place whole."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from ..errors import BackendError


class DiskCache:
    """Texts by key. Kernels kept here are run later, so an unsafe directory is refused, not used."""

    def __init__(self, directory: str | None = None):
        self.directory = _private_directory(directory)

    def path(self, key: str, suffix: str) -> Path:
        return self.directory / f"{key}{suffix}"

    def get(self, key: str, suffix: str) -> str | None:
        try:
            return self.path(key, suffix).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def put(self, key: str, suffix: str, text: str) -> Path:
        """Write under a lock, to a temporary file that is then moved into place: readers see all of it or nothing."""
        from filelock import FileLock  # only writers pay for the import

        target = self.path(key, suffix)
        with FileLock(str(self.directory / ".lock")):
            handle, temporary = tempfile.mkstemp(dir=self.directory, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(temporary, target)
            except BaseException:
                os.unlink(temporary)
                raise
        return target


def _private_directory(directory: str | None) -> Path:
    if directory is not None:
        return _checked(Path(directory))
    import platformdirs

    try:
        return _checked(Path(platformdirs.user_cache_dir("flexmask", appauthor=False)))
    except OSError:  # no writable home: this process still works, the next one starts cold
        return Path(tempfile.mkdtemp(prefix="flexmask-"))


def _checked(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix":
        info = path.stat()
        if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise BackendError(
                f"the cache directory {path} can be written by other users, and kernels in it would be run. "
                "Make it yours alone (chmod 700), or set FLEXMASK_CACHE_DIR to a directory that is."
            )
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is not writable")
    return path
