"""The rank-1 subspaces of an adapter that lies on the disk, without the model that it was trained in.

from adapters import stored_subspaces
activations, basis = stored_subspaces("adapter.safetensors")["bert.encoder.layer.0.attention.self.query.q"]

A file of this suite is read by the adapter that wrote it (`LowRankAdapter.stored_subspaces`), a folder of Hugging Face
PEFT by what its LoRA and AdaLoRA document (`adapters.peft_folder`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from adapters.base import LowRankAdapter
from adapters.io import read
from adapters.methods import ADAPTERS
from adapters.peft_folder import natural, read_folder


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
    tensors = {name: tensors[name] for name in sorted(tensors, key=natural)}
    rest = (name for name in tensors if ".branches." not in name)
    return StoredSubspaces(adapter.stored_subspaces(tensors), rest)


def _of_peft(folder: Path) -> StoredSubspaces:
    """What `peft.PeftModel.save_pretrained` wrote, for LoRA and AdaLoRA on linear layers."""
    _, updates, rest = read_folder(folder)
    pairs = {}
    for layer, update in updates.items():
        scale: float | Tensor = update.scale if update.e is None else update.e.float() * update.scale
        pairs[layer] = (update.a.T.float() * scale, update.b.T)
    return StoredSubspaces(pairs, rest)
