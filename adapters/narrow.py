"""Cut a transformer block down to its strongest channels: how LST's side network gets its first values.

kept = strongest(residual_strength(blocks)[None], width // reduction)
side = [narrow(block, reduction, kept) for block in blocks]
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from adapters.targets import ROLES, Site, find_sites

# Sizes that attention keeps beside its weights (torch, timm, open_clip, transformers), and factors d_head^(-1/2).
SIZES = ("embed_dim", "kdim", "vdim", "attn_dim", "head_dim", "all_head_size", "attention_head_size")
SCALES = ("scale", "scaling")


def narrow(block: nn.Module, reduction: int, residual: Tensor) -> nn.Module:
    """A trainable copy of a block with 1 / `reduction` of its channels: those with the largest weights (sum of |w|).

    - The residual stream keeps the same channels, `residual`, in all blocks: rows of o and fc2, columns of q, k, v
      and fc1, and the entries of norms and layer scales.
    - Each head keeps the same number: for q and k by their rows together (they meet in a product), for v by its rows
      and the columns of o that read them.
    - fc1's hidden units are kept by their rows, and the columns of fc2 that read them.

    On the meta device there is nothing to compare; the shapes are the same.
    """
    side, width = copy.deepcopy(block), len(residual) * reduction
    maps = _cut_maps(side, width, reduction, residual)
    for module in side.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in maps:
                smaller = maps[parameter]
            elif parameter.shape == (width,):  # of a norm or a layer scale
                smaller = parameter[residual]
            else:
                raise ValueError(f"lst cannot cut a block's {type(module).__name__}.{name} {tuple(parameter.shape)}")
            setattr(module, name, nn.Parameter(smaller.detach().clone()))
        _resize(module, reduction)
    return side


def _cut_maps(block: nn.Module, width: int, reduction: int, residual: Tensor) -> dict[nn.Parameter, Tensor]:
    """The weight and the bias of each linear map in a block -> what is kept of them, see `narrow`."""
    sites = {site.role: site for site in find_sites(block, ROLES)}
    heads = number_of_heads(block)
    of_heads = (heads, width // heads)
    qk = strongest((rows(sites["q"]) + rows(sites["k"])).view(of_heads), of_heads[1] // reduction)
    vo = strongest((rows(sites["v"]) + columns(sites["o"])).view(of_heads), of_heads[1] // reduction)
    hidden = rows(sites["fc1"]) + columns(sites["fc2"])
    units = strongest(hidden[None], len(hidden) // reduction)
    written = {"q": qk, "k": qk, "v": vo, "o": residual, "fc1": units, "fc2": residual}
    read = {"q": residual, "k": residual, "v": residual, "o": vo, "fc1": residual, "fc2": units}

    cut: dict[nn.Parameter, Tensor] = {}
    for module in {site.module: None for site in sites.values()}:
        # Its roles, in the order of their rows, which are all that it has; those of a fused map read the same columns.
        roles = [role for role, site in sites.items() if site.module is module]
        kept_rows = torch.cat([sites[role].start + written[role] for role in roles])
        for name, parameter in module.named_parameters(recurse=False):
            kept = parameter[kept_rows]
            cut[parameter] = kept[:, read[roles[0]]] if name.endswith("weight") else kept
    return cut


def _resize(module: Any, reduction: int) -> None:
    """Sizes that a module notes beside its parameters."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(module.weight.shape)
    for name in SIZES:
        if isinstance(value := getattr(module, name, None), int):
            setattr(module, name, value // reduction)
    for name in SCALES:
        if isinstance(value := getattr(module, name, None), float):
            setattr(module, name, value * math.sqrt(reduction))


def number_of_heads(block: nn.Module) -> int:
    """Of a block's attention."""
    names = ("num_heads", "num_attention_heads")
    return next(getattr(module, name) for module in block.modules() for name in names if hasattr(module, name))


def strongest(strength: Tensor, keep: int) -> Tensor:
    """strength (groups, n) -> the `keep` strongest of each group, in order, as indices into groups * n."""
    chosen = strength.topk(keep, dim=1).indices.sort(dim=1).values
    return (chosen + torch.arange(len(strength), device=strength.device)[:, None] * strength.shape[1]).flatten()


def rows(site: Site) -> Tensor:
    """Sum of |w| of each output of a target."""
    return site.weight.detach()[site.start : site.stop].float().abs().sum(dim=1)


def columns(site: Site) -> Tensor:
    """Sum of |w| of each input of a target."""
    return site.weight.detach()[site.start : site.stop].float().abs().sum(dim=0)


def residual_strength(blocks: list[nn.Module]) -> Tensor:
    """(width,): sum of |w| over all that reads or writes a channel of the residual stream, in all blocks."""
    sites = [site for block in blocks for site in find_sites(block, ROLES)]
    return torch.stack([rows(site) if site.role in ("o", "fc2") else columns(site) for site in sites]).sum(dim=0)
