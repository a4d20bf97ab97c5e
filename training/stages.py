"""Train in stages: first the adapter alone, then on with the redundancy penalty (section 4.2 of the paper).

Each stage starts from the weights of the one before, by default with a fresh optimiser and schedule; the paper does not
say whether its second stage does. A stage that is done is not trained again, and a killed one goes on from its last
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from adapters import load, save
from regularizers import ReSoRA
from training.choose import check_name
from training.hardware import Hardware, check_devices, compute_device, process_count
from training.log import Progress, WriteLog, log_records
from training.optimizers import OPTIMIZERS, LearningRates, build_optimizer
from training.run import WEIGHTS, RunFolder, is_first_process
from training.schedules import Cosine, Schedule, Span, scheduler
from training.trainer import AdapterTrainer, latest_checkpoint

SELECTIONS = ("last", "validation")
PATIENCE = 6 * 3600
"""Seconds that a GPU's process waits for the first one, which evaluates alone; torch's half an hour may be too short.

On CPUs it stays at that, since transformers does not hand it on. A process that dies is noticed at once, by torchrun.
"""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Epochs of training, with or without the regularizer."""

    name: str
    epochs: int
    regularize: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to optimise; the same for every stage.

    Args:
        stages: in order.
        batch_size: items a step (pairs, in retrieval); an incomplete last batch of an epoch is dropped.
        rates: peak learning rates.
        optimizer: one of `training.optimizers.OPTIMIZERS`.
        schedule: of the learning rates, see `training.schedules`.
        warmup: share of a stage's steps with a rising learning rate.
        max_grad_norm: global norm to which gradients are clipped.
        selection: keep the weights of the "last" epoch of a stage, or of the epoch that is best on "validation", among
            those that are evaluated.
        selection_metric: by which metric that is the best, a key of what the task measures; None: its own choice.
        evaluate_every: epochs between two evaluations on the validation split; a stage's last epoch has always one.
        restart: give each stage a fresh optimiser and schedule; otherwise the optimiser's state goes on and one
            schedule spans all stages.
        chunk_size: items of a batch that go through the model at a time, for batches that do not fit into memory (see
            `training.chunked`), or None for all.
        save_minutes: write a checkpoint inside an epoch too, each time that so many minutes have passed; None: only at
            the end of each.
        workers: processes that load data; 0 loads in the training process.
        report_to: loggers of `transformers.Trainer`, such as "tensorboard" or "wandb".

    Raises:
        ValueError: for values that cannot train.
    """

    stages: tuple[Stage, ...]
    batch_size: int = 128
    rates: LearningRates = field(default_factory=LearningRates)
    optimizer: str = "adamw"
    schedule: Schedule = field(default_factory=Cosine)
    warmup: float = 0.1
    max_grad_norm: float = 2.0
    selection: str = "last"
    selection_metric: str | None = None
    evaluate_every: int = 1
    restart: bool = True
    chunk_size: int | None = None
    save_minutes: float | None = None
    workers: int = 0
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        short = [stage for stage in self.stages if not isinstance(stage.epochs, int) or stage.epochs < 1]
        if not names or len(set(names)) != len(names) or short:
            raise ValueError(
                f"stages are {self.stages}; expected at least one, of distinct names and one whole epoch or more each"
            )
        if self.batch_size < 2 or not 0 <= self.warmup < 1 or self.max_grad_norm <= 0:
            raise ValueError(
                "a recipe needs batch_size >= 2 (losses compare pairs), 0 <= warmup < 1, max_grad_norm > 0, "
                f"but got batch_size={self.batch_size}, warmup={self.warmup}, max_grad_norm={self.max_grad_norm}"
            )
        check_name("optimizer", self.optimizer, OPTIMIZERS)
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size is {self.chunk_size}; expected at least 1 item, or null for the whole batch")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise ValueError(f"save_minutes is {self.save_minutes}; expected a positive number, or null")
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection is {self.selection!r}; expected one of {', '.join(SELECTIONS)}")
        if self.selection_metric is not None and self.selection == "last":
            raise ValueError(
                f"selection_metric={self.selection_metric} and selection=last do not go together: the last epoch is "
                "taken whatever it scores; use selection=validation, or selection_metric=null"
            )
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every is {self.evaluate_every}; expected 1 or more epochs")
        if not self.restart and self.selection != "last":
            raise ValueError(
                "restart=False goes on with the optimiser of a stage's last epoch, and selection=validation with the "
                "weights of another one; use selection=last"
            )


def check_items(items: int, batch_size: int) -> None:
    """Raise ValueError if the training data have fewer items than one step takes, in all processes together."""
    processes = process_count()
    if items < batch_size * processes:
        each = "" if processes == 1 else f" for each of {processes} processes, {batch_size * processes} in all"
        raise ValueError(f"{items} training items make no batch of {batch_size}{each}; lower trainer.batch_size")


def run_stages(
    model: nn.Module,
    recipe: Recipe,
    run: RunFolder,
    *,
    dataset: Dataset,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    objective: Callable[[Any, float], Mapping[str, Tensor]],
    evaluator: Callable[[nn.Module], dict[str, float]] | None,
    heads: tuple[str, ...],
    regularizer: ReSoRA | None,
    hardware: Hardware,
    seed: int,
    metric: str,
    after_stage: Callable[[], None] = lambda: None,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train `model`, which holds its adapter, through the stages of `recipe`, in place.

    Checkpoints and the weights after each stage go to `<run>/checkpoints/<stage>/`, the log of all stages to
    `<run>/log.jsonl`. `metric`, a key of what the evaluator gives, is shown after each epoch and maximised where
    validation selects; without an evaluator nothing is. `after_stage` is called after each stage, whether
    it was trained now or before, `after_epoch` after each epoch that was trained now.

    Raises:
        ValueError: as `check_items`, or if this process has several GPUs.
    """
    check_devices()
    model.to(compute_device())
    items = len(dataset)  # type: ignore[arg-type]
    check_items(items, recipe.batch_size)
    records: list[dict[str, Any]] = []
    first_epoch = 0
    for index, stage in enumerate(recipe.stages):
        folder = run.path / "checkpoints" / stage.name
        history = run.read_json(f"checkpoints/{stage.name}/history.json")
        if history is None:
            trainer = AdapterTrainer(
                model=model,
                args=_arguments(stage, recipe, hardware, str(folder), (seed, index), metric if evaluator else None),
                train_dataset=dataset,
                data_collator=collate,
                optimizers=_optimizer(model, recipe, heads, index, items, run),
                objective=objective,
                regularizer=regularizer if stage.regularize else None,
                evaluator=evaluator,
                first_epoch=first_epoch,
                evaluate_every=recipe.evaluate_every,
                chunk_size=recipe.chunk_size,
                save_minutes=recipe.save_minutes,
            )
            trainer.remove_callback(ProgressCallback)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(Progress(stage.name, metric))
            trainer.add_callback(WriteLog(run, list(records), stage.name, after_epoch))
            checkpoint = latest_checkpoint(folder)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            history = trainer.state.log_history
            if trainer.is_world_process_zero():
                save(model, folder / WEIGHTS)
                run.write_json(f"checkpoints/{stage.name}/history.json", history)
            trainer.accelerator.wait_for_everyone()  # the first process has written what the next stage starts from
        load(model, folder / WEIGHTS)  # trained just now, too: each process has statistics of a batch norm of its own
        records += log_records(stage.name, history)
        first_epoch += stage.epochs
        after_stage()
    if is_first_process():
        run.write_lines("log.jsonl", records)


