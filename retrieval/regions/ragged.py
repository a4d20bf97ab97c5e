"""Sets of different sizes in one file: an image's rows lie one after another, and offsets say where each begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import numpy as np


class Ragged:
    """n sets of vectors that stay where `rows` are, on the disk if that is a memory map.

    Args:
        rows: (N, D), the vectors of all sets.
        starts: (n,) int64, the first row of each set.
        stops: (n,) int64, one past its last row.
    """

    def __init__(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
        self.rows, self.starts, self.stops = rows, starts, stops

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Ragged: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Ragged:
        """Set `index`, (K, D); or the sets of a slice."""
        if isinstance(index, slice):
            return Ragged(self.rows, self.starts[index], self.stops[index])
        return self.rows[self.starts[index] : self.stops[index]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    @property
    def dtype(self) -> np.dtype:
        return self.rows.dtype

    @property
    def sizes(self) -> np.ndarray:
        """(n,) int64, how many vectors each set has."""
        return self.stops - self.starts
