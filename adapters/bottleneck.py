"""The bottleneck of Houlsby adapters and AdaptFormer: down to a few channels, a nonlinearity, and up again.

    up(f(down x)) = activations @ basis + b_up        activations = f(x W_down^T + b_down) (N, r), basis = W_up^T (r, d)

So after its nonlinearity a bottleneck is a sum of rank-1 parts too, one for each of its channels; the bias b_up
is left out of them. The activations are those that the forward pass uses: after dropout, with the scale.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.base import Record, branch_tensors
from adapters.extend import Extension, extend
from adapters.targets import compiled
from adapters.towers import Block, Tower, find_towers

ROLE = "bottleneck"


class Bottleneck(nn.Module):
    """Two linear maps with biases, `down` (r, d) and `up` (d, r); its maker sets their first values.

    Args:
        width: channels d of what it is applied to.
        size: channels r of the bottleneck.
        activation: the nonlinearity f, a function of a module (so that a model with it can be pickled).
        scale: factor of the output.
        dropout: probability of dropping one of the r channels' values in training.
        like: a weight whose device and dtype the parameters take.
        channels: the dimension of the input that holds its channels.
    """

    def __init__(
        self, width: int, size: int, activation: Callable[[Tensor], Tensor], scale: float, dropout: float, like: Tensor,
        channels: int = -1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.down = nn.Linear(width, size, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(size, width, device=like.device, dtype=like.dtype)
        self.activation, self.scale, self.dropout, self.channels = activation, scale, dropout, channels
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        """x (..., d), or with its channels elsewhere -> scale * up(f(down x)), of the same shape."""
        x = x.movedim(self.channels, -1)
        hidden = self.activation(self.down(x.reshape(-1, x.shape[-1])))
        activations = F.dropout(hidden, self.dropout, self.training) * self.scale  # (N, r)
        if record is not None:
            record(ROLE, activations, self.up.weight.T, x.shape[:-1])
        out = F.linear(activations, self.up.weight, self.up.bias * self.scale)
        return out.view(x.shape).movedim(-1, self.channels)


class Bottlenecked(Extension):
    """A module with a bottleneck on the residual stream that runs through it, or along it.

    Attributes:
        branches: the bottleneck, under `ROLE`: as for a low-rank update, a file names it "<layer>.branches.<role>".
        record: what a forward pass calls with the bottleneck's subspaces, or None. `regularizers.capture` sets it.
    """

    added = ("branches", "record")
    branches: nn.ModuleDict
    record: Record | None

    def hold(self, bottleneck: Bottleneck) -> None:
        """Take in the bottleneck, in the mode (training or not) of the module itself."""
        self.branches = nn.ModuleDict({ROLE: bottleneck.train(self.training)})
        self.record = None

    def bottleneck(self, x: Tensor) -> Tensor:
        """What is added for x: of the same shape."""
        out: Tensor = self.branches[ROLE](x, self.record)
        return out

    @property
    def roles(self) -> tuple[str, ...]:
        return (ROLE,)

    def weight_subspaces(self, role: str) -> tuple[Tensor, Tensor]:
        """Without biases and nonlinearity: activations (d, r) = scale W_down^T, basis (r, d) = W_up^T."""
        module = cast(Bottleneck, self.branches[role])
        return module.down.weight.T * module.scale, module.up.weight.T


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapter:
    """The settings that the two methods share.

    Args:
        bottleneck: channels r.
        bottleneck_pattern: other sizes for some layers: regular expression -> channels; the first that is found in the
            layer's path counts, such as ``{"visual": 96}`` for one tower of CLIP.

    Raises:
        ValueError: for a bottleneck below 1 or a pattern that is no regular expression.
    """

    name: ClassVar[str]
    not_mergeable: ClassVar[str] = "the weights of a linear layer cannot hold the nonlinearity of a bottleneck"
    bottleneck: int
    bottleneck_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bottleneck_pattern", dict(self.bottleneck_pattern))
        if min(sizes := [self.bottleneck, *self.bottleneck_pattern.values()]) < 1:
            raise ValueError(f"{self.name} needs bottleneck >= 1, but got {', '.join(map(str, sizes))}")
        for pattern in self.bottleneck_pattern:
            compiled(pattern)

    @abstractmethod
    def sites(self, tower: Tower, block: Block) -> Iterable[tuple[str, type[Extension]]]:
        """What to extend in a block: the path of a module in it, and its extension, with a bottleneck or without."""

    @abstractmethod
    def module(self, width: int, size: int, like: Tensor, channels: int) -> Bottleneck:
        """A bottleneck with its first values; the arguments are those of `Bottleneck`."""

    def apply(self, model: nn.Module) -> None:
        found: list[tuple[str, nn.Module, type[Extension], Block]] = []
        for tower in find_towers(model, method=self.name):
            for block in tower.blocks:
                for path, extension in self.sites(tower, block):
                    found.append((f"{block.name}.{path}", part_of(block, path, self.name), extension, block))
        layers = [layer for layer, _, extension, _ in found if issubclass(extension, Bottlenecked)]
        for pattern in self.bottleneck_pattern:
            if not any(compiled(pattern).search(layer) for layer in layers):
                raise ValueError(
                    f"bottleneck_pattern {pattern!r} is found in no layer that {self.name} adapts, such as {layers[0]}"
                )
        for layer, part, extension, block in found:
            extended = extend(part, extension)
            if isinstance(extended, Bottlenecked):
                size = next((n for p, n in self.bottleneck_pattern.items() if compiled(p).search(layer)), None)
                # ConvNeXt's small sizes run their MLP as 1x1 convolutions, on (B, C, H, W).
                channels = 1 if getattr(block.module, "use_conv_mlp", False) else -1
                extended.hold(self.module(block.width, size or self.bottleneck, block.like, channels))

    def stored_subspaces(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """See `LowRankAdapter`: the pair of `Bottlenecked.weight_subspaces`."""
        scale: float = getattr(self, "scale", 1.0)
        parts = branch_tensors(tensors)
        return {name: (part["down.weight"].T * scale, part["up.weight"].T) for name, part in parts.items()}


def part_of(block: Block, path: str, method: str) -> nn.Module:
    """The module at `path` in a block; raises ValueError, in the name of `method`, if there is none."""
    try:
        part: nn.Module = block.module.get_submodule(path)
    except AttributeError:
        there = ", ".join(name for name, _ in block.module.named_children())
        raise ValueError(
            f"{method} goes into a block's {path}, but {block.name} ({type(block.module).__name__}) has {there}"
        ) from None
    return part
