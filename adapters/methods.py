"""The adapters by name: a method is one file and one line here."""

from __future__ import annotations

from adapters.adalora import AdaLoRA
from adapters.base import Adapter
from adapters.lora import LoRA
from adapters.moslora import MoSLoRA
from adapters.whole import Full, Linear, Partial

ADAPTERS: dict[str, type[Adapter]] = {
    "full": Full,
    "linear": Linear,
    "partial": Partial,
    "adalora": AdaLoRA,
    "lora": LoRA,
    "moslora": MoSLoRA,
}
