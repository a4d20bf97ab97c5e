"""What a model is wrapped in: what `capture` sees through, and what it refuses."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import NoReturn, cast

from torch import nn

SHARDING = ("FSDPModule", "FullyShardedDataParallel")  # classes of FSDP 2 and 1, by name: to import them takes long


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel.

    Raises:
        ValueError: for wrappers in which hooks do not work, or that shard parameters.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError("capture does not work with DataParallel, which runs copies; use DistributedDataParallel")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = cast(nn.Module, model.module)
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if (wrapper := _sharding(module.__class__)) is not None:
            _refuse_shards(where, f"wrapped by {wrapper}")
        own = vars(module)
        compiled = own.get("_compiled_call_impl") is not None or "_orig_mod" in own["_modules"]
        if compiled or hasattr(own.get("forward"), "_torchdynamo_orig_callable"):
            raise ValueError(
                f"{where} is compiled, and torch.compile drops hooks that come after it, so that nothing would be "
                "captured. Train the module that you passed to torch.compile"
            )
    return model


def check_unsharded(model: nn.Module, layers: Collection[str]) -> None:
    """Raise ValueError if a parameter of these layers is a shard of it."""
    for layer in layers:
        for name, parameter in model.get_submodule(layer).named_parameters():
            if hasattr(parameter, "ds_id"):
                _refuse_shards(f"{layer}.{name}", "partitioned by DeepSpeed's ZeRO-3")
            if type(parameter).__name__ == "DTensor":
                _refuse_shards(f"{layer}.{name}", "a DTensor")


@lru_cache(maxsize=512)
def _sharding(module: type[nn.Module]) -> str | None:
    """The class that makes modules of this one shard their parameters."""
    return next((base.__name__ for base in module.__mro__ if base.__name__ in SHARDING), None)


def _refuse_shards(what: str, kind: str) -> NoReturn:
    raise ValueError(
        f"{what} is {kind}: capture does not work with parameters that are sharded over processes, for a layer's basis "
        "is gone after its forward pass. Use DistributedDataParallel, ZeRO-1 or ZeRO-2"
    )
