"""The retrieval models by name: each builds itself from a data set and plain settings, with its pretrained encoders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from retrieval.clip4clip import CLIP4Clip
from retrieval.data import RetrievalDataset
from retrieval.model import RetrievalModel
from retrieval.vse_infty import VSEInfinity, VSEInfinityConfig
from training import check_name, choose
from training.choose import build


def vse_infty(data: RetrievalDataset, cache: Path, *, text: str = "minilm", **sizes: Any) -> tuple[RetrievalModel, Any]:
    """VSE-infinity on region features, with the text encoder `text` (see `bert`)."""
    config = build("model", "vse_infty", VSEInfinityConfig, sizes)
    encoder, tokenizer = bert(text, cache)
    return VSEInfinity(encoder, data.visual(0).shape[-1], config), tokenizer


def bert(name: str, cache: Path) -> tuple[nn.Module, Any]:
    """The text encoder called `name`: "minilm" (embedded) or a folder in Hugging Face's layout.

    Raises:
        FileNotFoundError: if it is neither.
        ValueError: if the folder holds another kind of model than a BERT, or its weights are damaged or not all there.
    """
    from transformers import AutoTokenizer, BertModel

    from training.encoders import minilm

    if name == "minilm":
        return minilm(cache)
    if not all((Path(name) / file).is_file() for file in ("config.json", "model.safetensors")):
        raise FileNotFoundError(
            f"model.text={name}: expected 'minilm' or a folder with a BERT in Hugging Face's layout (config.json, "
            "model.safetensors, tokenizer.json); nothing is fetched from a hub"
        )
    # transformers loads what it can, and only logs what it leaves random
    if (kind := json.loads((Path(name) / "config.json").read_text(encoding="utf-8")).get("model_type")) != "bert":
        raise ValueError(
            f"model.text={name} is a model of type {kind!r} (config.json), expected 'bert': the layers of a BERT would "
            "stay random; give a folder with a BERT, such as bert-base-uncased"
        )
    load = cast(Any, BertModel.from_pretrained)  # its type does not know of the second result
    try:
        encoder, loaded = load(
            name, add_pooling_layer=False, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # safetensors and transformers have errors of their own for what does not fit
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"{Path(name) / 'model.safetensors'} cannot be loaded as the BERT that config.json describes "
            f"({type(error).__name__}: {first}); if it is cut off or damaged, get it again, and take both files from "
            "the same model"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"model.text={name}: its file lacks {len(missing)} weights of the BERT that config.json describes, "
            f"{missing[0]} for one, which would stay random; take both files from the same model"
        )
    return encoder.eval(), AutoTokenizer.from_pretrained(name, local_files_only=True)


def clip4clip(
    data: RetrievalDataset,
    cache: Path,
    *,
    towers: str = "embedded",
    weights: str | None = None,
    head: str = "meanP",
    max_frames: int = 12,
    projections: str = "head",
    image_size: int | None = None,
    embed_dim: int | None = None,
) -> tuple[RetrievalModel, Any]:
    """CLIP4Clip on video frames.

    Args:
        data: what it is for.
        cache: folder of the embedded encoders.
        towers: "embedded" (DINOv2 ViT-S/14 and MiniLM composed by open_clip) or an architecture of open_clip.
        weights: of open_clip's: a local file (see `retrieval.clip4clip.weights`), or "random".
        head, max_frames, projections: see `CLIP4Clip`.
        image_size, embed_dim: of the embedded towers. Default: 56 pixels and 256 channels.

    Raises:
        ValueError: for settings of the other kind of towers; see also `open_clip_tower`.
    """
    from retrieval.clip4clip.tokenizer import ClipTokenizer
    from retrieval.clip4clip.towers import embedded_clip, open_clip_tower

    tokenizer: Any
    if towers == "embedded":
        if weights is not None or projections != "head":
            raise ValueError(
                f"weights={weights} and projections={projections} are for open_clip's towers; the embedded ones bring "
                "their weights, and their projections are new"
            )
        clip, tokenizer = embedded_clip(cache, image_size=image_size or 56, embed_dim=embed_dim or 256)
    else:
        if image_size is not None or embed_dim is not None:
            raise ValueError(f"image_size and embed_dim are given by towers={towers}; set both to null")
        if weights is None:
            raise ValueError(f"towers={towers} needs weights: a local file, or 'random' to train from nothing")
        clip, tokenizer = open_clip_tower(towers, None if weights == "random" else Path(weights))
        tokenizer = ClipTokenizer(tokenizer)
    return CLIP4Clip(clip, head, max_frames, projections=projections), tokenizer


MODELS: dict[str, Callable[..., tuple[RetrievalModel, Any]]] = {
    "vse_infty": vse_infty,
    "clip4clip": clip4clip,
}
VISUAL_KINDS = {"vse_infty": VSEInfinity.visual_kind, "clip4clip": CLIP4Clip.visual_kind}
FITTING = {
    "regions": "model=vse_infty (embedded encoder) or model=vse_infty_base (as published, on BERT-base)",
    "frames": "model=clip4clip (embedded encoders, 56 px) or model=clip4clip_vit_b32 (as published, on CLIP ViT-B/32)",
}  # what the data hold -> files of scripts/conf/model


def build_model(settings: Mapping[str, Any], data: RetrievalDataset, cache: Path) -> tuple[RetrievalModel, Any]:
    """Build the model that `settings` name for `data`: (model in evaluation mode, tokenizer).

    Raises:
        ValueError: if the model is unknown or takes another kind of visual input than the data holds, or one of its
            settings is unknown or of another type.
    """
    name = settings["name"]
    check_name("model", name, MODELS)
    holds = "frames" if data.visual(0).ndim == 4 else "regions"
    if (takes := VISUAL_KINDS[name]) != holds:
        raise ValueError(f"model {name!r} takes {takes}, but data {data.name!r} holds {holds}; use {FITTING[holds]}")
    return choose("model", MODELS, {**settings, "data": data, "cache": cache})
