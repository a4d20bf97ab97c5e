"""Write a .npy file of any size row by row, without holding it in memory."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType

import numpy as np

HEADER = 128  # bytes; the shape is known, and written, last


class FeatureFile:
    """Rows (N, D) that can be written in any order; the file appears under its name when it is finished.

    Args:
        path: of the .npy file; until then there is `<path>.partial`.
        width: D.
        half: store float16 instead of float32.
        keep_rows: rows of a partial file of before that stay; 0 begins anew.

    Raises:
        ValueError: if a partial file with so many rows is not there.
    """

    def __init__(self, path: Path, width: int, *, half: bool = False, keep_rows: int = 0) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.width, self.dtype = width, np.dtype("<f2" if half else "<f4")
        if keep_rows and self.rows_there(path, width, half=half) < keep_rows:
            raise ValueError(f"{self.partial} holds less than the {keep_rows} rows to go on from; delete it")
        self.file = self.partial.open("r+b" if keep_rows else "w+b")

    @staticmethod
    def rows_there(path: Path, width: int, *, half: bool = False) -> int:
        """How many whole rows a partial file of before holds."""
        partial = path.with_name(path.name + ".partial")
        size = partial.stat().st_size if partial.is_file() else 0
        return max(size - HEADER, 0) // (width * (2 if half else 4))

    def write(self, row: int, block: np.ndarray) -> None:
        """Store `block` (K, D) from `row` on.

        Raises:
            ValueError: if it has another width, or a value that is not finite (or too large for float16).
        """
        if block.ndim != 2 or block.shape[1] != self.width:
            raise ValueError(f"features of shape {block.shape} do not fit a file of {self.width} numbers a region")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(block, dtype=self.dtype)
        if not np.isfinite(stored).all():
            raise ValueError(f"features hold a NaN, or a number beyond {np.finfo(self.dtype).max:g} ({self.dtype})")
        self.file.seek(HEADER + row * self.width * self.dtype.itemsize)
        self.file.write(stored.data)

    def flush(self) -> None:
        self.file.flush()

    def finish(self, shape: tuple[int, ...]) -> None:
        """Write the header for an array of `shape`, (n, K, D) or (N, D), and give the file its name."""
        content = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        magic = np.lib.format.magic(1, 0)
        text = repr(content).ljust(HEADER - len(magic) - 3) + "\n"
        self.file.seek(0)
        self.file.write(magic + struct.pack("<H", len(text)) + text.encode("ascii"))
        self.file.truncate(HEADER + int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)

    def __enter__(self) -> FeatureFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
