"""One process at a time writes a file that several may be asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def only_writer(lock: Path) -> Iterator[None]:
    """Hold `lock`, or say that another process does and wait for it. A process that is killed lets go of it."""
    held = FileLock(lock)
    try:
        held.acquire(timeout=1)
    except Timeout:
        warnings.warn(f"another process holds {lock}; waiting until it has finished", stacklevel=3)
        held.acquire()
    try:
        yield
    finally:
        held.release()
