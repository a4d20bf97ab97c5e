"""ReSoRA: what is penalised. Measures of redundancy between the rank-1 subspaces of a low-rank update.

from regularizers import ReSoRA
resora = ReSoRA("linear", weight=1e-2)
with resora.capture(model) as subspaces:
    loss = model(inputs)
loss = loss + sum(resora(subspaces).values())
"""

from __future__ import annotations

from regularizers.capture import capture
from regularizers.cosine import cosine
from regularizers.diagnostics import dead_components, effective_rank, mean_redundancy, redundancy
from regularizers.euclidean import euclidean
from regularizers.linear import linear
from regularizers.nonlinear import nonlinear
from regularizers.overlap import overlap
from regularizers.resora import REGULARIZERS, ReSoRA
from regularizers.subspaces import Captured, Subspaces

__all__ = [
    "REGULARIZERS",
    "Captured",
    "ReSoRA",
    "Subspaces",
    "capture",
    "cosine",
    "dead_components",
    "effective_rank",
    "euclidean",
    "linear",
    "mean_redundancy",
    "nonlinear",
    "overlap",
    "redundancy",
]
