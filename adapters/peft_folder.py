"""What `peft.PeftModel.save_pretrained` wrote: a folder with adapter_config.json and adapter_model.safetensors.

Read for LoRA and AdaLoRA on linear layers, by what PEFT documents; neither peft nor the model is needed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapters.io import read_tensors

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
EPSILON = 1e-5  # what PEFT's AdaLoRA adds to the rank before it divides by it
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_A(?P<suffix>\.weight)?")  # AdaLoRA's factors are bare parameters


class PeftUpdate(NamedTuple):
    """The update of one linear layer, W + scale B diag(E) A.

    Attributes:
        a: (r, d_in).
        b: (d_out, r).
        scale: PEFT's `scaling`; for AdaLoRA divided by the rank.
        e: (r,), AdaLoRA's singular values; None for LoRA.
        alive: (r,), the ranks that AdaLoRA's pruning left; None for LoRA. The others are zero in a, b and e.
    """

    a: Tensor
    b: Tensor
    scale: float
    e: Tensor | None = None
    alive: Tensor | None = None

    @property
    def alpha(self) -> float:
        """The alpha of an adapter here, whose scale is alpha / rank; digits that are rounding errors are dropped."""
        rank = len(self.a) + (0.0 if self.e is None else EPSILON)
        return float(f"{self.scale * rank:.12g}")


class PeftFolder(NamedTuple):
    """What a folder holds.

    Attributes:
        config: adapter_config.json.
        updates: path of the layer in the stock model -> its update, in natural order.
        rest: the other tensors, under their names in the file.
    """

    config: dict[str, Any]
    updates: dict[str, PeftUpdate]
    rest: dict[str, Tensor]


def read_folder(folder: str | os.PathLike[str]) -> PeftFolder:
    """Read a folder that PEFT saved a LoRA or an AdaLoRA to.

    Raises:
        FileNotFoundError: if one of the two files is not there; a pickle (adapter_model.bin) is never read.
        ValueError: if it holds another method or a form of LoRA that is no sum of rank-1 parts, no update of a linear
            layer, or factors that do not fit its configuration.
    """
    folder = Path(folder)
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
    if (kind := config.get("peft_type")) not in ("LORA", "ADALORA"):
        raise ValueError(
            f"{folder} holds peft_type {kind!r}; expected 'LORA' or 'ADALORA', whose rank-1 subspaces are known here"
        )
    for setting, why in OTHER_FORMS.items():
        if config.get(setting):
            raise ValueError(f"{folder} was made with {setting}={config[setting]!r}: {why}; only plain LoRA is read")

    tensors, _ = read_tensors(folder / PEFT_WEIGHTS)
    rest = {name: tensors[name] for name in sorted(tensors, key=natural)}
    updates: dict[str, PeftUpdate] = {}
    for name in list(rest):
        found = _FACTOR.fullmatch(name)
        if found is None or tensors[name].dim() > 2:  # more than two: a convolution
            continue
        path, suffix = found["layer"], found["suffix"] or ""
        names = {factor: f"{path}.lora_{factor}{suffix}" for factor in "ABE"}
        factors = {factor: rest.pop(name) for factor, name in names.items() if name in rest}
        layer = path.removeprefix(PEFT_PREFIX)
        try:
            updates[layer] = _lora(config, layer, factors) if kind == "LORA" else _adalora(config, layer, factors)
        except ValueError as error:
            raise ValueError(f"{folder}, {layer}: {error}") from None
    if not updates:
        raise ValueError(f"{folder} holds no low-rank update of a linear layer; its tensors are {first(tensors)}")
    return PeftFolder(config, updates, rest)


def _lora(config: Mapping[str, Any], layer: str, factors: Mapping[str, Tensor]) -> PeftUpdate:
    rank = int(_setting(config, "rank_pattern", layer, config.get("r", 8)))
    alpha = _setting(config, "alpha_pattern", layer, config.get("lora_alpha", 8))
    _check(factors, "AB", rank)
    return PeftUpdate(factors["A"], factors["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _adalora(config: Mapping[str, Any], layer: str, factors: Mapping[str, Tensor]) -> PeftUpdate:
    """The ranks that were pruned for good are not in the file: they are put back, as zeros."""
    rank = int(config.get("init_r", 12))
    kept = (config.get("rank_pattern") or {}).get(f"{layer}.lora_E", [True] * rank)
    alive = torch.tensor(kept, dtype=torch.bool)
    _check(factors, "ABE", int(alive.sum()))
    a, b, e = (factors[factor].new_zeros(shape) for factor, shape in
               (("A", (rank, factors["A"].shape[1])), ("B", (len(factors["B"]), rank)), ("E", (rank,))))  # fmt: skip
    a[alive], b[:, alive], e[alive] = factors["A"], factors["B"], factors["E"].flatten()
    alpha = config.get("lora_alpha", 8)
    return PeftUpdate(a, b, (alpha if alpha > 0 else rank) / (rank + EPSILON), e, alive)


def _check(factors: Mapping[str, Tensor], expected: str, rank: int) -> None:
    shapes = {"A": f"A ({rank}, d_in)", "B": f"B (d_out, {rank})", "E": f"E ({rank}, 1)"}
    there = {factor: tuple(tensor.shape) for factor, tensor in factors.items()}
    fit = all(factor in there and len(there[factor]) == 2 for factor in expected)
    if not fit or there["A"][0] != rank or there["B"][1] != rank or there.get("E", (rank, 1)) != (rank, 1):
        received = ", ".join(f"{factor} {there.get(factor, 'is missing')}" for factor in expected)
        raise ValueError(f"expected {' and '.join(shapes[factor] for factor in expected)}; received {received}")


def _setting(config: Mapping[str, Any], patterns: str, layer: str, default: float) -> float:
    """PEFT's `rank_pattern` or `alpha_pattern` for a layer: the first pattern that the end of its path matches."""
    for pattern, value in (config.get(patterns) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return float(value)
        except re.error as error:
            raise ValueError(f"{PEFT_CONFIG}: {patterns} holds {pattern!r}, no regular expression ({error})") from None
    return float(default)


def modules_to_save(model: nn.Module, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that PEFT's modules_to_save mean, by the ends of their paths; not those inside another of them."""
    ends = tuple(config.get("modules_to_save") or ())
    found = [name for name, _ in model.named_modules() if name and name.endswith(ends)] if ends else []
    return tuple(name for name in found if not any(name.startswith(f"{other}.") for other in found))


def is_target(config: Mapping[str, Any], layer: str) -> bool:
    """Whether PEFT would adapt a layer, as far as target_modules, exclude_modules and modules_to_save alone say it."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if not targets or targets == "all-linear" or config.get("layers_to_transform") is not None:
        return False
    if any(re.match(rf"(^|.*\.){re.escape(head)}($|\..*)", layer) for head in config.get("modules_to_save") or ()):
        return False

    def meant(by: str | list[str]) -> bool:
        if isinstance(by, str):
            return re.fullmatch(by, layer) is not None
        return any(layer == end or layer.endswith(f".{end}") for end in by)

    return meant(targets) and not (excluded and meant(excluded))


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts layer.2 before layer.10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def first(names: Iterable[str], count: int = 3) -> str:
    """The first names, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
