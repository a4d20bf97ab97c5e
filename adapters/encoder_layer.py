"""torch's `nn.TransformerEncoderLayer` with an adapter in it.

In evaluation, where its own weights are frozen, it takes a "fast path" that reads the weights of its layers itself and
calls none of them: an adapter would train, and count for nothing afterwards. A layer takes that path only while its
`activation_relu_or_gelu` is not 0, which is how it is told not to.
"""

from __future__ import annotations

from torch import nn

from adapters.extend import Extension

KEPT = "_activation_of_fast_path"


def leave_fast_path(model: nn.Module) -> None:
    """Make every encoder layer that holds an adapted module call its layers in evaluation too."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and any(isinstance(m, Extension) for m in layer.modules()):
            object.__setattr__(layer, KEPT, layer.activation_relu_or_gelu)
            layer.activation_relu_or_gelu = 0


def return_to_fast_path(model: nn.Module) -> None:
    """Undo `leave_fast_path`."""
    for layer in model.modules():
        if KEPT in vars(layer):
            layer.activation_relu_or_gelu = vars(layer)[KEPT]
            delattr(layer, KEPT)
