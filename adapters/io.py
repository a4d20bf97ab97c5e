"""One safetensors file: the tensors that trained, and in its metadata all that is needed to put them back.

The file holds every parameter that the injection trains, also while it is frozen for evaluation, and the persistent
buffers beside them and in what `train` names (the running statistics of a batch norm in a head). The metadata holds the
adapter's configuration, what trained besides it, and an identity of the frozen rest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adapters.base import Adapter
from adapters.inject import (
    Injection,
    check_fresh,
    inject,
    injection,
    is_below,
    trained_parameters,
    unchanged_on_error,
    uncompiled,
)
from adapters.methods import ADAPTERS

FORMAT = "resora-adapter-1"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what the injection trains, and the adapter's configuration, to one safetensors file (atomically).

    Raises:
        ValueError: if the model holds no adapter, if it has been merged, or if a parameter trains that is not the
            injection's, which `load` could not put back.
    """
    model = uncompiled(model)
    if (held := injection(model)) is None:
        merged = hasattr(model, "injection")
        hint = (
            "save before merge, or the merged model by its state_dict"
            if merged
            else "call inject(model, adapter) first"
        )
        raise ValueError(f"{type(model).__name__} holds no adapter{' any more' if merged else ''}: {hint}")
    path, trained = Path(path), trained_parameters(model)
    if other := [name for name, p in model.named_parameters() if p.requires_grad and p not in trained]:
        raise ValueError(
            f"{other[0]} trains, but {held.adapter.name} with train={held.train} does not say so, and load could not "
            "put it back: name it in inject(model, adapter, train=...), or freeze it before save"
        )
    metadata = {
        "format": FORMAT,
        "adapter": json.dumps({"name": held.adapter.name, **asdict(cast(Any, held.adapter))}),
        "train": json.dumps(held.train),
        "base": base_identity((name, p) for name, p in model.named_parameters() if p not in trained),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _saved(model).items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may write it at the same time
    try:
        save_file(tensors, partial, metadata=metadata)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())  # before it has its name: a power cut leaves the old file or the new one
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # of a disk that is full: the next attempt has another name


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Put a saved adapter into `model`, in place: into a fresh backbone, or one that holds the same adapter already.

    Returns:
        The same model.

    Raises:
        ValueError: if the file is not one of ours, was trained on another backbone, was made with another
            configuration than the model's, or its tensors are not exactly the model's (missing, unexpected and
            misshaped ones are named). Nothing has changed then.
    """
    compiled, model = model, uncompiled(model)
    adapter, tensors, metadata = read(path)
    train = tuple(json.loads(metadata["train"]))
    held = injection(model)
    if held is not None and (held.adapter != adapter or held.train != train):
        raise ValueError(
            f"{path} holds {adapter} with train={train}, but the model {held.adapter} with train={held.train}"
        )
    if held is None:  # what will be frozen: all that is not in the file
        check_fresh(model)
        trains = (*tensors, *Injection(adapter, train).whole)
        frozen = {name: p for name, p in model.named_parameters() if not is_below(name, trains)}
    else:
        trained = trained_parameters(model)
        frozen = {name: p for name, p in model.named_parameters() if p not in trained}
    if metadata["base"] != (identity := base_identity(frozen.items())):
        hint = ""
        if torch.float16 in {tensor.dtype for tensor in (*tensors.values(), *frozen.values())}:
            hint += ", in the precision that it was saved in: float16 rounds them to others"
        begin = {name.partition(".")[0] for name in tensors}
        if not begin & {name.partition(".")[0] for name in model.state_dict()}:
            hint += f"; its names begin with {min(begin)}, and none here: if a wrapper (DDP) was saved, load it there"
        raise ValueError(
            f"{path} was trained on another backbone (frozen weights {metadata['base'][:12]}, here {identity[:12]}): "
            f"load the weights that it was trained on before the adapter{hint}"
        )
    if held is not None:
        _copy(tensors, _saved(model), path)
        return compiled
    with unchanged_on_error(model):
        inject(model, adapter, train)
        _copy(tensors, _saved(model), path)
    return compiled


def read(path: str | os.PathLike[str]) -> tuple[Adapter, dict[str, Tensor], dict[str, str]]:
    """A file that `save` wrote -> the adapter's configuration, the tensors by name, the metadata. No model is needed.

    Raises:
        ValueError: if the file is not one of ours, or holds an adapter that this version does not know.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not an adapter file of this suite: format {metadata.get('format')!r}, not {FORMAT!r}"
        )
    if missing := {"adapter", "train", "base"} - metadata.keys():
        raise ValueError(f"{path} is not complete: its metadata lack {', '.join(sorted(missing))}")
    settings = json.loads(metadata["adapter"])
    if (name := settings.pop("name")) not in ADAPTERS:
        raise ValueError(f"{path} holds adapter {name!r}; this version knows {', '.join(ADAPTERS)}")
    try:
        return ADAPTERS[name](**settings), tensors, metadata
    except TypeError as error:
        raise ValueError(f"{path} holds {name} with settings that this version does not know: {error}") from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata; raises ValueError for another kind of file."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or was cut off ({error})") from None


def base_identity(frozen: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names, shapes and about 64 values of each parameter of a backbone.

    Values are read in bfloat16, so that a backbone is the same backbone in float32 and in bfloat16.
    """
    digest = hashlib.sha256()
    for name, parameter in frozen:
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _saved(model: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a model with an adapter, by name (the first one of parameters that are tied).

    That is the parameters that the injection trains, and the persistent buffers of modules that own one of them, lie
    where everything trains, or are batch norms, whose statistics move in training, frozen or not.
    """
    held, trained = injection(model), trained_parameters(model)
    assert held is not None
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p in trained}
    for path, module in model.named_modules():
        owns = any(parameter in trained for parameter in module.parameters(recurse=False))
        if owns or is_below(path, held.whole) or isinstance(module, _BatchNorm):
            persistent = {
                n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set
            }
            tensors |= {f"{path}.{name}" if path else name: buffer for name, buffer in persistent.items()}
    return tensors


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Copy; raises ValueError, before it does, unless both hold the same names and shapes."""
    missing, unexpected = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
    shapes = [f"{n} {tuple(source[n].shape)} instead of {tuple(t.shape)}" for n, t in target.items()
              if n in source and source[n].shape != t.shape]  # fmt: skip
    if missing or unexpected or shapes:
        raise ValueError(
            f"{path} does not fit the model: missing {missing}, unexpected {unexpected}, misshaped {shapes}"
        )
    for name, tensor in target.items():
        tensor.copy_(source[name])
