"""One training loop for every task: `transformers.Trainer` with a loss of named parts and the redundancy penalty."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, cast
from zipfile import is_zipfile

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters import load, save
from regularizers import Captured, ReSoRA
from training.chunked import check_chunkable, chunked_backward
from training.hardware import process_count
from training.kept_casts import KeptCasts
from training.plugin import ReSoRAMixin
from training.run import WEIGHTS

LAST_WRITTEN = "trainer_state.json"  # of a checkpoint, by the first process: where it is missing, that was killed


class ObjectiveTrainer(Trainer):
    """A `transformers.Trainer` whose loss is a function of the model's outputs: named parts, which are summed."""

    objective: Callable[[Any, float], Mapping[str, Tensor]]
    first_epoch: int
    note: Callable[[dict[str, Tensor]], None]
    loss_is_scaled_for_ga = False  # an objective is a mean over the batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs)
        loss = self.loss_of(outputs)
        return (loss, outputs) if return_outputs else loss

    def loss_of(self, outputs: Any) -> Tensor:
        """The sum of the parts of the loss of what the model put out; each is noted for the log."""
        parts = dict(self.objective(outputs, self.first_epoch + (self.state.epoch or 0.0)))
        self.note(parts)
        return torch.stack([_at_least_float32(part) for part in parts.values()]).sum()


def _at_least_float32(part: Tensor) -> Tensor:
    return part.to(torch.promote_types(part.dtype, torch.float32))


class AdapterTrainer(ReSoRAMixin, ObjectiveTrainer):
    """A `transformers.Trainer` for adapters: resume, mixed precision, DDP, accumulation and loggers are its own.

    A model may have a method `after_step()`, called after each step of the optimiser, which keeps its parameters in
    range (CLIP's logit scale).

    Args:
        objective: (what the model returns, epochs since the first stage began) -> named parts of the loss; they are
            summed.
        regularizer: a penalty on the subspaces of each training step, or None.
        evaluator: model -> metrics, run at the end of each epoch in the first process; logged with the prefix "eval_".
            Or None.
        train_dataset: what is trained on. One with a method `set_epoch(epoch)` is told which epoch begins, counted over
            all stages, so that its augmentation can be a function of seed, epoch and item.
        first_epoch: epochs that earlier stages trained.
        evaluate_every: epochs between two evaluations; the last epoch is always evaluated.
        chunk_size: items of a batch that go through the model at a time (see `training.chunked`), or None for all.
        save_minutes: minutes after which a checkpoint is written inside an epoch too, or None.
        kwargs: as of `transformers.Trainer`.
    """

    part_prefix = "part_"

    def __init__(
        self,
        *,
        objective: Callable[[Any, float], Mapping[str, Tensor]],
        train_dataset: Dataset,
        regularizer: ReSoRA | None = None,
        evaluator: Callable[[nn.Module], dict[str, float]] | None = None,
        first_epoch: int = 0,
        evaluate_every: int = 1,
        chunk_size: int | None = None,
        save_minutes: float | None = None,
        **kwargs: Any,
    ) -> None:
        items = _LaterEpochs(train_dataset, first_epoch)
        # The base class wants a data set beside `eval_strategy`; the evaluator brings its own.
        super().__init__(
            train_dataset=items,
            regularizer=regularizer,
            later_stage=first_epoch > 0,
            eval_dataset=None if evaluator is None else [],
            **kwargs,
        )
        self.objective = objective
        self.evaluator, self.first_epoch, self.chunk_size = evaluator, first_epoch, chunk_size
        self._casts = KeptCasts(cast(nn.Module, self.model))
        if chunk_size is not None:
            check_chunkable(cast(nn.Module, self.model))
        self.add_callback(_Epochs(items, evaluate_every))
        self.add_callback(_KeepInRange())
        self.add_callback(_Checkpoints(save_minutes))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The objective plus the penalty; raises FloatingPointError, with the parts, where it is not finite."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        self._check_finite(result[0] if isinstance(result, tuple) else result)
        return result

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward pass of one batch, in chunks if that was asked for."""
        with self._casts:
            if self.chunk_size is None:
                loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
                return loss
            return self._step_in_chunks(model, inputs, self.chunk_size)

    def _step_in_chunks(self, model: nn.Module, inputs: dict[str, Any], size: int) -> Tensor:
        model.train()

        def whole(outputs: Any, subspaces: Captured) -> Tensor:
            loss = self.penalised(self.loss_of(outputs), model, subspaces)
            self._check_finite(loss)
            return loss / self.current_gradient_accumulation_steps

        return chunked_backward(model, self._prepare_inputs(inputs), size, whole, self.regularizer)

    # Before the backward pass: behind it, the other processes would have these gradients, and make a step with them.
    def _check_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {float(part.last)}" for name, part in self._noted.items())
            raise FloatingPointError(
                f"the loss at step {self.state.global_step} is not finite: {values}; lower the learning rate, "
                "or train in float32 (trainer.precision=float32)"
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Run the evaluator on the unwrapped model of the first process and log its metrics in each.

        Its statistics of a batch norm are those that are saved, and one score is what all choose the best epoch by. The
        others wait, up to `training.stages.PATIENCE`.
        """
        assert self.evaluator is not None
        first = self.is_world_process_zero()
        found = self.evaluator(self.accelerator.unwrap_model(self.model)) if first else {}
        (found,) = broadcast_object_list([found])
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints hold what trains, not the frozen backbone, and nothing that has to be unpickled.
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # of several processes the first one writes; transformers calls this in all
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LAST_WRITTEN).unlink(missing_ok=True)  # one that was damaged is written again: not complete yet
        save(self.accelerator.unwrap_model(self.model), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint) / WEIGHTS)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


