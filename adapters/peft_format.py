"""Adapters of Hugging Face PEFT, both ways; peft itself is not needed.

from adapters import LoRA, export_peft, inject, load_peft
load_peft(model, "folder")        # what PEFT's save_pretrained wrote, into a fresh stock model
export_peft(model, "folder")      # then peft.PeftModel.from_pretrained(stock_model, "folder")
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.adalora import AdaLoRA
from adapters.base import Branched
from adapters.inject import inject, injection
from adapters.lora import LoRA, LoRABranch, LowRank
from adapters.patterns import exact_pattern
from adapters.peft_folder import (
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    PeftFolder,
    PeftUpdate,
    first,
    is_target,
    modules_to_save,
    natural,
    read_folder,
)
from adapters.targets import ROLES, WHOLE, Site, find_sites

V = TypeVar("V")

# Values of PEFT's init_lora_weights with which it changes the backbone's own weights.
CHANGED_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def load_peft(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put a LoRA or an AdaLoRA that PEFT saved into a fresh stock model, in place: the same outputs as in PEFT.

    PEFT's update of a fused layer (timm's qkv) is one pair of factors; here q, k and v each get a branch with the same
    A and their rows of B, which has more parameters, and a warning says how many. Our scale is alpha / rank in every
    layer: alpha is the one that fits most of them (with rsLoRA, lora_alpha sqrt(r)), and in the others the factor that
    is left is folded into B. The ranks that AdaLoRA pruned for good come back as zeros that stay pruned. PEFT's
    modules_to_save become `train`. What `save` writes afterwards loads like any file.

    Args:
        model: the model that PEFT wrapped, with the weights that the adapter was trained on.
        folder: with adapter_config.json and adapter_model.safetensors.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: if one of the two files is not there; a pickle (adapter_model.bin) is never read.
        ValueError: for another method or a form of LoRA that is none of ours, for layers that have no counterpart here
            (embeddings, convolutions, nn.MultiheadAttention), and for tensors that are missing, unexpected or
            misshaped; nothing has been changed then.
    """
    stored = read_folder(folder)
    _check_settings(stored.config, folder)
    linear: dict[str, list[Site]] = defaultdict(list)
    for site in find_sites(model, ""):
        if isinstance(site.module, nn.Linear) and site.attention is None:
            linear[site.name].append(site)
    heads = modules_to_save(model, stored.config)
    _check_layers(model, stored, linear, folder)
    _check_tensors(model, stored, linear, heads, folder)

    layers = {name: linear[name] for name in stored.updates}
    adapter, factors = _adapter(model, stored, layers)
    inject(model, adapter, heads)
    with torch.no_grad():
        for name, sites in layers.items():
            update = stored.updates[name]
            for site in sites:
                branch = cast(Any, site.module).branches[site.role]
                branch.A.copy_(update.a)
                branch.B.copy_(update.b[site.start : site.stop].float() * factors[name])
                if update.e is not None:
                    branch.E.copy_(update.e.view_as(branch.E))
                    branch.alive.copy_(update.alive)
    trained = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored.rest.items()}
    for head in heads:
        module = model.get_submodule(head)
        module.load_state_dict({name: trained[f"{head}.{name}"] for name in module.state_dict()})

    if fused := [name for name, sites in layers.items() if len(sites) > 1]:
        before = sum(stored.updates[name].a.numel() + stored.updates[name].b.numel() for name in fused)
        after = before + sum((len(layers[name]) - 1) * stored.updates[name].a.numel() for name in fused)
        warnings.warn(
            f"{len(fused)} fused layers ({first(fused, 1)}) had one A for all their rows; here each of "
            f"{', '.join(site.role for site in layers[fused[0]])} has its own, equal at first: {after:,} parameters "
            f"instead of {before:,}",
            stacklevel=2,
        )
    return model


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
    folder = Path(folder)
    if (held := injection(model)) is None:
        raise ValueError(f"{type(model).__name__} holds no adapter: call inject(model, adapter) before export_peft")
    if held.adapter.not_mergeable:
        raise ValueError(f"{held.adapter.name} is no LoRA, PEFT cannot run it: {held.adapter.not_mergeable}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another one, or move it away")
    layers = _exportable(model, held.adapter.name)
    heads = _exportable_heads(model, held.train, layers)
    _check_nothing_else_trains(model, held.own, held.adapter.name, layers, heads)

    updates = {name: _update(layer) for name, layer in layers.items()}
    tensors = {f"{PEFT_PREFIX}{name}.lora_A.weight": update.a for name, update in updates.items()}
    tensors |= {f"{PEFT_PREFIX}{name}.lora_B.weight": update.b for name, update in updates.items()}
    for head in heads:
        state = model.get_submodule(head).state_dict()
        tensors |= {f"{PEFT_PREFIX}{head}.{name}": tensor for name, tensor in state.items()}
    ranks = {name: len(update.a) for name, update in updates.items()}
    alphas = {name: update.alpha for name, update in updates.items()}
    rank, rank_pattern = _default_and_others(ranks)
    alpha, alpha_pattern = _default_and_others(alphas)
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


