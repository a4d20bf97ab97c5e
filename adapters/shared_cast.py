"""One copy of an activation in autocast's dtype for all layers that read it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


class _Last(threading.local):
    """What this thread cast last, and the copy. Weak: the copy lives as long as a layer keeps it for backward."""

    source: TensorWeakRef | None = None
    version: int = 0
    copy: TensorWeakRef | None = None


_last = _Last()


def shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., d) -> (N, d) in `dtype`: the same tensor for all layers that read one x in turn, a block's q, k and v.

    Autocast makes a copy for each of them, and each is kept until the backward pass. Shared are only copies of what an
    operation with a gradient has made: an input of the model may be filled anew without a trace. A compiler finds equal
    casts by itself.
    """
    if torch.compiler.is_compiling() or x.dtype == dtype or x.grad_fn is None or not torch.is_grad_enabled():
        return x.to(dtype).reshape(-1, x.shape[-1])
    if _last.source is not None and _last.copy is not None and _last.source() is x and _last.version == x._version:
        copy = _last.copy()
        if copy is not None and copy.dtype == dtype:
            return copy
    copy = x.to(dtype).reshape(-1, x.shape[-1])
    _last.source, _last.version, _last.copy = TensorWeakRef(x), x._version, TensorWeakRef(copy)
    return copy
