"""What an adapter brings to training: its own part of the loss, and its schedule (AdaLoRA has both)."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from adapters import AdaLoRA, loss_parts
from training.trainer import AdapterTrainer

BRANCH = "mlp.fc1.branches.fc1"


def test_the_penalty_is_a_logged_part_of_the_loss_in_every_stage(tmp_path: Path) -> None:
    tiny.train(tmp_path, adapter="adalora")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    parts = {stage: {part for line in log if line["stage"] == stage for part in line.get("parts", {})} for stage in
             ("adapt", "regularize")}  # fmt: skip
    assert parts == {
        "adapt": {"squares", "adalora_orthogonality"},
        "regularize": {"squares", "adalora_orthogonality", "resora_linear"},
    }
    for line in log:
        if "parts" in line:
            assert line["loss"] == pytest.approx(sum(line["parts"].values()), rel=1e-4)
            assert line["parts"]["adalora_orthogonality"] > 0


def test_the_schedule_spans_the_first_stage_and_its_ranks_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    alive: list[int] = []
    scheduled = AdaLoRA.after_step

    def after_step(adapter: AdaLoRA, model: nn.Module, step: int, total_steps: int) -> None:
        branch = model.get_submodule(BRANCH)
        assert branch.E.grad.any(), "the gradients of this step are there"
        before = branch.E.clone()
        scheduled(adapter, model, step, total_steps)
        calls.append((step, total_steps))
        alive.append(int(branch.alive.sum()))
        assert torch.equal(branch.E, before.where(branch.alive, 0.0))

    monkeypatch.setattr(AdaLoRA, "after_step", after_step)
    model = tiny.train(tmp_path, adapter="adalora")
    assert calls[:8] == [(step, 8) for step in range(1, 9)]
    assert len(calls) == 8 + 12 and all(step > total_steps for step, total_steps in calls[8:])
    assert alive == [3] + 7 * [2] + 12 * [2]
    after_first = load_file(tmp_path / "checkpoints/adapt/adapter.safetensors")
    assert torch.equal(after_first[f"{BRANCH}.alive"], model.get_submodule(BRANCH).alive)
    assert after_first[f"{BRANCH}.A_sensitivity"].any()
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_penalty_acts_in_training_only_and_moves_what_is_learned(tmp_path: Path) -> None:
    without = dataclasses.replace(tiny.ADAPTERS["adalora"], orthogonality=0.0)
    gradients: list[Any] = []
    for adapter in (tiny.ADAPTERS["adalora"], without):
        torch.manual_seed(0)
        model = tiny.inject(tiny.Model(), adapter, train=("head",))
        trainer = AdapterTrainer(
            model=model,
            args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=tiny.Items(),
            objective=lambda output, epoch: {"squares": output.square().mean()},
        )
        twin, x = copy.deepcopy(model), {"x": torch.randn(5, 6)}
        assert trainer.compute_loss(model.eval(), x) == twin.eval()(**x).square().mean()
        trainer.compute_loss(model.train(), x).backward()
        gradients.append(model.get_submodule(BRANCH).A.grad.clone())
    assert gradients[0].any() and not gradients[1].any()  # at E = 0 the objective alone does not move A


def test_the_penalty_acts_on_a_batch_in_chunks_too(tmp_path: Path) -> None:
    """At E = 0 the gradient of A is that of the penalty alone."""
    torch.manual_seed(0)
    model = tiny.Model()
    model.head = nn.Linear(8, 1)  # without a batch norm
    tiny.inject(model, tiny.ADAPTERS["adalora"], train=("head",))
    factor = model.get_submodule(BRANCH).A
    (expected,) = torch.autograd.grad(sum(loss_parts(model).values()), factor)
    trainer = AdapterTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=tiny.Items(),
        objective=lambda output, epoch: {"squares": output.square().mean()},
        chunk_size=2,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(model, {"x": torch.randn(5, 6)})
    torch.testing.assert_close(factor.grad, expected)
