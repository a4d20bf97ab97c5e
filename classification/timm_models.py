"""The backbones of the paper's Tables 2 to 5 from weights on the disk: timm's ViT-B/16, Swin-B and ConvNeXt-B."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict, model_entrypoint
from torch import Tensor, nn

POOLS = ("default", "patches")
RANDOM = "random"


class ImageClassifier(nn.Module):
    """A whole timm model, whose head is new.

    Args:
        backbone: takes images, gives logits.
        classifier: where its last linear layer is.
    """

    frozen_parameters = 0  # beside the model: none

    def __init__(self, backbone: nn.Module, classifier: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = (f"backbone.{classifier}",)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """images (B, 3, H, W) -> {"logits": (B, C)}, and the labels (B,) handed through where they are given."""
        outputs = {"logits": self.backbone(images)}
        return outputs if labels is None else outputs | {"labels": labels}


def timm_classifier(
    cache: Path,
    image_size: int,
    classes: int,
    *,
    architecture: str,
    weights: str,
    drop_path: float = 0.0,
    pool: str = "default",
) -> tuple[None, ImageClassifier]:
    """A timm model with pretrained weights and a new head: normal values of deviation 0.02, biases of zero.

    Args:
        cache: not used; these weights are not embedded.
        image_size: pixels.
        classes: number of classes.
        architecture: timm's name, "vit_base_patch16_224".
        weights: a file on the disk: the original ``.npz`` of a ViT, or a state dict (``.safetensors``; ``.pth``, read
            without unpickling anything but tensors). "random" trains from nothing.
        drop_path: rate of stochastic depth in training.
        pool: what the head reads: the architecture's "default" (a ViT's class token after its norm) or, on a ViT, the
            norm of the mean of all "patches", as DTL does.

    Returns:
        (None, as no block's output is cached; the model in evaluation mode).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: for an unknown architecture or pool, or weights that cannot be read or are of another architecture.
    """
    if not timm.is_model(architecture):
        close = ", ".join(timm.list_models(f"*{architecture.split('_')[0]}*")[:5])
        raise ValueError(f"model.architecture is {architecture!r}, which timm does not have; it has {close} ...")
    if pool not in POOLS:
        raise ValueError(f"model.pool is {pool!r}; expected one of {', '.join(POOLS)}")
    sized = any(kind in architecture for kind in ("vit", "deit", "swin"))  # positions and windows depend on the size
    sizes: dict[str, Any] = {"img_size": image_size} if sized else {}
    model: Any = timm.create_model(architecture, num_classes=0, drop_path_rate=drop_path, **sizes)
    if weights != RANDOM:
        load_weights(model, Path(weights))
    if pool == "patches":
        if getattr(model, "global_pool", None) != "token":
            raise ValueError(
                f"model.pool=patches is for a ViT that reads its class token; {architecture} pools already"
            )
        model.global_pool, model.fc_norm, model.norm = "avg", model.norm, nn.Identity()
    model.reset_classifier(classes)
    classifier = model.pretrained_cfg["classifier"]
    head = model.get_submodule(classifier)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return None, ImageClassifier(model, classifier).eval()


def load_weights(model: Any, path: Path) -> None:
    """Fill a timm model without a head from a file; what the file has of a head is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or a pickle of more than tensors, lacks something of the model, or holds more
            than its head.
    """
    architecture = model.pretrained_cfg["architecture"]
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}; nothing is downloaded: put them there or name another file with model.weights=FILE "
            f"(conf/model says where {architecture}'s come from); model.weights=random trains from nothing"
        )
    if path.suffix == ".npz":
        if not hasattr(model, "load_pretrained"):
            raise ValueError(f"{path} is in the format of the original ViTs; {architecture} needs a state dict")
        try:
            model.load_pretrained(str(path))
        except (KeyError, AssertionError, RuntimeError) as error:
            raise _another(path, architecture, error) from error
        except Exception as error:  # zipfile and zlib have errors of their own for a damaged file
            raise _unreadable(path, error) from error
        return
    renamed = getattr(sys.modules[model_entrypoint(architecture).__module__], "checkpoint_filter_fn", None)
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # so have safetensors, torch and pickle
        raise _unreadable(path, error) from error
    try:
        state = renamed(state, model) if renamed else state
    except Exception as error:  # timm looks for the places of what it renames
        raise _another(path, architecture, error) from error
    classifier = model.pretrained_cfg["classifier"]
    head = (f"{classifier}.", "head.weight", "head.bias", "pre_logits.", "head_dist.")
    own = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    try:
        missing, unexpected = model.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise _another(path, architecture, error) from error
    if missing or unexpected:
        lists = [", ".join(names[:5]) or "nothing" for names in (missing, unexpected)]
        raise _another(path, architecture, f"missing {lists[0]}; not known there {lists[1]}")


def _another(path: Path, architecture: str, why: object) -> ValueError:
    return ValueError(f"{path} does not hold the weights of {architecture}: {' '.join(str(why).split())}")


def _unreadable(path: Path, error: Exception) -> ValueError:
    first = str(error).partition("\n")[0].partition(". ")[0]  # what follows is advice for who calls torch
    return ValueError(
        f"{path} cannot be read as weights ({type(error).__name__}: {first}); if it is cut off or damaged, get it "
        "again; a pickle that holds more than tensors is not opened, take its state dict or a .safetensors file"
    )
