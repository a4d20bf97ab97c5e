"""From Hugging Face PEFT: what its `save_pretrained` wrote, into a fresh stock model; peft itself is not needed."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from adapters.adalora import AdaLoRA
from adapters.inject import inject
from adapters.lora import LoRA, LowRank
from adapters.patterns import default_and_others, exact_pattern
from adapters.peft_folder import PEFT_PREFIX, PeftFolder, first, is_target, modules_to_save, natural, read_folder
from adapters.targets import ROLES, WHOLE, Site, find_sites

# Values of PEFT's init_lora_weights with which it changes the backbone's own weights.
CHANGED_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    rank, rank_pattern = default_and_others(ranks)
    alphas = {name: update.alpha for name, update in updates.items()}
    alpha, _ = default_and_others(alphas)
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
