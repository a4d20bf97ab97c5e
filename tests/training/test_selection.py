"""Which epoch of a stage is kept, and which are evaluated at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from tiny import lines
from torch import nn

from training import Recipe, Stage


def test_selection_keeps_the_weights_of_the_best_epoch_of_each_stage(tmp_path: Path) -> None:
    """The scores peak in epoch 1 of 2, then in epoch 2 of 3, which starts from the former."""
    scores, seen = [5.0, 1.0, 2.0, 4.0, 3.0], list[dict[str, torch.Tensor]]()

    def evaluator(model: nn.Module) -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"rsum": scores[len(seen) - 1]}

    model = tiny.train(tmp_path, selection="validation", evaluator=evaluator)
    assert len(seen) == 5 and not torch.equal(seen[3]["mlp.fc1.branches.fc1.A"], seen[4]["mlp.fc1.branches.fc1.A"])
    for stage, best in (("adapt", seen[0]), ("regularize", seen[3])):
        kept = load_file(tmp_path / "checkpoints" / stage / "adapter.safetensors")
        assert all(torch.equal(best[name], tensor) for name, tensor in kept.items()), stage
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, seen[3][name]), name


def test_another_metric_may_choose_the_epoch(tmp_path: Path) -> None:
    """Rsum falls and R@1 rises, then the other way round."""
    scores, seen = iter([(5.0, 1.0), (4.0, 2.0), (1.0, 3.0), (2.0, 5.0), (3.0, 4.0)]), list[torch.Tensor]()

    def evaluator(model: nn.Module) -> dict[str, float]:
        seen.append(model.state_dict()["mlp.fc1.branches.fc1.A"].clone())
        return dict(zip(("rsum", "t2i_R@1"), next(scores), strict=True))

    tiny.train(tmp_path, selection="validation", metric="t2i_R@1", evaluator=evaluator)
    for stage, best in (("adapt", seen[1]), ("regularize", seen[3])):
        kept = load_file(tmp_path / "checkpoints" / stage / "adapter.safetensors")
        assert torch.equal(best, kept["mlp.fc1.branches.fc1.A"]), stage
    with pytest.raises(ValueError, match="selection_metric=accuracy and selection=last do not go together"):
        Recipe(stages=tiny.STAGES, selection_metric="accuracy")


def test_selection_is_among_the_epochs_that_are_evaluated(tmp_path: Path) -> None:
    """Of six epochs the 2nd, 4th and 6th are; the 2nd is the best, and the 4th's evaluation is interrupted."""
    seen = list[dict[str, torch.Tensor]]()

    def train(*scores: float) -> nn.Module:
        remaining = list(scores)

        def evaluator(model: nn.Module) -> dict[str, float]:
            if not remaining:
                raise KeyboardInterrupt
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return {"rsum": remaining.pop(0)}

        stages = (Stage(name="adapt", epochs=6),)
        return tiny.train(tmp_path, stages=stages, selection="validation", evaluate_every=2, evaluator=evaluator)

    with pytest.raises(KeyboardInterrupt):
        train(5.0)
    assert (tmp_path / "checkpoints/adapt/checkpoint-12").is_dir(), "the 3rd epoch, without an evaluation"
    model = train(4.0, 3.0)
    assert [line["epoch"] for line in lines(tmp_path) if "validation" in line] == [2, 4, 6]
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, seen[0][name]), name
    assert not torch.equal(seen[0]["mlp.fc1.branches.fc1.A"], seen[2]["mlp.fc1.branches.fc1.A"])


def test_the_best_epoch_is_found_where_the_run_has_been_moved_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between its last epoch and what it leaves: transformers notes the place of the best checkpoint."""
    scores, seen = [5.0, 1.0], list[dict[str, torch.Tensor]]()

    def evaluator(model: nn.Module) -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"rsum": scores[len(seen) - 1]}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    settings: dict[str, Any] = {"stages": tiny.STAGES[:1], "selection": "validation", "evaluator": evaluator}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("training.stages.save", interrupted)
        tiny.train(tmp_path / "here", **settings)
    (tmp_path / "here").rename(tmp_path / "there")
    model = tiny.train(tmp_path / "there", **settings)
    assert len(seen) == 2, "no epoch was trained again"
    a = "mlp.fc1.branches.fc1.A"
    assert torch.equal(model.state_dict()[a], seen[0][a]) and not torch.equal(seen[0][a], seen[1][a])


def test_fewer_evaluations_change_nothing_else(tmp_path: Path) -> None:
    every, second = tiny.train(tmp_path / "every"), tiny.train(tmp_path / "second", evaluate_every=2)
    epochs = [line["epoch"] for line in lines(tmp_path / "second") if "validation" in line]
    assert epochs == [2, 2, 3], "the last epoch of a stage always"
    for name, tensor in every.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="evaluate_every is 0; expected 1 or more"):
        Recipe(stages=tiny.STAGES, evaluate_every=0)