def _check_settings(config: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    if (bias := config.get("bias", "none")) != "none" or config.get("lora_bias"):
        setting = "lora_bias=True" if bias == "none" else f"bias={bias!r}"
        raise ValueError(f"{folder} was made with {setting}: expected no trained biases, bias='none'")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BACKBONE):
        raise ValueError(
            f"{folder} was made with init_lora_weights={start!r}, which changes the backbone's weights too: convert it "
            "with PEFT's save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )


def _check_layers(
    model: nn.Module, stored: PeftFolder, linear: Collection[str], folder: str | os.PathLike[str]
) -> None:
    """Raise ValueError for updates of layers that exist, but that no adapter here goes into."""
    modules = dict(model.named_modules())
    of_rest = (name.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for name in stored.rest if ".lora_" in name)
    names = {name.replace(".base_layer", ""): None for name in (*stored.updates, *of_rest)}
    if other := [f"{name} ({_kind(modules[name])})" for name in names if name in modules and name not in linear]:
        raise ValueError(
            f"{folder} adapts layers that have no counterpart here, where LoRA goes into nn.Linear: {first(other, 5)}"
        )


def _kind(module: nn.Module) -> str:
    return "out_proj of nn.MultiheadAttention" if isinstance(module, nn.Linear) else type(module).__name__


def _check_tensors(
    model: nn.Module,
    stored: PeftFolder,
    linear: Mapping[str, list[Site]],
    heads: Iterable[str],
    folder: str | os.PathLike[str],
) -> None:
    """Raise ValueError that names the tensors which are missing, unexpected or misshaped."""
    unexpected = [f"{name}.lora_A" for name in stored.updates if name not in linear]
    missing = [f"{name}.lora_A" for name in linear if name not in stored.updates and is_target(stored.config, name)]
    shapes = []
    for name, update in stored.updates.items():
        if name in linear and (len(update.b), update.a.shape[1]) != (shape := tuple(linear[name][0].weight.shape)):
            shapes.append(f"{name} {(len(update.b), update.a.shape[1])} instead of {shape}")
    expected = {f"{head}.{name}": t for head in heads for name, t in model.get_submodule(head).state_dict().items()}
    rest = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored.rest.items()}
    missing += expected.keys() - rest.keys()
    unexpected += rest.keys() - expected.keys()
    shapes += [f"{name} {tuple(rest[name].shape)} instead of {tuple(tensor.shape)}" for name, tensor in expected.items()
               if name in rest and rest[name].shape != tensor.shape]  # fmt: skip
    if missing or unexpected or shapes:
        raise ValueError(
            f"{folder} does not fit {type(model).__name__}: missing {sorted(missing, key=natural)}, "
            f"unexpected {sorted(unexpected, key=natural)}, misshaped {shapes}"
        )


def _adapter(
    model: nn.Module, stored: PeftFolder, layers: Mapping[str, list[Site]]
) -> tuple[LowRank, Mapping[str, float]]:
    """The configuration that describes the layers, and by layer the factor that its scale leaves for B."""
    updates = stored.updates
    targets = _targets(model, [site for sites in layers.values() for site in sites])
    dropout = float(stored.config.get("lora_dropout") or 0.0)
    ranks = {site.key: len(updates[name].a) for name, sites in layers.items() for site in sites}
    rank, rank_pattern = _default_and_others(ranks)
    alphas = {name: update.alpha for name, update in updates.items()}
    alpha, _ = _default_and_others(alphas)
    shared: dict[str, Any] = {
        "rank": rank, "alpha": alpha, "targets": targets, "dropout": dropout, "rank_pattern": rank_pattern
    }  # fmt: skip
    adapter = _adalora(stored.config, shared) if stored.config["peft_type"] == "ADALORA" else LoRA(**shared)
    return adapter, {name: of_layer / alpha for name, of_layer in alphas.items()}


def _adalora(config: Mapping[str, Any], shared: Mapping[str, Any]) -> AdaLoRA:
    """PEFT counts its schedule in steps, ours in shares of them; what a folder leaves out has PEFT's default."""
    schedule: dict[str, Any] = {}
    if steps := config.get("total_step"):
        schedule = {"initial_warmup": config.get("tinit", 0) / steps, "final_tuning": config.get("tfinal", 0) / steps}
    else:
        warnings.warn(
            "this AdaLoRA was saved without total_step, so that its schedule is not known: outputs are PEFT's, but if "
            "you train on, ranks are pruned on the schedule of AdaLoRA's defaults here",
            stacklevel=4,
        )
    return AdaLoRA(
        **shared,
        **schedule,
        target_rank=min(config.get("target_r", 8), shared["rank"]),
        interval=config.get("deltaT", 1),
        betas=(config.get("beta1", 0.85), config.get("beta2", 0.85)),
        orthogonality=config.get("orth_reg_weight", 0.5),
    )


def _targets(model: nn.Module, sites: list[Site]) -> str | tuple[str, ...]:
    """Semantic targets if they mean exactly these sites, else a regular expression."""
    keys = {site.key for site in sites}
    roles = tuple(role for role in ROLES if role in {site.role for site in sites})
    if all(site.role != WHOLE for site in sites) and {site.key for site in find_sites(model, roles)} == keys:
        return roles
    return exact_pattern([site.key for site in sites], [site.key for site in find_sites(model, "")])


def _default_and_others(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """The most frequent value, and a pattern for each other one."""
    default = Counter(values.values()).most_common(1)[0][0]
    others = [value for value in dict.fromkeys(values.values()) if value != default]
    return default, {exact_pattern([name for name, v in values.items() if v == o], list(values)): o for o in others}


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
