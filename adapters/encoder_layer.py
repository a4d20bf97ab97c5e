"""torch's `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` with an adapter in them.

In evaluation, where its own weights are frozen, a layer takes a "fast path" that reads the weights of its layers itself
and calls none of them: an adapter would train, and count for nothing afterwards. It takes that path only while its
`activation_relu_or_gelu` is not 0, which is how it is told not to. The encoder hands its layers nested tensors, which
that path alone understands, while its `use_nested_tensor` holds.
"""

from __future__ import annotations

from torch import nn

from adapters.extend import Extension

SWITCHES: tuple[tuple[type[nn.Module], str, int | bool], ...] = (  # class, its attribute, the value of it that is "off"
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
KEPT = "_kept_of_fast_path"


def leave_fast_path(model: nn.Module) -> None:
    """Make every encoder and encoder layer that holds an adapted module call its layers in evaluation too."""
    for module in model.modules():
        for kind, switch, off in SWITCHES:
            if isinstance(module, kind) and any(isinstance(m, Extension) for m in module.modules()):
                object.__setattr__(module, KEPT, getattr(module, switch))
                setattr(module, switch, off)


def return_to_fast_path(model: nn.Module) -> None:
    """Undo `leave_fast_path`."""
    for module in model.modules():
        for kind, switch, _ in SWITCHES:
            if isinstance(module, kind) and KEPT in vars(module):
                setattr(module, switch, vars(module)[KEPT])
                delattr(module, KEPT)
