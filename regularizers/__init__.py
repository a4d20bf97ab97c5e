"""ReSoRA: what is penalised. Measures of redundancy between the rank-1 subspaces of a low-rank update.

from regularizers import ReSoRA, capture
with capture(model) as subspaces:
    loss = model(inputs)
loss = loss + sum(ReSoRA("linear", weight=1e-2)(subspaces).values())
"""

from __future__ import annotations

from regularizers.diagnostics import mean_redundancy, redundancy
from regularizers.linear import linear
from regularizers.resora import REGULARIZERS, ReSoRA
from regularizers.subspaces import Subspaces, capture

__all__ = ["REGULARIZERS", "ReSoRA", "Subspaces", "capture", "linear", "mean_redundancy", "redundancy"]
