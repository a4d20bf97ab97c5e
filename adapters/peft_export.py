"""To Hugging Face PEFT: a folder that its `PeftModel.from_pretrained` reads; peft itself is not needed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.base import Branched
from adapters.inject import injection, uncompiled
from adapters.lora import LoRABranch, LowRank
from adapters.merging import without_autocast
from adapters.patterns import default_and_others, exact_pattern
from adapters.peft_folder import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, PeftUpdate, first

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def export_peft(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapter as a LoRA of PEFT: `PeftModel.from_pretrained(stock_model, folder)` gives the same outputs.

    A LoRA's A and B are written as they are. Every other low-rank update (MoSLoRA, AdaLoRA, FacT) is a LoRA too, with
    A = activations^T of the identity and B = basis^T: what it was made of is folded into the two. A layer with several
    branches (a fused qkv) becomes one pair with block-diagonal factors, whose rank is the sum of theirs. What `train`
    named goes into modules_to_save. The folder is written atomically.

    Args:
        model: with an adapter of `inject`, not merged.
        folder: where to; must not exist or be empty.

    Raises:
        ValueError: if the model holds no adapter, or something of it has no form in PEFT: branches on the
            in_proj_weight or the out_proj of nn.MultiheadAttention, parameters of other kinds, a nonlinear adapter.
        FileExistsError: if the folder holds files.
    """
    folder, model = Path(folder), uncompiled(model)
    if (held := injection(model)) is None:
        raise ValueError(f"{type(model).__name__} holds no adapter: call inject(model, adapter) before export_peft")
    if held.adapter.not_mergeable:
        raise ValueError(f"{held.adapter.name} is no LoRA, PEFT cannot run it: {held.adapter.not_mergeable}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another one, or move it away")
    layers = _exportable(model, held.adapter.name)
    heads = _exportable_heads(model, held.train, layers)
    _check_nothing_else_trains(model, held.own, held.adapter.name, layers, heads)

    with without_autocast(model):
        updates = {name: _update(layer) for name, layer in layers.items()}
    tensors = {f"{PEFT_PREFIX}{name}.lora_A.weight": update.a for name, update in updates.items()}
    tensors |= {f"{PEFT_PREFIX}{name}.lora_B.weight": update.b for name, update in updates.items()}
    for head in heads:
        state = model.get_submodule(head).state_dict()
        tensors |= {f"{PEFT_PREFIX}{head}.{name}": tensor for name, tensor in state.items()}
    ranks = {name: len(update.a) for name, update in updates.items()}
    alphas = {name: update.alpha for name, update in updates.items()}
    rank, rank_pattern = default_and_others(ranks)
    alpha, alpha_pattern = default_and_others(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": held.adapter.dropout if isinstance(held.adapter, LowRank) else 0.0,
        "target_modules": exact_pattern(list(layers), [name for name, _ in model.named_modules()]),
        "modules_to_save": list(heads) or None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}  # FacT shares some
    save_file(copies, partial / PEFT_WEIGHTS, metadata={"format": "pt"})
    if folder.exists():
        folder.rmdir()  # it is empty; Windows does not replace a folder
    os.replace(partial, folder)


def _exportable(model: nn.Module, adapter: str) -> dict[str, Branched]:
    """The layers with branches; raises ValueError if there is none, or one that PEFT has no update for."""
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, Branched) and module.branches
    }
    if not layers:
        raise ValueError(f"{adapter} has no low-rank update of a linear layer here: there is nothing for PEFT's LoRA")
    raw = [
        f"{name}.{role}" for name, layer in layers.items() if not isinstance(layer, nn.Linear) for role in layer.roles
    ]
    silent = {module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    raw += [f"{name}.o" for name, layer in layers.items() if layer in silent]
    if raw:
        raise ValueError(
            f"PEFT cannot express {first(raw)}: it has no LoRA for rows of in_proj_weight, and ignores one on the "
            "out_proj of nn.MultiheadAttention; save the adapter with save, or adapt other layers (fc1, fc2)"
        )
    return layers


def _exportable_heads(model: nn.Module, train: Iterable[str], layers: Iterable[str]) -> tuple[str, ...]:
    """`train` as modules_to_save; raises ValueError if PEFT would not take exactly these modules."""
    modules = dict(model.named_modules())
    train = tuple(dict.fromkeys(train))
    heads = tuple(name for name in train if not any(name.startswith(f"{other}.") for other in train))
    for head in heads:
        if head not in modules or isinstance(modules[head], _CONTAINERS):
            kind = type(modules[head]).__name__ if head in modules else "Parameter"
            raise ValueError(
                f"train={head!r} is a {kind}, but PEFT's modules_to_save takes modules with a forward pass"
            )
        if also := [name for name in modules if name.endswith(head) and name not in heads]:
            raise ValueError(
                f"PEFT finds modules_to_save by the end of their path: {head!r} would mean {first(also)} too"
            )
        if both := [name for name in layers if re.match(rf"(^|.*\.){re.escape(head)}($|\..*)", name)]:
            raise ValueError(f"PEFT does not adapt what is under modules_to_save: {first(both)} is, by train={head!r}")
    return heads


def _check_nothing_else_trains(
    model: nn.Module, own: Collection[str], adapter: str, layers: Mapping[str, Branched], heads: Iterable[str]
) -> None:
    inside = {id(parameter) for layer in layers.values() for parameter in layer.branches.parameters()}
    inside |= {id(parameter) for head in heads for parameter in model.get_submodule(head).parameters()}
    other = [n for n, p in model.named_parameters() if (p.requires_grad or n in own) and id(p) not in inside]
    if other:
        raise ValueError(
            f"{adapter} trains {first(other)}, which is no low-rank update: PEFT's LoRA has no place for it"
        )


@torch.no_grad()
def _update(layer: Branched) -> PeftUpdate:
    """All branches of a layer as one: A side by side, B block-diagonal on the rows of each."""
    parts = [(*_factors(layer, role), *layer.slices[role]) for role in layer.roles]
    scales = {scale for _, _, scale, _, _ in parts}
    scale = scales.pop() if len(scales) == 1 else 1.0
    a = torch.cat([part * (own / scale) for part, _, own, _, _ in parts])
    b = a.new_zeros(len(layer.linear_map()[0]), len(a))
    column = 0
    for _, part, _, start, stop in parts:
        b[start:stop, column : column + part.shape[1]] = part
        column += part.shape[1]
    return PeftUpdate(a, b, scale)


def _factors(layer: Branched, role: str) -> tuple[Tensor, Tensor, float]:
    """A (r, d_in), B (rows, r) and the scale of one branch."""
    branch = layer.branches[role]
    if isinstance(branch, LoRABranch):
        return branch.A, branch.B, branch.scale
    activations, basis = layer.weight_subspaces(role)
    return activations.T, basis.T, 1.0
