"""Semantic targets: q, k, v, o, fc1, fc2 mean the same place in every architecture.

A target is found by how an architecture names its layers, from the end of the path, so that towers may sit at any
depth of a larger model. A fused layer (timm's qkv) holds several targets, each on its own rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

ROLES = ("q", "k", "v", "o", "fc1", "fc2")

# End of a layer's path -> the roles that its output rows hold, in order. New architectures are new lines.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # BERT (transformers)
    (r"attention\.self\.query", ("q",)),
    (r"attention\.self\.key", ("k",)),
    (r"attention\.self\.value", ("v",)),
    (r"attention\.output\.dense", ("o",)),
    (r"intermediate\.dense", ("fc1",)),
    (r"(?<!attention\.)output\.dense", ("fc2",)),
    # ViT (timm), DINOv2 included
    (r"attn\.qkv", ("q", "k", "v")),
    (r"attn\.proj", ("o",)),
    (r"mlp\.fc1", ("fc1",)),
    (r"mlp\.fc2", ("fc2",)),
)
_PATTERNS = [(re.compile(rf"(?:^|\.){path}$"), roles) for path, roles in LAYERS]


class Site(NamedTuple):
    """One target in a model: the rows `start:stop` of the output of the linear layer `name`."""

    name: str
    layer: nn.Linear
    role: str
    start: int
    stop: int


def check_targets(targets: Sequence[str]) -> None:
    """Raise ValueError unless `targets` are semantic targets, each once."""
    if isinstance(targets, str) or not targets or set(targets) - set(ROLES) or len(set(targets)) != len(targets):
        raise ValueError(f"targets is {targets!r}; expected a sequence of distinct names out of {', '.join(ROLES)}")


def find_sites(model: nn.Module, targets: Sequence[str]) -> list[Site]:
    """Find the layers of `model` that `targets` mean, in the order of the model's modules.

    Raises:
        ValueError: if one of the targets is nowhere in the model; the message names the linear layers that are.
    """
    check_targets(targets)
    sites = []
    for name, module in model.named_modules():
        roles = next((roles for pattern, roles in _PATTERNS if pattern.search(name)), ())
        if not isinstance(module, nn.Linear) or not roles:
            continue
        rows = module.out_features // len(roles)
        sites += [Site(name, module, role, i * rows, (i + 1) * rows) for i, role in enumerate(roles) if role in targets]
    if missing := [role for role in targets if role not in {site.role for site in sites}]:
        linear = sorted({re.sub(r"\d+", "N", n) for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"no layer for target {', '.join(map(repr, missing))} in {type(model).__name__}; its linear layers are "
            f"{', '.join(linear) or 'none'}. Known paths: {', '.join(path for path, _ in LAYERS)}"
        )
    return sites
