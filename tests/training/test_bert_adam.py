"""CLIP4Clip's optimiser against its formula written as a loop over numbers."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from adapters import inject
from training.bert_adam import BertAdam
from training.optimizers import LearningRates, build_optimizer


def by_hand(value: np.ndarray, gradients: list[np.ndarray], rates: list[float], decay: float) -> np.ndarray:
    value, mean, square = value.astype(np.float64).copy(), np.zeros(value.shape), np.zeros(value.shape)
    for gradient, rate in zip(gradients, rates, strict=True):
        norm = np.sqrt((gradient**2).sum())
        clipped = gradient * min(1.0, 1.0 / (norm + 1e-6))
        mean = 0.9 * mean + 0.1 * clipped
        square = 0.98 * square + 0.02 * clipped**2
        value = value - rate * (mean / (np.sqrt(square) + 1e-6) + decay * value)
    return value


def test_five_steps_by_hand() -> None:
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (5,), ()]
    values = [rng.normal(size=shape) for shape in shapes]
    parameters = [nn.Parameter(torch.tensor(value)) for value in values]
    idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = BertAdam(
        [{"params": parameters[:1]}, {"params": [*parameters[1:], idle], "weight_decay": 0.0}], weight_decay=0.2
    )
    rates = [0.0, 1e-2, 2e-2, 1e-2, 5e-3]  # CLIP4Clip's first step has a rate of zero
    gradients = [[rng.normal(size=shape) * 10.0**scale for scale in (0, 2, -3, 0, 1)] for shape in shapes]
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, of_parameter in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(of_parameter[step])
        optimizer.step()
    for parameter, value, of_parameter, decay in zip(parameters, values, gradients, (0.2, 0.0, 0.0), strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), by_hand(value, of_parameter, rates, decay), rtol=1e-9)
    assert torch.equal(idle, torch.ones(2, dtype=torch.float64)), "without a gradient nothing moves, not even by decay"


def test_its_state_is_saved_and_goes_on() -> None:
    torch.manual_seed(0)
    whole = nn.Linear(3, 2)
    first = BertAdam(whole.parameters(), lr=0.1)
    halves, second = copy.deepcopy(whole), None

    def step(model: nn.Module, optimizer: BertAdam) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    second = BertAdam(halves.parameters(), lr=0.1)
    for _ in range(2):
        step(whole, first)
        step(halves, second)
    third = BertAdam(halves.parameters(), lr=0.1)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for _ in range(2):
        step(whole, first)
        step(halves, third)
    assert torch.equal(whole.weight, halves.weight)


def test_a_recipe_that_names_it_trains_with_it(tmp_path: Path) -> None:
    """By the state in the checkpoint: AdamW's counts steps, and has no norm to clip to."""
    model = inject(tiny.Model(), tiny.ADAPTERS["lora"], train=("head",))
    assert type(build_optimizer("bert_adam", model, LearningRates(), ("head",))) is BertAdam
    tiny.train(tmp_path, optimizer="bert_adam", stages=tiny.STAGES[:1])
    saved = torch.load(tmp_path / "checkpoints/adapt/checkpoint-8/optimizer.pt", weights_only=True)
    assert saved["state"] and all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in saved["state"].values())
    assert {group["max_grad_norm"] for group in saved["param_groups"]} == {1.0}
