"""Where an adapter goes: semantic targets, which mean the same place in every architecture, or a pattern.

q, k, v, o are attention's projections, fc1 and fc2 the two layers of the block's MLP. A target is found by how an
architecture names its layers, from the end of the path, so that towers may sit at any depth of a larger model. A fused
map (timm's qkv, CLIP's in_proj_weight) holds several targets, each on its own rows.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from adapters.attention import AdaptedInProjection, AdaptedMultiheadAttention
from adapters.base import AdaptedLinear, Branched
from adapters.extend import extend
from adapters.plain import has_own_forward, never_called

ROLES = ("q", "k", "v", "o", "fc1", "fc2")
WHOLE = "whole"  # the role of a linear layer that no architecture below names; reached by a pattern

# End of a linear layer's path -> the roles that its output rows hold, in order. New architectures are new lines.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # BERT (transformers)
    (r"attention\.self\.query", ("q",)),
    (r"attention\.self\.key", ("k",)),
    (r"attention\.self\.value", ("v",)),
    (r"attention\.output\.dense", ("o",)),
    (r"intermediate\.dense", ("fc1",)),
    (r"(?<!attention\.)output\.dense", ("fc2",)),
    # ViT (timm, DINOv2 included), Swin; ConvNeXt has the MLP only
    (r"attn\.qkv", ("q", "k", "v")),
    (r"attn\.proj", ("o",)),
    (r"mlp\.fc1", ("fc1",)),
    (r"mlp\.fc2", ("fc2",)),
    # CLIP (open_clip), whose q, k and v are rows of `attn.in_proj_weight`, see `linear_maps`
    (r"attn\.out_proj", ("o",)),
    (r"mlp\.c_fc", ("fc1",)),
    (r"mlp\.c_proj", ("fc2",)),
    # CLIP and ViT (transformers)
    (r"(?:self_attn|attention)\.q_proj", ("q",)),
    (r"(?:self_attn|attention)\.k_proj", ("k",)),
    (r"(?:self_attn|attention)\.v_proj", ("v",)),
    (r"self_attn\.out_proj|attention\.o_proj", ("o",)),
)
_PATTERNS = [(re.compile(rf"(?:^|\.)(?:{path})$"), roles) for path, roles in LAYERS]


@dataclass(frozen=True)
class Site:
    """One target in a model: the rows `start:stop` of a linear map's output.

    Attributes:
        name: path of the module that holds the map.
        module: it; an `nn.Linear`, or attention with a raw in_proj_weight.
        role: one of `ROLES`, or "whole".
        start, stop: rows of the weight.
        weight: (d_out of the whole map, d_in).
        attention: the attention that `module` is the out_proj of, if that has to be told to call it.
    """

    name: str
    module: nn.Module
    role: str
    start: int
    stop: int
    weight: Tensor
    attention: nn.Module | None = None

    @property
    def key(self) -> str:
        """What patterns are searched in: "blocks.0.attn.qkv.q", or the bare path of a whole layer."""
        return self.name if self.role == WHOLE else f"{self.name}.{self.role}"

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    @property
    def d_out(self) -> int:
        return self.stop - self.start


def check_targets(targets: str | Sequence[str]) -> None:
    """Raise ValueError unless `targets` is a regular expression, or semantic targets, each once."""
    if isinstance(targets, str):
        if targets in ROLES:  # as a pattern, "q" is found in "attn.qkv.v" too
            raise ValueError(
                f"targets is the text {targets!r}, a pattern; did you mean the semantic target ({targets!r},)?"
            )
        compiled(targets)
    elif not targets or set(targets) - set(ROLES) or len(set(targets)) != len(targets):
        raise ValueError(
            f"targets is {targets!r}; expected distinct names out of {', '.join(ROLES)}, or one regular expression"
        )


def compiled(pattern: str) -> re.Pattern[str]:
    """The compiled expression; raises ValueError if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


