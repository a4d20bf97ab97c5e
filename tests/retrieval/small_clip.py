"""A small CLIP of open_clip's own kind, and clips for it; no test module, so that spawned processes can import it."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import adapters  # noqa: F401  (before open_clip)

# isort: split
import open_clip
import torch
from torch import Tensor, nn

from retrieval.clip4clip.head_block import HeadBlock, quick_gelu
from retrieval.clip4clip.towers import open_clip_tower

SIZES: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 5},
}


@cache
def registered(name: str = "small-clip-of-tests-quickgelu", quick_gelu: bool = True) -> str:
    """The name of the architecture, known to open_clip."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / f"{name}.json"
        config.write_text(json.dumps(SIZES | {"quick_gelu": quick_gelu}))
        open_clip.add_model_config(config)
        open_clip.get_model_config(name)
    return name


def small_clip(context_length: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return open_clip_tower(registered(), None, context_length=context_length)[0]


def clips(batch: int = 3, length: int = 4) -> tuple[Tensor, Tensor]:
    """Normalised frames (B, T, 3, 32, 32), and a mask under which item b has max(T - b, 1) real frames."""
    frames = torch.randn(batch, length, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return frames, torch.arange(length) < (length - torch.arange(batch)).clamp(min=1)[:, None]


def sentences(batch: int = 3, length: int = 16) -> Tensor:
    """Random token ids (B, L), the last of them [end]."""
    ids = torch.randint(1, 1000, (batch, length), generator=torch.Generator().manual_seed(2))
    ids[:, -1] = 49407
    return ids


def torchs_layer(block: HeadBlock) -> nn.TransformerEncoderLayer:
    """The same block, of PyTorch's own layer with copied weights."""
    width = block.ln_1.weight.shape[0]
    layer = nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, 0.0, quick_gelu, 1e-12, batch_first=True, norm_first=True
    )
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(block.qkv.bias)
    layer.self_attn.out_proj.load_state_dict(block.out.state_dict())
    layer.norm1.load_state_dict(block.ln_1.state_dict())
    layer.norm2.load_state_dict(block.ln_2.state_dict())
    layer.linear1.load_state_dict(block.expand.state_dict())
    layer.linear2.load_state_dict(block.contract.state_dict())
    return layer


def away_from_zero(head: nn.Module) -> None:
    """Random weights of a size at which every part of a head acts; the initial ones are small."""
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.2)