class _LaterEpochs(Dataset):
    """Training data whose epochs are counted over all stages.

    accelerate tells a data set the epoch of its stage, where it has one process, whenever it begins to iterate: in a
    second stage the first one's augmentations would come again.
    """

    def __init__(self, dataset: Any, first_epoch: int) -> None:
        self.dataset, self.first_epoch = dataset, first_epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> Any:
        return self.dataset[item]

    def set_epoch(self, epoch: int) -> None:
        """`epoch`: of this stage, from 0."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.first_epoch + epoch)


class _Epochs(TrainerCallback):
    """Tell the training data which epoch begins (accelerate does not with several processes), and when to evaluate."""

    def __init__(self, items: _LaterEpochs, evaluate_every: int) -> None:
        self.items, self.evaluate_every = items, evaluate_every

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.items.set_epoch(state.global_step // steps_of_an_epoch(args, state))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = round(state.epoch or 0)
        if epoch % self.evaluate_every and epoch < args.num_train_epochs:
            control.should_evaluate = False
        control.should_log = True  # no mean spans a checkpoint, so a resumed run logs what an uninterrupted one does


def steps_of_an_epoch(args: TrainingArguments, state: TrainerState) -> int:
    """Of the optimiser."""
    return state.max_steps // int(args.num_train_epochs)


class _Checkpoints(TrainerCallback):
    """Write one inside an epoch as well, after so many minutes, and find the best one in a run that has been moved."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes, self.since = minutes, monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.since = monotonic()
        if state.best_global_step:  # a resumed run: transformers knows the place where it was then
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Only behind a log, so that no mean spans a checkpoint, and not where an epoch ends, before it is evaluated.
        if self.minutes is None or not control.should_log or state.global_step % steps_of_an_epoch(args, state) == 0:
            return
        due = torch.tensor(monotonic() - self.since >= 60 * self.minutes, dtype=torch.uint8, device=args.device)
        control.should_save = bool(broadcast(due))  # all processes write one together: the first decides

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.since = monotonic()


class _KeepInRange(TrainerCallback):
    """Let the model keep its parameters in range."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if callable(of_model := getattr(kwargs["model"], "after_step", None)):
            of_model()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage; what a kill, a full disk or a power cut has damaged is passed over."""
    complete = [path for path in folder.glob("checkpoint-*") if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there, and none is seen to be cut off."""
    count = process_count()  # each of several writes the state of its random numbers, and none waits for the others
    names = [LAST_WRITTEN, *(f"rng_state_{number}.pth" for number in range(count) if count > 1)]
    if not all((checkpoint / name).is_file() for name in names):
        return False
    files = [path for path in checkpoint.iterdir() if path.suffix != ".partial"]  # of a save that was killed
    if any(path.stat().st_size == 0 for path in files):
        return False
    if not all(is_zipfile(path) for path in files if path.suffix in (".pt", ".pth")):  # its table comes last
        return False
    try:
        json.loads((checkpoint / LAST_WRITTEN).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
