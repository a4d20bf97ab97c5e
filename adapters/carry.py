"""Carry a second stream from block to block: what side networks need, without state that a repeated pass would spoil.

Each extended block takes (x, carried) and hands (x, carried) on; the first takes a bare x and the last returns one. So
the carried stream goes the way of the data: it works wherever the blocks themselves are called one after another, under
gradient checkpointing (timm's and open_clip's call the blocks, not their container), in deepcopies and in threads.
Reentrant checkpointing sees no gradient in a tuple, and is refused. What reads the output of a single block, as timm's
`forward_intermediates` does, gets the pair.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
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
        """Tokens, or (tokens, carried) -> the same; from the last block tokens. Other arguments are the block's own.

        Raises:
            ValueError: under reentrant checkpointing.
        """
        carried = None
        if isinstance(x, tuple):
            x, carried = x
            if x.requires_grad and not torch.is_grad_enabled():
                raise ValueError(
                    "a stream that is carried from block to block loses its gradient under reentrant checkpointing; "
                    "use use_reentrant=False"
                )
        stock = super().forward

        def run(tokens: Any, module: Callable[..., Tensor] = stock) -> Tensor:
            return module(tokens, *args, **kwargs)

        x, carried = self.around(x, carried, run)
        return x if self.last else (x, carried)

    @abstractmethod
    def around(self, x: Tensor, carried: Any, block: Callable[..., Tensor]) -> tuple[Tensor, Any]:
        """The block's input, what is carried (None in the first block) and the stock block -> output, carried on.

        `block(tokens)` runs the stock block, `block(tokens, module)` another one under the same masks.
        """