def _optimizer(
    model: nn.Module, recipe: Recipe, heads: tuple[str, ...], index: int, items: int, run: RunFolder
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """The optimiser and its schedule for stage `index`."""
    optimizer = build_optimizer(recipe.optimizer, model, recipe.rates, heads)
    steps = items // (recipe.batch_size * process_count())  # of an epoch
    before = sum(stage.epochs for stage in recipe.stages[:index])
    if recipe.restart:
        span = Span(steps=steps * recipe.stages[index].epochs, warmup=recipe.warmup, steps_per_epoch=steps)
        return optimizer, scheduler(optimizer, recipe.schedule, span)
    if index:
        earlier = recipe.stages[index - 1]
        checkpoint = latest_checkpoint(run.path / "checkpoints" / earlier.name)
        if checkpoint is None or checkpoint.name != f"checkpoint-{steps * earlier.epochs}":  # of its last epoch
            raise FileNotFoundError(
                f"{run.path} holds no whole checkpoint of the end of stage {earlier.name!r} any more, with whose "
                "optimiser restart=False goes on; delete the folder and train both stages again"
            )
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True))
    total = steps * sum(stage.epochs for stage in recipe.stages)
    span = Span(steps=total, warmup=recipe.warmup, steps_per_epoch=steps)
    return optimizer, scheduler(optimizer, recipe.schedule, span, done=steps * before)


def _arguments(
    stage: Stage, recipe: Recipe, hardware: Hardware, folder: str, seed: tuple[int, int], metric: str | None
) -> TrainingArguments:
    """`seed` is that of the run, and the number of the stage."""
    run_seed, index = seed
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=stage.epochs,
        per_device_train_batch_size=recipe.batch_size,
        dataloader_drop_last=True,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # copies from pinned memory hold nothing up
        max_grad_norm=recipe.max_grad_norm,
        bf16=hardware.precision == "bfloat16",
        ddp_timeout=PATIENCE,
        use_cpu=not torch.accelerator.is_available(),  # else transformers refuses bfloat16 without an accelerator
        logging_steps=5,
        eval_strategy="epoch" if metric else "no",
        save_strategy="epoch",
        # The last, the one before, to go on from where the last is damaged, and, wherever it is, the best.
        save_total_limit=3 if recipe.selection == "validation" else 2,
        load_best_model_at_end=recipe.selection == "validation",
        # Named otherwise, transformers would keep the best epoch's checkpoint in place of the last.
        metric_for_best_model=metric if recipe.selection == "validation" else None,
        greater_is_better=True,
        remove_unused_columns=False,
        label_names=[],
        report_to=list(recipe.report_to) or "none",
        seed=run_seed + 1000 * index,
        # accelerate shuffles epoch e with this + e: next to each other, seeds would share orders, an epoch apart
        data_seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
    )
