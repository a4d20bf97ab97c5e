"""The adapters by name: a method is one file and one line here."""

from __future__ import annotations

from adapters.adalora import AdaLoRA
from adapters.adaptformer import AdaptFormer
from adapters.base import Adapter
from adapters.bitfit import BitFit
from adapters.dtl import DTL, DTLPlus
from adapters.fact import FacTTK, FacTTT
from adapters.houlsby import Houlsby
from adapters.lora import LoRA
from adapters.lst import LST
from adapters.moslora import MoSLoRA
from adapters.noah import NOAH
from adapters.prefix import Prefix
from adapters.ssf import SSF
from adapters.unipt import UniPT
from adapters.vpt import VPT
from adapters.whole import Full, Linear, Partial

ADAPTERS: dict[str, type[Adapter]] = {
    "full": Full,
    "linear": Linear,
    "partial": Partial,
    "bitfit": BitFit,
    "houlsby": Houlsby,
    "adaptformer": AdaptFormer,
    "prefix": Prefix,
    "vpt": VPT,
    "ssf": SSF,
    "lst": LST,
    "unipt": UniPT,
    "adalora": AdaLoRA,
    "lora": LoRA,
    "moslora": MoSLoRA,
    "fact_tt": FacTTT,
    "fact_tk": FacTTK,
    "dtl": DTL,
    "dtl_plus": DTLPlus,
    "noah": NOAH,
}
