"""The CLIPs that CLIP4Clip runs over, built and loaded through open_clip from local files only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import adapters  # noqa: F401  (makes timm and open_clip importable beside a CPU-only torch)
from retrieval.clip4clip.weights import load_clip_weights
from training.encoders import dinov2_small, minilm_folder

if TYPE_CHECKING:
    from open_clip import CustomTextCLIP
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from transformers import PreTrainedTokenizerBase

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def embedded_clip(
    cache: Path, image_size: int, embed_dim: int = 256, context_length: int = 32
) -> tuple[CustomTextCLIP, PreTrainedTokenizerBase]:
    """DINOv2 ViT-S/14 and all-MiniLM-L6-v2 as the towers of one CLIP, in evaluation mode.

    The towers are pretrained, each on its own; the two linear projections into the shared space are new, so that
    retrieval is at chance until they are trained.

    Args:
        cache: folder of the embedded encoders (`training.encoders`).
        image_size: side of a frame in pixels, a multiple of 14. 56 is fast.
        embed_dim: D, width of the shared space.
        context_length: tokens of a sentence at most, as a note to whoever tokenizes; the tower takes 512.

    Returns:
        The model, whose `visual.image_mean` and `visual.image_std` are the normalisation, and transformers' tokenizer.
    """
    from open_clip import CustomTextCLIP
    from open_clip.model import set_model_preprocess_cfg
    from transformers import AutoTokenizer

    folder = str(minilm_folder(cache))
    vision = {"timm_model_name": "vit_small_patch14_dinov2", "timm_pool": "", "timm_proj": "linear"}
    text = {"hf_model_name": folder, "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    model = CustomTextCLIP(embed_dim, vision, text)
    # open_clip does not hand the image size to timm: this trunk has the right one, and its weights
    model.visual.trunk = dinov2_small(cache, image_size)
    model.visual.image_size = (image_size, image_size)
    model.context_length = model.text.context_length = context_length
    set_model_preprocess_cfg(model, IMAGENET | {"size": image_size})
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=context_length)
    return model.eval(), tokenizer


def open_clip_tower(
    name: str, weights: Path | None, context_length: int = 32
) -> tuple[nn.Module, SimpleTokenizer | HFTokenizer]:
    """One of open_clip's own CLIPs, in evaluation mode and float32, and its tokenizer.

    Args:
        name: an architecture of `open_clip.list_models()`. OpenAI's weights need a name that ends in "-quickgelu".
        weights: a local file (see `retrieval.clip4clip.weights`), or None for random weights.
        context_length: tokens of a sentence. Later positions are cut off, as CLIP4Clip does (it takes 32 of 77).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the architecture is unknown or needs a model hub, or the file cannot be read or does not fit.
    """
    import open_clip

    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        raise ValueError(
            f"unknown architecture {name!r}; choose from open_clip.list_models(), like 'ViT-B-32-quickgelu'"
        )
    if not Path(config["text_cfg"].get("hf_model_name", ".")).is_dir():
        raise ValueError(f"the text tower of {name!r} comes from a model hub; choose one without hf_model_name")
    if weights is not None and not Path(weights).is_file():  # before the time that building takes
        raise FileNotFoundError(f"no weights at {weights}; weights are local files, nothing is downloaded")
    model = open_clip.create_model(name)
    if weights is not None:
        load_clip_weights(model, Path(weights), name, quick_gelu=config.get("quick_gelu", False))
    cut_context(model, context_length)
    return model.eval(), open_clip.get_tokenizer(name, context_length=context_length)


def cut_context(clip: Any, context_length: int) -> None:
    """Keep the first `context_length` positions of open_clip's own text transformer; leave others alone. In place."""
    text = getattr(clip, "text", clip)
    if not hasattr(text, "positional_embedding"):
        return
    positions = text.positional_embedding
    if context_length > len(positions):
        raise ValueError(f"context_length is {context_length}, but the text tower has {len(positions)} positions")
    text.positional_embedding = nn.Parameter(positions.detach()[:context_length].clone())
    if text.attn_mask is not None:
        text.attn_mask = text.attn_mask[:context_length, :context_length].clone()
    text.context_length = clip.context_length = context_length
