"""The CLIPs that CLIP4Clip runs over, built and loaded through open_clip from local files only."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

import adapters  # noqa: F401  (makes timm and open_clip importable beside a CPU-only torch)
from retrieval.clip4clip.weights import check_there, load_clip_weights
from training.encoders import dinov2_small, minilm_folder

if TYPE_CHECKING:
    from open_clip import CustomTextCLIP
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import PreTrainedTokenizerBase

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPENAI: dict[str, tuple[float, ...]] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


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


def open_clip_tower(name: str, weights: Path | None, context_length: int = 32) -> tuple[nn.Module, SimpleTokenizer]:
    """One of open_clip's own CLIPs, in evaluation mode and float32, and its tokenizer.

    Args:
        name: an architecture of `open_clip.list_models()`. OpenAI's weights need a name that ends in "-quickgelu".
        weights: a local file (see `retrieval.clip4clip.weights`), or None for random weights.
        context_length: tokens of a sentence. Later positions are cut off, as CLIP4Clip does (it takes 32 of 77).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the architecture is unknown, needs a model hub or cannot be cut to `context_length`, or the file
            cannot be read or does not fit.
    """
    import open_clip
    from open_clip.model import set_model_preprocess_cfg

    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        raise ValueError(
            f"unknown architecture {name!r}; choose from open_clip.list_models(), like 'ViT-B-32-quickgelu'"
        )
    text = config["text_cfg"]
    for key, what in (("hf_model_name", "text tower"), ("hf_tokenizer_name", "tokenizer")):
        if key in text:
            raise ValueError(f"the {what} of {name!r} comes from a model hub ({key}={text[key]}); choose one without")
    if text.get("no_causal_mask"):
        raise ValueError(
            f"in the text tower of {name!r} tokens attend to later ones (no_causal_mask), so the {context_length} "
            "positions that are kept would have other features than among all; choose one with a causal mask"
        )
    if weights is not None:
        check_there(Path(weights))  # before the time that building takes
    model = open_clip.create_model(name)
    set_model_preprocess_cfg(model, model.visual.preprocess_cfg | published_normalisation(name))
    if weights is not None:
        load_clip_weights(model, Path(weights), name, quick_gelu=config.get("quick_gelu", False))
    cut_context(model, context_length)
    return model.eval(), cast("SimpleTokenizer", open_clip.get_tokenizer(name, context_length=context_length))


def published_normalisation(name: str) -> dict[str, tuple[float, ...]]:
    """{"mean", "std"} of pixels that the published weights of an architecture were trained with; OpenAI's without any.

    A file of weights does not say which it needs. Where published weights differ among themselves, it is OpenAI's, with
    a warning.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    known = {tag: get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)}
    used = {tag: {key: tuple(each[key]) for key in OPENAI} for tag, each in known.items()}
    distinct = [each for number, each in enumerate(used.values()) if each not in list(used.values())[:number]]
    if len(distinct) == 1:
        return distinct[0]
    if others := [tag for tag, each in used.items() if each != OPENAI]:
        warnings.warn(
            f"pixels are normalised with OpenAI's mean and deviation, as most published weights of {name!r} need them; "
            f"those of {', '.join(others)} need others, and are not for use here",
            stacklevel=3,
        )
    return OPENAI


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
