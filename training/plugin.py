"""ReSoRA for an existing `transformers.Trainer` script, with this suite's adapters or any PEFT model.

What an adapter of this suite brings to its training itself (AdaLoRA: a penalty and a schedule) comes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters import after_step, loss_parts
from regularizers import Captured, ReSoRA, Subspaces


class _Noted(NamedTuple):
    """A part of the loss since it was logged last."""

    total: Tensor
    batches: int
    last: Tensor


class ReSoRAMixin:
    """Adds the penalties to the loss of a `transformers.Trainer` subclass; put it first among the bases.

        class MyTrainer(ReSoRAMixin, Seq2SeqTrainer): ...

    In training, the forward pass runs inside `regularizer.capture(model)` and each part of the penalty is added to the
    loss and logged under its own name ("resora_linear"), and so are the parts of an adapter that was injected into the
    model ("adalora_orthogonality"), whose schedule is followed after each step. Evaluation is left alone. With gradient
    accumulation every batch is penalised on its own samples and the penalties are averaged, as the losses are; under
    DDP likewise over the processes.

    Args:
        regularizer: the penalty, or None for none.
        later_stage: the adapter's schedule ended in an earlier training.
        args, kwargs: as of the trainer.
    """

    def __init__(self, *args: Any, regularizer: ReSoRA | None = None, later_stage: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.regularizer = regularizer
        self._noted: dict[str, _Noted] = {}
        self._has_penalised = False
        self.add_callback(_FollowSchedule(later_stage))

    part_prefix = ""
    """Before the name of each part in the log."""

    if TYPE_CHECKING:  # what the trainer beside this class brings
        accelerator: Any
        add_callback: Any
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
        """The trainer's loss plus, in training, the penalties."""
        base: Any = super()
        if num_items_in_batch is not None:  # which not every trainer takes
            kwargs["num_items_in_batch"] = num_items_in_batch
        if not model.training:
            return base.compute_loss(model, inputs, return_outputs, **kwargs)
        captured = nullcontext(Captured()) if self.regularizer is None else self.regularizer.capture(model)
        with captured as subspaces:  # left before backward, see `capture`
            result = base.compute_loss(model, inputs, return_outputs, **kwargs)
        loss, outputs = result if return_outputs else (result, None)
        loss = self.penalised(loss, model, subspaces, scaled=self._loss_is_scaled(num_items_in_batch))
        return (loss, outputs) if return_outputs else loss

    def penalised(
        self, loss: Tensor, model: nn.Module, subspaces: Mapping[str, Subspaces], *, scaled: bool = False
    ) -> Tensor:
        """`loss` plus the parts that the adapter and the regularizer add; each is noted for the log.

        Args:
            loss: of one batch.
            model: as the trainer wraps it.
            subspaces: what the regularizer captured; {} where there is none.
            scaled: `loss` is divided by the number of accumulated batches already.
        """
        parts = loss_parts(self.accelerator.unwrap_model(model))
        if self.regularizer is not None:
            parts = parts | self.regularizer(subspaces)
            self._has_penalised = True
        if not parts:
            return loss
        self.note(parts)
        penalty = torch.stack([part.to(loss.device) for part in parts.values()]).sum()
        return loss + (penalty / self.current_gradient_accumulation_steps if scaled else penalty)

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
        """Log as the trainer does, with the mean of each noted part of the loss since the last time.

        All processes log a loss of training at the same step, and its parts are averaged over them as it is.

        Raises:
            RuntimeError: if a loss of training is logged, and the regularizer's penalty was never part of one.
        """
        if "loss" in logs:
            if self.regularizer is not None and not self._has_penalised:
                raise RuntimeError(
                    f"{type(self).__name__} has trained without {self.regularizer}: its training_step never called "
                    "compute_loss with the model in training mode. Add the penalty there: `with regularizer.capture"
                    "(model) as subspaces:` around the forward pass, then `loss = self.penalised(loss, model, "
                    "subspaces)`"
                )
            logs |= self._over_processes(
                {self.part_prefix + name: float(p.total) / p.batches for name, p in self._noted.items()}
            )
            self._noted = {}
        base: Any = super()
        base.log(logs, *args, **kwargs)

    def _over_processes(self, parts: dict[str, float]) -> dict[str, float]:
        """The means of these numbers over the processes, which all have the same parts."""
        if self.accelerator.num_processes == 1 or not parts:
            return parts
        own = torch.tensor(list(parts.values()), device=self.accelerator.device)
        return dict(zip(parts, self.accelerator.reduce(own, reduction="mean").tolist(), strict=True))


class _FollowSchedule(TrainerCallback):
    """Let the adapter follow its schedule, which spans the first stage; later ones count as steps after its end."""

    def __init__(self, later_stage: bool) -> None:
        self.later_stage = later_stage

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Here gradients are averaged over processes, clipped and not yet cleared, and this step is not yet counted."""
        before = state.max_steps if self.later_stage else 0
        after_step(kwargs["model"], before + state.global_step + 1, state.max_steps)


class ReSoRATrainer(ReSoRAMixin, Trainer):
    """`transformers.Trainer` with ReSoRA.

    trainer = ReSoRATrainer(model=peft_model, args=args, train_dataset=data, regularizer=ReSoRA("linear", weight=1e-2))
    """
