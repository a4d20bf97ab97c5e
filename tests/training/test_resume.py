"""A killed run goes on, also one that is killed inside an epoch, and ends in the same bits as one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from tiny import lines

from training import Recipe, Stage


@pytest.mark.parametrize(
    ("epoch", "adapter", "restart"),
    [(2, "adalora", True), (4, "lora", True), (4, "lora", False)],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, epoch: int, adapter: str, restart: bool) -> None:
    torch.set_num_threads(1)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    script = [sys.executable, tiny.__file__, str(killed), str(epoch), adapter, str(restart)]
    assert subprocess.run(script, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert not (killed / "checkpoints/regularize/history.json").exists()
    resumed, uninterrupted = (tiny.train(folder, adapter=adapter, restart=restart) for folder in (killed, whole))
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    without_score = [{k: v for k, v in line.items() if k != "validation"} for line in lines(killed)]
    assert without_score == [{k: v for k, v in line.items() if k != "validation"} for line in lines(whole)]


def test_a_run_that_is_saved_inside_an_epoch_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Five epochs of 4 steps, saved after steps 5, 10 and 15, interrupted in step 16, the last of the 4th epoch."""
    steps = 0

    def objective(output: torch.Tensor, epoch: float) -> dict[str, torch.Tensor]:
        nonlocal steps
        steps += 1
        if steps == 16:
            raise KeyboardInterrupt
        return {"squares": (output - epoch).square().mean()}

    settings: dict[str, Any] = {"stages": (Stage(name="adapt", epochs=5),), "evaluator": lambda model: {"rsum": 1.0}}
    whole = tiny.train(tmp_path / "whole", **settings)
    saved = settings | {"objective": objective, "save_minutes": 1e-9}
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path / "saved", **saved)
    checkpoints = (tmp_path / "saved/checkpoints/adapt").glob("checkpoint-*")
    assert {path.name for path in checkpoints} == {"checkpoint-12", "checkpoint-15"}, "the last, and one before"
    resumed = tiny.train(tmp_path / "saved", **saved)
    assert steps == 16 + 5
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert lines(tmp_path / "saved") == lines(tmp_path / "whole")
    with pytest.raises(ValueError, match="save_minutes is 0"):
        Recipe(stages=tiny.STAGES, save_minutes=0)
