"""Which linear maps an adapter can go on: they are called, and compute what torch's own do.

A branch on a layer whose weight another module reads would train and count for nothing; one on a layer with a forward
of its own would take the place of that forward.
"""

from __future__ import annotations

from torch import nn

# Class -> its layers whose weight it hands to a function and never calls. By name, so that no library is imported.
READ = {
    "ShiftedWindowAttention": ("qkv", "proj"),  # torchvision's Swin, v2 included
    "ShiftedWindowAttention3d": ("qkv", "proj"),  # and for videos
    "AttentionPool2d": ("q_proj", "k_proj", "v_proj", "c_proj"),  # open_clip's ResNets
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),  # transformers
}
# Forwards of other libraries that compute what the adapted module does.
SAME = (
    "timm.layers.linear.Linear.forward",
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward",
    "open_clip.transformer.Attention.forward",
)


def never_called(module: nn.Module) -> set[nn.Module]:
    """The children of `module` whose weight it reads and which it never calls."""
    names = {name for kind in type(module).__mro__ for name in READ.get(kind.__name__, ())}
    if isinstance(getattr(module, "q_bias", None), nn.Parameter):
        names |= {"qkv", "in_proj"}  # timm's BEiT, EVA and Swin v2, DeBERTa: they add biases of their own
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is None:
        names |= {"out_proj"}  # with kdim or vdim it has nothing that could be adapted, and stays a stock module
    return {child for name, child in module.named_children() if name in names}


def has_own_forward(module: nn.Module) -> bool:
    """Whether a linear layer or an attention computes something else than torch's (open_clip's) own."""
    if "forward" in vars(module):  # replaced on the instance, as accelerate's hooks do
        return True
    forward = getattr(module, "stock_class", type(module)).forward
    known = forward in (nn.Linear.forward, nn.MultiheadAttention.forward)
    return not known and f"{forward.__module__}.{forward.__qualname__}" not in SAME
