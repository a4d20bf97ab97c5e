"""The adapters by name: a method is one file and one line here."""

from __future__ import annotations

from adapters.base import Adapter
from adapters.dtl import DTL, DTLPlus
from adapters.lora import LoRA
from adapters.whole import Full, Linear, Partial

ADAPTERS: dict[str, type[Adapter]] = {
    "full": Full,
    "linear": Linear,
    "partial": Partial,
    "lora": LoRA,
    "dtl": DTL,
    "dtl_plus": DTLPlus,
}
