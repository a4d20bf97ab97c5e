"""The adapters by name: a method is one file and one line here."""

from __future__ import annotations

from adapters.base import Adapter
from adapters.fact import FacTTK, FacTTT
from adapters.lora import LoRA
from adapters.whole import Full, Linear, Partial

ADAPTERS: dict[str, type[Adapter]] = {
    "full": Full,
    "linear": Linear,
    "partial": Partial,
    "lora": LoRA,
    "fact_tt": FacTTT,
    "fact_tk": FacTTK,
}
