"""Which checkpoint a run goes on from: the newest whole one, of two that are kept, three where validation selects."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from tiny import lines

from training import Stage
from training.trainer import latest_checkpoint

STAGES = (Stage(name="adapt", epochs=4),)  # of 4 steps each


def write_checkpoint(folder: Path, step: int, processes: int = 1) -> Path:
    """What transformers writes, as far as resuming looks at it first."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    numbers = ["rng_state.pth"] if processes == 1 else [f"rng_state_{number}.pth" for number in range(processes)]
    for name in ("optimizer.pt", "scheduler.pt", *numbers):
        torch.save({"state": torch.zeros(1000)}, checkpoint / name)
    (checkpoint / "adapter.safetensors").write_bytes(b"weights")
    (checkpoint / "trainer_state.json").write_text('{\n  "global_step": 1\n}\n')
    return checkpoint


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def interrupted(folder: Path, epoch: int, scores: list[float] | None = None, **recipe: str) -> list[str]:
    """Train until the evaluation after `epoch` is interrupted; returns the names of the checkpoints, oldest first."""
    waiting = list(scores or range(epoch - 1))

    def evaluator(model: nn.Module) -> dict[str, float]:
        if not waiting:
            raise KeyboardInterrupt
        return {"rsum": float(waiting.pop(0))}

    with pytest.raises(KeyboardInterrupt):
        tiny.train(folder, stages=STAGES, evaluator=evaluator, **recipe)
    names = [path.name for path in (folder / "checkpoints/adapt").glob("checkpoint-*")]
    return sorted(names, key=lambda name: int(name.removeprefix("checkpoint-")))


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-100/trainer_state.json").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    ("name", "kept"),
    [("trainer_state.json", 0.0), ("trainer_state.json", 0.5), ("optimizer.pt", 0.0), ("optimizer.pt", 0.5),
     ("rng_state.pth", 0.9), ("adapter.safetensors", 0.0)],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, kept: float) -> None:
    """Files that are empty or cut off, as a full disk or a power cut leaves them."""
    whole, damaged = write_checkpoint(tmp_path, 5), write_checkpoint(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == damaged
    os.truncate(damaged / name, int(kept * (damaged / name).stat().st_size))
    assert latest_checkpoint(tmp_path) == whole


def test_what_a_killed_save_left_damages_nothing(tmp_path: Path) -> None:
    """The checkpoint was written again since, by a process with another number."""
    checkpoint = write_checkpoint(tmp_path, 5)
    (checkpoint / "adapter.safetensors.123.partial").touch()
    assert latest_checkpoint(tmp_path) == checkpoint


def test_a_checkpoint_that_one_of_several_processes_has_not_written_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, missing in ((5, None), (10, 1), (15, 0)):
        checkpoint = write_checkpoint(tmp_path, step, processes=2)
        if missing is not None:
            (checkpoint / f"rng_state_{missing}.pth").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert latest_checkpoint(tmp_path) is None


def test_one_is_kept_to_fall_back_on_beside_the_best(tmp_path: Path) -> None:
    assert interrupted(tmp_path / "last", epoch=4) == ["checkpoint-8", "checkpoint-12"]
    first_is_best = interrupted(tmp_path / "first", epoch=4, scores=[3, 2, 1], selection="validation")
    assert first_is_best == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]


def test_a_run_whose_last_checkpoint_is_damaged_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = lambda model: {"rsum": 1.0}  # noqa: E731
    whole = tiny.train(tmp_path / "whole", stages=STAGES, evaluator=evaluator)
    killed, folder = tmp_path / "killed", tmp_path / "killed/checkpoints/adapt"
    assert interrupted(killed, epoch=4, scores=[1, 1, 1]) == ["checkpoint-8", "checkpoint-12"]
    os.truncate(folder / "checkpoint-12/optimizer.pt", 0)

    # While the damaged one is written again it is not whole, whatever is left of it from before.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save_rng_state", stop)
        tiny.train(killed, stages=STAGES, evaluator=evaluator)
    assert (folder / "checkpoint-12/optimizer.pt").stat().st_size > 0
    assert latest_checkpoint(folder) == folder / "checkpoint-8"

    resumed = tiny.train(killed, stages=STAGES, evaluator=evaluator)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert lines(killed) == lines(tmp_path / "whole")


def test_without_restart_no_older_optimizer_takes_the_place_of_the_last(tmp_path: Path) -> None:
    """The second stage goes on with the optimiser of the first one's end, or not at all."""
    tiny.train(tmp_path, restart=False)
    folder = tmp_path / "checkpoints"
    (folder / "regularize/history.json").unlink()
    os.truncate(folder / "adapt/checkpoint-8/optimizer.pt", 0)
    assert latest_checkpoint(folder / "adapt") == folder / "adapt/checkpoint-4"
    with pytest.raises(FileNotFoundError, match=r"no whole checkpoint of the end of stage 'adapt' any more"):
        tiny.train(tmp_path, restart=False)
