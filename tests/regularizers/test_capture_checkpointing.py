"""capture under gradient checkpointing, and passes without a graph inside a context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_berts import IDS, MASK, gradients, with_ours, with_peft
from torch import Tensor, nn

from regularizers import ReSoRA, capture


def with_checkpoints(build: Any, reentrant: bool = True) -> nn.Module:
    model = build().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    embeddings = model.get_submodule("base_model.model.bert" if build is with_peft else "bert").embeddings
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def loss_and_penalty(model: nn.Module, measure: str) -> Tensor:
    resora = ReSoRA(measure, weight=1.0)
    with resora.capture(model) as subspaces:
        loss = model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([1, 0, 1])).loss
    return loss + sum(resora(subspaces).values())


@pytest.mark.parametrize("build", [with_peft, with_ours])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("measure", ["overlap", "linear", "cosine", "euclidean"])
def test_gradient_checkpointing(build: Any, reentrant: bool, measure: str) -> None:
    plain, checkpointed = build().train(), with_checkpoints(build, reentrant)
    for model in (plain, checkpointed):
        for _ in range(2):  # gradients add up over two passes
            loss_and_penalty(model, measure).backward()
    expected, found = gradients(plain), gradients(checkpointed)
    assert expected.keys() == found.keys() and expected
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    hooks = [len(m._forward_hooks) for name, m in checkpointed.named_modules() if "embeddings" not in name]
    assert not any(hooks) and not any(getattr(m, "record", None) for m in checkpointed.modules())


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_a_backward_pass_that_never_comes_leaves_no_gradient_for_the_next(build: Any) -> None:
    plain, checkpointed = build().train(), with_checkpoints(build)
    loss_and_penalty(checkpointed, "overlap")  # dropped
    for model in (plain, checkpointed):
        loss_and_penalty(model, "overlap").backward()
    for name, gradient in gradients(checkpointed).items():
        torch.testing.assert_close(gradient, gradients(plain)[name])


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_a_pass_without_a_graph_leaves_nothing_for_the_next_step(build: Any, captured: bool) -> None:
    """A teacher's pass, in a loop whose loss lives on: no backward pass repeats it, and no later step does."""

    def step(model: nn.Module, penalised: bool) -> Tensor:
        if not penalised:
            return model(input_ids=IDS).logits.square().sum()
        resora = ReSoRA("overlap", weight=1.0)
        with resora.capture(model) as subspaces:
            with torch.no_grad():
                model(input_ids=IDS.flip(0))
            loss = model(input_ids=IDS).logits.square().sum()
        return loss + sum(resora(subspaces).values())

    model, fresh = build().train(), build().train()
    loss = step(model, penalised=True)
    loss.backward()
    model.zero_grad()
    again = step(model, penalised=captured)  # the old loss is still alive
    again.backward()
    step(fresh, penalised=captured).backward()
    assert loss.requires_grad
    for name, gradient in gradients(fresh).items():
        torch.testing.assert_close(gradients(model)[name], gradient)


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_the_next_capture_waits_for_the_backward_pass(build: Any) -> None:
    """Under reentrant checkpointing the second passes of both would come in one backward pass."""
    plain, model = build().train(), with_checkpoints(build)
    first = loss_and_penalty(model, "overlap")
    with pytest.raises(RuntimeError, match=r"query was captured .* call backward, or drop the loss"):
        loss_and_penalty(model, "overlap")
    first.backward()  # as if nothing had been tried
    loss_and_penalty(model, "overlap").backward()
    for _ in range(2):
        loss_and_penalty(plain, "overlap").backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients(plain)[name])
    other = with_checkpoints(build, reentrant=False)
    sum(loss_and_penalty(other, "overlap") for _ in range(2)).backward()
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradient, gradients(plain)[name])


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_a_teachers_passes_are_no_samples(build: Any, teachers: int) -> None:
    model = build().train()
    with capture(model) as alone:
        model(input_ids=IDS)
    with capture(model) as subspaces:
        for _ in range(teachers):
            with torch.no_grad():
                model(input_ids=IDS.flip(1))
        model(input_ids=IDS)
    assert len(subspaces) == 4
    for name, (activations, _) in subspaces.items():
        torch.testing.assert_close(activations, alone[name].activations)


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_passes_without_a_graph_are_measured_where_there_are_no_others(build: Any) -> None:
    model = build().train()
    with capture(model) as subspaces, torch.no_grad():
        for _ in range(2):
            model(input_ids=IDS)
    assert {len(pair.activations) for pair in subspaces.values()} == {2 * 18}
    assert not any(pair.activations.requires_grad for pair in subspaces.values())


def test_a_layer_that_runs_twice_in_reentrant_checkpoints_is_refused() -> None:
    model = with_checkpoints(with_ours)
    with pytest.raises(ValueError, match="ran twice under reentrant gradient checkpointing"), capture(model):
        model(input_ids=IDS)
        model(input_ids=IDS)
