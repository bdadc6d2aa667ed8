"""Locks that go with the process that holds them, however it ends.

Where the system has none (Windows, some network file systems) nothing waits and nothing is cleared;
shards are still whole, and only workers on the same shard whose masks differ could meet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_GRACE_S = 600.0  # for where locks are not seen from other machines: writing goes on, and shows


def hold(file: IO[Any]) -> bool:
    """Mark an open file as being written; False if another process does, or locks are lacking."""
    return _lock(file, wait=False)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time through."""
    with path.open("ab") as file:
        _lock(file, wait=True)
        yield


def clear_leftovers(directory: Path, grace_s: float = _GRACE_S) -> int:
    """Delete the temporary files of a data set that no living process is writing.

    Args:
        directory: The data set's folder.
        grace_s: What was written to since stays.

    Returns:
        How many were deleted.
    """
    cleared = 0
    for path in (directory / ".tmp").glob("*-*"):
        try:
            if time.time() - path.stat().st_mtime < grace_s:
                continue
            with path.open("rb") as file:
                if hold(file):
                    path.unlink()
                    cleared += 1
        except FileNotFoundError:  # its writer was faster
            continue
    return cleared


def _lock(file: IO[Any], wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another's, or a file system without locks
        return False
    return True
