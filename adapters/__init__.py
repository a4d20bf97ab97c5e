"""Parameter-efficient adapters for any torch module: what is trained.

from adapters import LoRA, inject, merge, save, load, trainable_parameters
inject(model, LoRA(rank=8, alpha=8, targets=("q", "k", "v")), train=("head",))
...                                    # train
save(model, "adapter.safetensors")     # the trained tensors and the configuration
stored_subspaces("adapter.safetensors")  # layer -> its rank-1 parts, without the model; PEFT folders too
load_peft(model, folder); export_peft(model, folder)  # Hugging Face PEFT's folders
merge(model)                           # the backbone's own classes and keys, the same outputs
"""

from __future__ import annotations

from adapters.torchvision_cpu import declare_missing_operators

declare_missing_operators()  # before anything imports timm or open_clip

from adapters.adalora import AdaLoRA  # noqa: E402
from adapters.adaptformer import AdaptFormer  # noqa: E402
from adapters.base import Adapter, LowRankAdapter, PenalizedAdapter, ScheduledAdapter  # noqa: E402
from adapters.bitfit import BitFit  # noqa: E402
from adapters.dtl import DTL, DTLPlus  # noqa: E402
from adapters.fact import FacTTK, FacTTT  # noqa: E402
from adapters.houlsby import Houlsby  # noqa: E402
from adapters.inject import (  # noqa: E402
    adapter_parameter_names,
    adapter_table,
    after_step,
    inject,
    loss_parts,
    trainable_parameters,
)
from adapters.io import load, save  # noqa: E402
from adapters.lora import LoRA  # noqa: E402
from adapters.lst import LST  # noqa: E402
from adapters.merging import merge  # noqa: E402
from adapters.methods import ADAPTERS  # noqa: E402
from adapters.moslora import MoSLoRA  # noqa: E402
from adapters.noah import NOAH  # noqa: E402
from adapters.peft_export import export_peft  # noqa: E402
from adapters.peft_import import load_peft  # noqa: E402
from adapters.prefix import Prefix  # noqa: E402
from adapters.ssf import SSF  # noqa: E402
from adapters.stored import stored_subspaces  # noqa: E402
from adapters.unipt import UniPT  # noqa: E402
from adapters.vpt import VPT  # noqa: E402
from adapters.whole import Full, Linear, Partial  # noqa: E402

__all__ = [
    "ADAPTERS",
    "DTL",
    "LST",
    "NOAH",
    "SSF",
    "VPT",
    "AdaLoRA",
    "AdaptFormer",
    "Adapter",
    "BitFit",
    "DTLPlus",
    "FacTTK",
    "FacTTT",
    "Full",
    "Houlsby",
    "Linear",
    "LoRA",
    "LowRankAdapter",
    "MoSLoRA",
    "Partial",
    "PenalizedAdapter",
    "Prefix",
    "ScheduledAdapter",
    "UniPT",
    "adapter_parameter_names",
    "adapter_table",
    "after_step",
    "export_peft",
    "inject",
    "load",
    "load_peft",
    "loss_parts",
    "merge",
    "save",
    "stored_subspaces",
    "trainable_parameters",
]
