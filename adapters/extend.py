"""Extend a module in place: it stays the same object, with the same parameters, hooks and state-dict keys.

    class Scaled(Extension):                       # what the module does besides what its class does
        added = ("gamma",)
        def forward(self, x): return super().forward(x) * self.gamma

    extend(layer, Scaled)                          # isinstance(layer, Scaled), and still of its own class
    restore(layer)                                 # the class it was of, without what `added` names

Wrapping a layer would rename every parameter below it and break what holds a reference to it; replacing its `forward`
would break `copy.deepcopy` and `torch.save`.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar, TypeVar, cast

from torch import nn


class Extension(nn.Module):
    """What a module gains; comes before the module's own class in the method resolution order.

    Attributes:
        added: names of the attributes (submodules, parameters, others) that `restore` takes away.
        stock_class: the class that the module was of.
    """

    added: ClassVar[tuple[str, ...]] = ()
    stock_class: ClassVar[type[nn.Module]]

    def merge(self) -> None:
        """Fold what was added into the module's own parameters and become a stock module again."""
        raise TypeError(f"{type(self).__name__} cannot be folded into {self.stock_class.__name__}")

    def __reduce_ex__(self, protocol: Any) -> Any:  # the combined class is made at run time: name its two halves
        return _rebuilt, (type(self).__mro__[1], self.stock_class), self.__getstate__()  # type: ignore[attr-defined]


E = TypeVar("E", bound=Extension)


def extend(module: nn.Module, extension: type[E]) -> E:
    """Make `module` an instance of `extension` besides its own class, in place.

    Raises:
        ValueError: if it is extended already.
    """
    if isinstance(module, Extension):
        raise ValueError(f"a {module.stock_class.__name__} is a {type(module).__name__} already")
    module.__class__ = _combined(extension, type(module))
    return cast(E, module)


def restore(module: Extension) -> None:
    """Undo `extend`, in place, also where what was to be added is there in part only."""
    for name in module.added:
        with contextlib.suppress(AttributeError):
            delattr(module, name)
    module.__class__ = module.stock_class  # type: ignore[assignment]


_COMBINED: dict[tuple[type[Extension], type[nn.Module]], type[nn.Module]] = {}


def _combined(extension: type[Extension], stock: type[nn.Module]) -> type[nn.Module]:
    if (extension, stock) not in _COMBINED:
        name = f"{extension.__name__}({stock.__name__})"
        _COMBINED[extension, stock] = type(name, (extension, stock), {"stock_class": stock})
    return _COMBINED[extension, stock]


def _rebuilt(extension: type[Extension], stock: type[nn.Module]) -> nn.Module:
    combined = _combined(extension, stock)
    return combined.__new__(combined)
