"""Weights of a CLIP from a local file, whatever it was saved as, into one of open_clip's architectures.

| file | read by |
|---|---|
| .safetensors with open_clip's keys, or OpenAI's | safetensors |
| .pt, .pth, .bin: a state dict, or a checkpoint of open_clip's training | torch.load(weights_only=True) |
| .pt: OpenAI's TorchScript archive (ViT-B-32.pt) | `retrieval.clip4clip.torchscript_archive` |

None of them runs code of the file.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrieval.clip4clip.torchscript_archive import is_torchscript, read_torchscript

OPENAI_ONLY = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI saved among the weights
NOT_WEIGHTS = (*OPENAI_ONLY, "attn_mask", "text.attn_mask")  # the latter are computed, but in a scripted module saved
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def check_there(weights: Path) -> None:
    """Raise a FileNotFoundError that says what is meant, if there is no such file."""
    if not weights.is_file():
        raise FileNotFoundError(
            f"no weights at {weights}: expected a local file (nothing is downloaded); for ViT-B/32, ViT-B-32.pt "
            "that github.com/openai/CLIP publishes; put it there, or set model.weights=FILE"
        )


def load_clip_weights(model: nn.Module, weights: Path, name: str, *, quick_gelu: bool) -> None:
    """Load a file into `model`, in place and in float32.

    Args:
        model: an open_clip `CLIP` or `CustomTextCLIP` with all its positions.
        weights: the file.
        name: the architecture's, for errors.
        quick_gelu: whether the architecture computes QuickGELU, as OpenAI's weights need. Other files do not say which
            activation they were trained with, and with the wrong one they load and work badly.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of the above, holds more than tensors, or does not fit the architecture.
    """
    tensors = read_clip_weights(weights)
    if not quick_gelu and any(key in tensors for key in OPENAI_ONLY):
        raise ValueError(
            f"{weights} holds OpenAI's weights, which were trained with QuickGELU, but {name!r} computes GELU; "
            f"use {name}-quickgelu"
        )
    given = {key: value.float() for key, value in tensors.items() if key not in NOT_WEIGHTS}
    if hasattr(model, "text"):  # a CustomTextCLIP
        given = {
            key if key.startswith(("visual.", "text.", "logit_")) else f"text.{key}": v for key, v in given.items()
        }
    expected = model.state_dict()
    differences = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "misshaped": [
            f"{key} {tuple(given[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in given and given[key].shape != value.shape
        ],
    }
    if any(differences.values()):
        listed = "; ".join(f"{len(keys)} {kind}, {_first(keys)}" for kind, keys in differences.items() if keys)
        raise ValueError(f"{weights} does not hold the weights of {name!r}: {listed}")
    model.load_state_dict(given)


def read_clip_weights(weights: Path) -> dict[str, Tensor]:
    """The tensors of a file, by their names in it; raises as `load_clip_weights`."""
    check_there(weights)
    if weights.suffix not in SUFFIXES:
        raise ValueError(f"{weights} is no file of weights; expected one that ends in {', '.join(SUFFIXES)}")
    if weights.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"{weights} does not hold the weights of a CLIP: {error}") from error
    if is_torchscript(weights):
        return read_torchscript(weights)
    try:
        content: Any = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{weights} does not hold a state dict and nothing else, and is not opened: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{weights} holds {type(content).__name__}; expected a state dict, names and their tensors")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _first(names: list[str]) -> str:
    return f"such as {', '.join(names[:3])}" if len(names) > 3 else ", ".join(names)
