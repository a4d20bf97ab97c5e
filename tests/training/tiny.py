"""A two-stage training of a few seconds. Run as a script it gets killed: FOLDER, epoch to die in, adapter."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import adapters  # before transformers, which imports torchvision
from adapters import AdaLoRA, Adapter, LoRA, inject
from regularizers import ReSoRA
from training import Hardware, LearningRates, Recipe, RunFolder, Stage, run_stages
from training.trainer import AdapterTrainer


class Items(Dataset):
    """Vectors that depend on index and epoch, as augmented data do."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(100 * self.epoch + index))


class Model(nn.Module):
    """A layer that LoRA knows, dropout (it draws from the global generator) and a batch norm (it has buffers).

    Attributes:
        seen: the batches that it was trained on, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(6, 8)})
        self.head = nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(x.clone())
        return self.head(self.mlp["fc1"](x))


ADAPTERS: dict[str, Adapter] = {
    "lora": LoRA(rank=3, targets=("fc1",)),
    # Nothing is pruned in step 1 of the first stage's 8, everything that will be by step 7.
    "adalora": AdaLoRA(rank=3, target_rank=2, targets=("fc1",), initial_warmup=0.125, final_tuning=0.125),
}
STAGES = (Stage(name="adapt", epochs=2), Stage(name="regularize", epochs=3, regularize=True))


def train(
    folder: Path,
    die_in_epoch: int = 0,
    precision: str = "float32",
    stages: tuple[Stage, ...] = STAGES,
    restart: bool = True,
    adapter: str = "lora",
    evaluate_every: int = 1,
    objective: Callable[[Tensor, float], dict[str, Tensor]] = lambda output, epoch: {
        "squares": (output - epoch).square().mean()
    },
    evaluator: Callable[[nn.Module], dict[str, float]] | None = None,
    metric: str = "rsum",
    seed: int = 3,
    **recipe: Any,
) -> nn.Module:
    torch.manual_seed(0)
    model = inject(Model(), ADAPTERS[adapter], train=("head",))
    evaluations = 0

    def count(model: nn.Module) -> dict[str, float]:
        nonlocal evaluations
        evaluations += 1
        if evaluations == die_in_epoch:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"rsum": float(evaluations)}

    run_stages(
        model,
        Recipe(
            stages=stages,
            restart=restart,
            evaluate_every=evaluate_every,
            batch_size=5,
            rates=LearningRates(adapter=0.1, head=0.05),
            **recipe,
        ),
        RunFolder(folder),
        dataset=Items(),
        collate=lambda items: {"x": torch.stack(items)},
        objective=objective,
        evaluator=evaluator or count,
        heads=("head",),
        regularizer=ReSoRA("linear", weight=0.1),
        hardware=Hardware(1, precision),
        seed=seed,
        metric=metric,
    )
    return model


def lines(folder: Path) -> list[dict]:
    """The log of a run."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def items_seen(model: nn.Module) -> list[tuple[int, int]]:
    """The epoch and the index of each item that a `Model` was trained on, in order, read from their values."""
    items, known = Items(), dict[tuple[float, ...], tuple[int, int]]()
    for epoch in range(10):
        items.set_epoch(epoch)
        known |= {tuple(items[index].tolist()): (epoch, index) for index in range(len(items))}
    return [known[tuple(row.tolist())] for batch in model.seen for row in batch]


def evaluated_apart(folder: Path, rank: int) -> dict[str, Any]:
    """A training whose processes would rate its epochs differently, and have batch norm statistics of their own."""
    scores, reported = [[5.0, 1.0, 2.0, 4.0, 3.0], [1.0, 5.0, 4.0, 3.0, 2.0]][rank], []
    evaluate = AdapterTrainer.evaluate

    def noted(trainer: AdapterTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        reported.append(evaluate(trainer, *args, **kwargs))
        return reported[-1]

    def evaluator(model: nn.Module) -> dict[str, float]:
        return {"rsum": scores.pop(0), "mean": float(model.get_buffer("head.1.running_mean").sum())}

    AdapterTrainer.evaluate = noted  # type: ignore[method-assign]
    model = train(folder, evaluator=evaluator, selection="validation")
    return {"reported": reported, "weights": model.state_dict()}


if __name__ == "__main__":
    assert adapters
    torch.set_num_threads(1)
    rank, writing = os.environ.get("RANK"), torch.save
    if rank == "0":  # of several: the one that writes is late

        def late(*arguments: Any, **options: Any) -> None:
            time.sleep(0.5)
            writing(*arguments, **options)

        torch.save = late
    trained = train(Path(sys.argv[1]), int(sys.argv[2]), adapter=sys.argv[3], restart=sys.argv[4] == "True")
    if rank is not None:
        done = {"parameters": dict(trained.named_parameters()), "items": items_seen(trained)}
        writing(done, Path(sys.argv[1]) / f"process{rank}.pt")
        torch.save = writing
        apart = evaluated_apart(Path(sys.argv[1]) / "apart", int(rank))
        writing(apart, Path(sys.argv[1]) / f"apart{rank}.pt")
