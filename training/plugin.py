"""ReSoRA for an existing `transformers.Trainer` script, with this suite's adapters or any PEFT model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer

from regularizers import ReSoRA


class _Noted(NamedTuple):
    """A part of the loss since it was logged last."""

    total: Tensor
    batches: int
    last: Tensor


class ReSoRAMixin:
    """Adds the penalty to the loss of a `transformers.Trainer` subclass; put it first among the bases.

        class MyTrainer(ReSoRAMixin, Seq2SeqTrainer): ...

    In training, the forward pass runs inside `regularizer.capture(model)` and each part of the penalty is added to the
    loss and logged under its own name ("resora_linear"). Evaluation is left alone. With gradient accumulation every
    batch is penalised on its own samples and the penalties are averaged, as the losses are; under DDP likewise over
    the processes.

    Args:
        regularizer: the penalty, or None for none.
        args, kwargs: as of the trainer.
    """

    def __init__(self, *args: Any, regularizer: ReSoRA | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.regularizer = regularizer
        self._noted: dict[str, _Noted] = {}

    part_prefix = ""
    """Before the name of each part in the log."""

    if TYPE_CHECKING:  # what the trainer beside this class brings
        current_gradient_accumulation_steps: int
        model_accepts_loss_kwargs: bool
        compute_loss_func: Any

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The trainer's loss plus, in training, the penalty."""
        base: Any = super()
        if self.regularizer is None or not model.training:
            return base.compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        with self.regularizer.capture(model) as subspaces:  # left before backward, see `capture`
            loss, outputs = base.compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch, **kwargs)
        penalties = self.regularizer(subspaces)
        self.note(penalties)
        penalty = torch.stack(list(penalties.values())).sum().to(loss.device)
        if self._loss_is_scaled(num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
        loss = loss + penalty
        return (loss, outputs) if return_outputs else loss

    def _loss_is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the loss is divided by the accumulated batch already, and the Trainer does not divide it again."""
        said: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return said
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def note(self, parts: dict[str, Tensor]) -> None:
        """Keep the parts of one batch's loss for the log."""
        for name, part in parts.items():
            before, last = self._noted.get(name), part.detach()
            self._noted[name] = (
                _Noted(before.total + last, before.batches + 1, last) if before else _Noted(last, 1, last)
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the trainer does, with the mean of each noted part of the loss since the last time."""
        if "loss" in logs:
            logs |= {self.part_prefix + name: float(p.total) / p.batches for name, p in self._noted.items()}
            self._noted = {}
        base: Any = super()
        base.log(logs, *args, **kwargs)


class ReSoRATrainer(ReSoRAMixin, Trainer):
    """`transformers.Trainer` with ReSoRA.

    trainer = ReSoRATrainer(model=peft_model, args=args, train_dataset=data, regularizer=ReSoRA("linear", weight=1e-2))
    """
