"""The rank-1 subspaces of an adapter that lies on the disk, without the model that it was trained in.

from adapters import stored_subspaces
activations, basis = stored_subspaces("adapter.safetensors")["bert.encoder.layer.0.attention.self.query.q"]

A file of this suite is read by the adapter that wrote it (`LowRankAdapter.stored_subspaces`), a folder of Hugging Face
PEFT by what its LoRA documents.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.base import LowRankAdapter
from adapters.io import read, read_tensors
from adapters.methods import ADAPTERS

PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PEFT_PREFIX = "base_model.model."  # how PEFT wraps the model

# Settings of PEFT's LoraConfig with which the update is not the sum of the rank-1 parts of lora_A and lora_B.
OTHER_FORMS = {
    "use_dora": "DoRA rescales the columns of the whole weight",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "BD-LoRA is block-diagonal",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "arrow_config": "Arrow routes tokens through several adapters",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "kasa_config": "KaSA scales its components by further parameters",
    "target_parameters": "parameters that are not linear layers have an update for each expert",
}


class StoredSubspaces(dict[str, tuple[Tensor, Tensor]]):
    """Layer -> activations A^T (d_in, r) with the scale folded in, and basis (r, d_out), both in float32.

    Attributes:
        rest: names of the file's tensors that no pair is made of, such as those of a head that trained whole.
    """

    def __init__(self, pairs: Mapping[str, tuple[Tensor, Tensor]], rest: Iterable[str]) -> None:
        super().__init__({name: (activations.float(), basis.float()) for name, (activations, basis) in pairs.items()})
        self.rest = tuple(rest)


def stored_subspaces(path: str | os.PathLike[str]) -> StoredSubspaces:
    """The subspaces of every low-rank update in an adapter file of this suite, or in a folder that PEFT saved.

    activations @ basis, (d_in, d_out), is the transpose of what merging adds to the weight of an `nn.Linear`; for
    layers that store their weight transposed (`fan_in_fan_out`) it is that itself.

    Args:
        path: a .safetensors file that `save` wrote, or a folder with adapter_config.json and adapter_model.safetensors.

    Returns:
        A dict sorted by name, layer.2 before layer.10; its attribute `rest` names what else the file holds.

    Raises:
        FileNotFoundError: if there is nothing at `path`, or PEFT's folder lacks one of its two files.
        ValueError: if the file is neither, the adapter is no low-rank one, or its update has another form.
    """
    path = Path(path)
    if path.is_dir():
        return _of_peft(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {path}")
    adapter, tensors, _ = read(path)
    if not isinstance(adapter, LowRankAdapter):
        low_rank = ", ".join(name for name, kind in ADAPTERS.items() if hasattr(kind, "stored_subspaces"))
        raise ValueError(
            f"{path} holds {adapter}, which is no sum of rank-1 subspaces; the adapters that are one: {low_rank}"
        )
    tensors = {name: tensors[name] for name in sorted(tensors, key=_natural)}
    rest = (name for name in tensors if ".branches." not in name)
    return StoredSubspaces(adapter.stored_subspaces(tensors), rest)


def _of_peft(folder: Path) -> StoredSubspaces:
    """What `peft.PeftModel.save_pretrained` wrote, for LoRA on linear layers."""
    if not (folder / PEFT_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {PEFT_CONFIG}: expected a folder that PEFT's save_pretrained wrote")
    if not (folder / PEFT_WEIGHTS).is_file():
        pickled = (folder / PEFT_PICKLE).is_file()
        why = f", only {PEFT_PICKLE}, a pickle, which can run code when it is read" if pickled else ""
        raise FileNotFoundError(
            f"{folder} holds no {PEFT_WEIGHTS}{why}; load it with peft where you trust it and save it again with "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    try:
        config: dict[str, Any] = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / PEFT_CONFIG} is not valid JSON ({error})") from None
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{folder} holds peft_type {kind!r}; expected 'LORA', whose rank-1 subspaces are known here")
    for setting, why in OTHER_FORMS.items():
        if config.get(setting):
            raise ValueError(f"{folder} was made with {setting}={config[setting]!r}: {why}; only plain LoRA is read")

    tensors, _ = read_tensors(folder / PEFT_WEIGHTS)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in sorted(tensors, key=_natural):
        if not name.endswith(".lora_A.weight") or tensors[name].dim() > 2:  # more than two: a convolution
            continue
        layer = name.removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors.get(f"{layer}.lora_B.weight")  # (r, d_in), (d_out, r)
        plain = layer.removeprefix(PEFT_PREFIX)
        rank = int(_setting(config, "rank_pattern", plain, config.get("r", 8)))
        if b is None or a.dim() != 2 or b.dim() != 2 or not len(a) == b.shape[1] == rank:
            shapes = f"A {tuple(a.shape)}, B {'is missing' if b is None else tuple(b.shape)}"
            raise ValueError(f"{folder}, {plain}: expected A ({rank}, d_in) and B (d_out, {rank}); received {shapes}")
        alpha = _setting(config, "alpha_pattern", plain, config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[plain] = (a.T.to(torch.float32) * scale, b.T)
    if not pairs:
        raise ValueError(f"{folder} holds no low-rank update of a linear layer; its tensors are {_first(tensors)}")
    used = {f"{layer}.lora_{factor}.weight" for layer in pairs for factor in "AB"}
    rest = (name for name in sorted(tensors, key=_natural) if name.removeprefix(PEFT_PREFIX) not in used)
    return StoredSubspaces(pairs, rest)


def _setting(config: Mapping[str, Any], patterns: str, layer: str, default: float) -> float:
    """PEFT's `rank_pattern` or `alpha_pattern` for a layer: the first pattern that the end of its path matches."""
    for pattern, value in (config.get(patterns) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return float(value)
        except re.error as error:
            raise ValueError(f"{PEFT_CONFIG}: {patterns} holds {pattern!r}, no regular expression ({error})") from None
    return float(default)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts layer.2 before layer.10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _first(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