def find_sites(model: nn.Module, targets: str | Sequence[str]) -> list[Site]:
    """Find the linear maps of `model` that `targets` mean, in the order of the model's modules.

    Args:
        model: any module.
        targets: semantic targets, or a regular expression that is searched in "<layer>.<role>", such as
            ``r"blocks\\.[0-5]\\..*\\.(q|v)$"``; it also reaches linear layers that have no role, by their path. ""
            means all that an adapter can go into.

    Raises:
        ValueError: if one of the targets, or the pattern, is nowhere in the model (the message names what is), or means
            a layer with a forward of its own.
    """
    check_targets(targets)
    known = list(linear_maps(model))
    if isinstance(targets, str):
        pattern = compiled(targets)
        sites = [site for site in known if pattern.search(site.key)]
        if not targets:
            sites = [site for site in sites if _odd(site) is None]
        if not sites:
            keys = [site.key for site in known]
            close = difflib.get_close_matches(targets, keys, n=3, cutoff=0.3) or keys[:3]
            raise ValueError(
                f"the pattern {targets!r} is found in no linear layer of {type(model).__name__}; "
                f"the closest are {', '.join(close) or 'none: it has no linear layer'}"
            )
        check_plain(sites)
        return sites
    sites = [site for site in known if site.role in targets]
    if missing := [role for role in targets if role not in {site.role for site in sites}]:
        there = [role for role in ROLES if role in {site.role for site in known}]
        layers = sorted({re.sub(r"\d+", "N", site.name) for site in known})
        raise ValueError(
            f"no layer for target {', '.join(map(repr, missing))} in {type(model).__name__}; its targets are "
            f"{', '.join(there) or 'none'}, and a pattern can reach its linear layers: {', '.join(layers) or 'none'}"
        )
    check_plain(sites)
    return sites


def check_plain(sites: Iterable[Site]) -> None:
    """Raise ValueError for a layer with a forward of its own, such as a quantised one."""
    for site in sites:
        if (odd := _odd(site)) is not None:
            why = "has a forward of its own, which an adapter would replace by torch's: put torch's class in its place"
            if "forward" in vars(odd):
                hooks = "had its forward replaced (by accelerate's hooks, say), so that an adapter would never run"
                why = f"{hooks}: inject before that"
            raise ValueError(f"{site.key}: this {type(odd).__name__} {why}, or leave it out with a pattern as targets")


def _odd(site: Site) -> nn.Module | None:
    """The module of a site, or its attention, that has a forward of its own."""
    return next((m for m in (site.module, site.attention) if m is not None and has_own_forward(m)), None)


def linear_maps(model: nn.Module) -> Iterator[Site]:
    """Every linear map of `model` that is called, by role; a module that stands at several paths counts once."""
    out_projections: dict[nn.Module, nn.Module] = {}
    uncalled: set[nn.Module] = set()
    for name, module in model.named_modules():
        fused = getattr(module, "in_proj_weight", None)
        uncalled |= never_called(module)
        if isinstance(module, nn.MultiheadAttention):
            out_projections[module.out_proj] = module
        if isinstance(fused, nn.Parameter):
            rows = len(fused) // 3
            yield from (Site(name, module, role, i * rows, (i + 1) * rows, fused) for i, role in enumerate("qkv"))
        elif isinstance(module, nn.Linear) and module not in uncalled:
            roles = next((roles for pattern, roles in _PATTERNS if pattern.search(name)), (WHOLE,))
            rows = module.out_features // len(roles)
            attention = out_projections.get(module)
            for i, role in enumerate(roles):
                yield Site(name, module, role, i * rows, (i + 1) * rows, module.weight, attention)


def adapt(site: Site, branch: nn.Module, role: str | None = None, rows: tuple[int, int] | None = None) -> None:
    """Give a site a branch, on the site's rows and device and in its dtype; the module is extended in place.

    Args:
        site: of `find_sites`.
        branch: an `adapters.base.Branch`.
        role: another name than the site's, for a site with several branches.
        rows: other rows of the weight than the site's, likewise.
    """
    module = _branched(site.module)
    if site.attention is not None:
        _branched(site.attention)
    branch = branch.to(device=site.weight.device, dtype=site.weight.dtype)
    module.branches[role or site.role] = branch.train(module.training)
    module.slices[role or site.role] = rows or (site.start, site.stop)


def _branched(module: nn.Module) -> Branched:
    if isinstance(module, Branched):
        return module
    if isinstance(module, nn.Linear):
        branched: Branched = extend(module, AdaptedLinear)
    elif isinstance(module, nn.MultiheadAttention):
        branched = extend(module, AdaptedMultiheadAttention)
    else:
        branched = extend(module, AdaptedInProjection)
    branched.branches, branched.slices, branched.record = nn.ModuleDict(), {}, None
    return branched


def rank_of(site: Site, rank: int, pattern: Mapping[str, int]) -> int:
    """The rank of the first pattern that is found in the site's key, or the default."""
    return next((value for expression, value in pattern.items() if re.search(expression, site.key)), rank)
