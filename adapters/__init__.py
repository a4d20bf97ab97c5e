"""Parameter-efficient adapters for any torch module: what is trained.

from adapters import LoRA, inject, merge, save, load, trainable_parameters
inject(model, LoRA(rank=8, alpha=8, targets=("q", "k", "v")), train=("head",))
...                                    # train
save(model, "adapter.safetensors")     # the trained tensors and the configuration
stored_subspaces("adapter.safetensors")  # layer -> its rank-1 parts, without the model; PEFT folders too
merge(model)                           # the backbone's own classes and keys, the same outputs
"""

from __future__ import annotations

from adapters.torchvision_cpu import declare_missing_operators

declare_missing_operators()  # before anything imports timm or open_clip

from adapters.base import Adapter, LowRankAdapter  # noqa: E402
from adapters.dtl import DTL, DTLPlus  # noqa: E402
from adapters.inject import adapter_parameters, adapter_table, inject, merge, trainable_parameters  # noqa: E402
from adapters.io import load, save  # noqa: E402
from adapters.lora import LoRA  # noqa: E402
from adapters.methods import ADAPTERS  # noqa: E402
from adapters.stored import stored_subspaces  # noqa: E402
from adapters.whole import Full, Linear, Partial  # noqa: E402

__all__ = [
    "ADAPTERS",
    "DTL",
    "Adapter",
    "DTLPlus",
    "Full",
    "Linear",
    "LoRA",
    "LowRankAdapter",
    "Partial",
    "adapter_parameters",
    "adapter_table",
    "inject",
    "load",
    "merge",
    "save",
    "stored_subspaces",
    "trainable_parameters",
]
