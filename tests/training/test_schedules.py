"""Learning-rate schedules against those of torch and transformers, and the authors' formulas as loops."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, MultiStepLR
from transformers import get_cosine_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from training.schedules import SCHEDULES, Cosine, Schedule, Span, Step, WarmupCosine, scheduler
from training.stages import Stage


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (1.0, 0.1)])


def rates(of: LRScheduler, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in of.optimizer.param_groups])
        of.optimizer.step()
        of.step()
    return found


def ours(schedule: Schedule, span: Span, done: int = 0) -> list[list[float]]:
    optimizer = sgd()
    if done:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return rates(scheduler(optimizer, schedule, span, done), span.steps - done)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.33])
def test_cosine_is_that_of_transformers(warmup: float) -> None:
    span = Span(steps=23, warmup=warmup, steps_per_epoch=5)
    expected = rates(get_cosine_schedule_with_warmup(sgd(), math.ceil(23 * warmup), 23), 23)
    assert ours(Cosine(), span) == [pytest.approx(row) for row in expected]
    assert ours(Cosine(), span, done=9) == [pytest.approx(row) for row in expected[9:]]


def test_warmup_cosine_is_clip4clips() -> None:
    """x = step / steps; x / 0.1 below 0.1, then half a cosine of x itself."""
    expected = [step / 10 if step < 10 else (1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)]
    found = [row[0] for row in ours(WarmupCosine(), Span(steps=100, warmup=0.1, steps_per_epoch=20))]
    assert found == pytest.approx(expected)
    assert found[0] == 0 and found[10] == pytest.approx(0.9755, abs=1e-4)
    assert WarmupCosine().share(100, Span(steps=100, warmup=0.1, steps_per_epoch=20)) == pytest.approx(0)
    assert WarmupCosine().share(0, Span(steps=100, warmup=0.0, steps_per_epoch=20)) == 1


def test_step_is_that_of_torch() -> None:
    expected = rates(MultiStepLR(sgd(), milestones=[3 * 4, 5 * 4], gamma=0.1), 28)
    span = Span(steps=28, warmup=0.0, steps_per_epoch=4)
    assert ours(Step(at=(3, 5)), span) == [pytest.approx(row) for row in expected]
    assert ours(Step(at=(3, 5)), span, done=13) == [pytest.approx(row) for row in expected[13:]]


@pytest.mark.parametrize("restart", [True, False])
def test_steps_count_the_epochs_of_a_stage_where_each_has_its_schedule(tmp_path: Path, restart: bool) -> None:
    """Stages of three epochs of four steps, the rate a tenth from epoch 2 on: of each, or of all six."""
    stages = (Stage(name="adapt", epochs=3), Stage(name="more", epochs=3))
    tiny.train(tmp_path, stages=stages, restart=restart, schedule=Step(at=(2,)), warmup=0.0)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [(line["stage"], line["step"], line["learning_rate"]) for line in log if "learning_rate" in line]
    whole = [row[0] / 10 for row in rates(MultiStepLR(sgd(), milestones=[2 * 4], gamma=0.1), 24)]
    expected = {"adapt": whole[:12], "more": whole[:12] if restart else whole[12:]}
    assert {stage for stage, _, _ in found} == expected.keys()
    assert [rate for _, _, rate in found] == pytest.approx([expected[stage][step - 1] for stage, step, _ in found])


def test_constant_and_the_linear_warmup() -> None:
    span = Span(steps=8, warmup=0.5, steps_per_epoch=4)
    assert [row[0] for row in ours(SCHEDULES["constant"](), span)] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    expected = rates(ConstantLR(sgd(), factor=1.0), 8)
    assert ours(SCHEDULES["constant"](), Span(steps=8, warmup=0.0, steps_per_epoch=4)) == expected
    stepped = [row[0] for row in ours(SCHEDULES["step"](at=[1], factor=0.5), span)]
    assert stepped == pytest.approx([0, 0.25, 0.5, 0.75, 0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("settings", [{"at": []}, {"at": [-1]}, {"at": [3], "factor": 0}])
def test_impossible_steps(settings: dict) -> None:
    with pytest.raises(ValueError, match="epochs and a positive factor"):
        Step(**settings)
