"""Carry a second stream from block to block: what side networks need, without state that a repeated pass would spoil.

Each extended block takes (x, carried) and hands (x, carried) on; the first takes a bare x and the last returns one. So
the carried stream goes the way of the data: it works wherever the blocks themselves are called one after another, under
gradient checkpointing (timm's and open_clip's call the blocks, not their container), in deepcopies and in threads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from adapters.extend import Extension


class CarryingBlock(Extension):
    """A block with a carried stream.

    Attributes:
        last: whether it ends the stream; set it beside whatever else the extension adds.
    """

    added: ClassVar[tuple[str, ...]] = ("last",)
    last: bool

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Tokens, or (tokens, carried) -> the same; from the last block tokens. Other arguments are the block's own."""
        x, carried = x if isinstance(x, tuple) else (x, None)
        stock = super().forward
        x, carried = self.around(x, carried, lambda tokens: stock(tokens, *args, **kwargs))
        return x if self.last else (x, carried)

    @abstractmethod
    def around(self, x: Tensor, carried: Any, block: Callable[[Tensor], Tensor]) -> tuple[Tensor, Any]:
        """The block's input, what is carried (None in the first block) and the stock block -> output, carried on."""
