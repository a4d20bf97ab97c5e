"""AdaLoRA against PEFT: outputs, merged weights, the penalty, the importance of ranks and which of them survive."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from adapters import AdaLoRA, after_step, inject, loss_parts, merge, trainable_parameters
from adapters.adalora import AdaLoRABranch, budget

STEPS, RANK, TARGET = 12, 4, 2
OURS = AdaLoRA(
    rank=RANK, target_rank=TARGET, alpha=6, initial_warmup=2 / STEPS, final_tuning=3 / STEPS, interval=2,
    betas=(0.8, 0.7), orthogonality=0.3,
)  # fmt: skip
THEIRS = {"init_r": RANK, "target_r": TARGET, "lora_alpha": 6, "tinit": 2, "tfinal": 3, "deltaT": 2, "beta1": 0.8,
          "beta2": 0.7, "orth_reg_weight": 0.3, "total_step": STEPS}  # fmt: skip
NAMES = {"A": "lora_A", "E": "lora_E", "B": "lora_B"}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def pair() -> tuple[nn.Module, peft.PeftModel]:
    """Ours and PEFT's, with the same weights; float64, so that no rounding decides which rank survives."""
    ours = inject(bert(), OURS, train=("classifier",)).double()
    config = peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **THEIRS)
    theirs = peft.get_peft_model(bert(), config).double()
    return ours, theirs


def factors(ours: nn.Module, theirs: peft.PeftModel) -> list[tuple[AdaLoRABranch, nn.Module, str]]:
    """Our branch, PEFT's layer and its path, for each target."""
    model = theirs.base_model.model
    return [
        (module.branches[role], model.get_submodule(name), name)
        for name, module in ours.named_modules()
        if hasattr(module, "branches")
        for role in module.branches
    ]


def copy_weights(ours: nn.Module, theirs: peft.PeftModel, std: float) -> None:
    torch.manual_seed(1)
    for branch, layer, _ in factors(ours, theirs):
        for name, name_of_theirs in NAMES.items():
            nn.init.normal_(getattr(branch, name), std=std)
            target = getattr(layer, name_of_theirs)["default"]
            target.data.copy_(getattr(branch, name).data.view_as(target))


def batch() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (4, 9)), "labels": torch.tensor([0, 1, 0, 1])}


def test_outputs_merged_weights_count_and_penalty_equal_pefts() -> None:
    ours, theirs = pair()
    copy_weights(ours, theirs, std=0.8)
    assert trainable_parameters(ours) == theirs.get_nb_trainable_parameters()[0]
    inputs = batch()
    expected, actual = theirs(**inputs), ours(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits)
    assert not torch.allclose(actual.logits, bert().double()(**inputs).logits, atol=1e-3)
    parts = loss_parts(ours)
    assert set(parts) == {"adalora_orthogonality"} and parts["adalora_orthogonality"] > 0
    torch.testing.assert_close(actual.loss + parts["adalora_orthogonality"], expected.loss)

    merged = dict(theirs.merge_and_unload().named_parameters())
    merge(ours)
    for name, parameter in ours.named_parameters():
        if "query" in name or "value" in name:
            torch.testing.assert_close(parameter, merged[name], atol=1e-6, rtol=1e-5)
    assert loss_parts(ours) == {}


def test_scores_budget_and_surviving_ranks_equal_pefts_over_a_training() -> None:
    """Both train on their own, from the same weights on the same data, through all three phases."""
    ours, theirs = pair()
    copy_weights(ours, theirs, std=0.3)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02, weight_decay=0)
        for m in (ours, theirs)
    ]
    pairs = factors(ours, theirs)
    allocator = theirs.base_model.rankallocator
    kept: list[int] = []
    for step in range(1, STEPS + 1):
        inputs = batch()
        (ours(**inputs).loss + sum(loss_parts(ours).values())).backward()
        theirs(**inputs).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        after_step(ours, step, STEPS)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step < STEPS - 3:  # then PEFT stops to update its means and lets them go; ours have to stay as they are
            means = {"sensitivity": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
        for branch, layer, path in pairs:
            for name, name_of_theirs in NAMES.items():
                value = getattr(layer, name_of_theirs)["default"]
                torch.testing.assert_close(getattr(branch, name), value.view_as(getattr(branch, name)))
                key = f"{path}.{name_of_theirs}.default"
                for kind, of_theirs in means.items():
                    mean = branch.get_buffer(f"{name}_{kind}")
                    assert mean.any()
                    torch.testing.assert_close(mean, of_theirs[key].view_as(mean))
        kept.append(sum(int((branch.E != 0).sum()) for branch, _, _ in pairs))
    # All 16 in the warm-up and at odd steps, where pruned ranks train on; then 8 + 8 (1 - (step - 2) / 7)^3.
    assert kept == [16, 16, 16, 10, 16, 8, 16, 8, 8, 8, 8, 8]
    assert [int(branch.alive.sum()) for branch, _, _ in pairs] != [TARGET] * 4, "the layers compete"


def statistics(model: nn.Module) -> dict[str, Tensor]:
    buffers = model.named_buffers()
    return {name: buffer.clone() for name, buffer in buffers if name.endswith(("_sensitivity", "_uncertainty"))}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_whose_gradients_are_not_finite_leaves_the_importance_as_it_was(value: float) -> None:
    """As where a GradScaler skips the optimiser's step: the schedule goes on without it."""
    model = inject(bert(), OURS)
    branches = [module for module in model.modules() if isinstance(module, AdaLoRABranch)]
    for branch in branches:
        nn.init.normal_(branch.E)
    model(**batch()).loss.backward()
    after_step(model, 1, STEPS)
    before = statistics(model)
    assert all(mean.any() for mean in before.values())
    branches[1].A.grad[1, 2] = value
    after_step(model, 4, STEPS)
    after = statistics(model)
    assert all(torch.equal(after[name], mean) for name, mean in before.items())
    assert sum(int(branch.alive.sum()) for branch in branches) == budget(4, 2, STEPS - 3, 4 * RANK, 4 * TARGET)


def test_a_training_that_begins_with_skipped_steps_is_that_without_them() -> None:
    """A GradScaler lowers its scale until the gradients are finite."""
    scaled, plain = inject(bert(), OURS), inject(bert(), OURS)
    plain.load_state_dict(scaled.state_dict())
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-60)
    inputs, step = batch(), 0
    while not any(mean.any() for mean in statistics(scaled).values()):
        step += 1
        optimizers[0].zero_grad()
        scaler.scale(1e3 * scaled(**inputs).loss).backward()
        scaler.step(optimizers[0])
        after_step(scaled, step, STEPS)
        scaler.update()
    assert step == 2, "the first is skipped"
    (1e3 * plain(**inputs).loss).backward()
    optimizers[1].step()
    after_step(plain, step, STEPS)
    for name, mean in statistics(plain).items():
        torch.testing.assert_close(statistics(scaled)[name], mean, rtol=1e-4, atol=1e-9)


def test_budget_is_cubic_and_without_a_target_two_thirds() -> None:
    assert [budget(step, 2, 10, 288, 192) for step in (2, 6, 10, 11)] == [288, 192 + 12, 192, 192]
    model = inject(bert(), AdaLoRA(rank=3, rank_pattern={r"layer\.1": 5}))  # 2 x 3 + 2 x 5 ranks
    model(**batch()).loss.backward()
    for step in range(1, 5):
        after_step(model, step, 4)
    assert sum(int(module.alive.sum()) for module in model.modules() if isinstance(module, AdaLoRABranch)) == 11


def test_the_penalty_has_a_gradient_only_where_it_has_a_weight() -> None:
    assert loss_parts(inject(bert(), AdaLoRA(orthogonality=0.0))) == {}
    model = inject(bert(), AdaLoRA(rank=3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (penalty,) = loss_parts(model).values()
    assert penalty.dtype == torch.float32
    penalty.backward()
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"A", "B"}


def test_published_count_on_vit_b16() -> None:
    """0.44 M, Table 2 of the paper."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert trainable_parameters(inject(model, AdaLoRA(rank=8, targets=("q", "k", "v")))) == 442_656


def test_initial_values() -> None:
    model = inject(bert(), AdaLoRA(rank=8))
    branches = [module for module in model.modules() if isinstance(module, AdaLoRABranch)]
    assert len(branches) == 4 and not any(branch.E.any() for branch in branches)
    for name in "AB":
        values = torch.stack([getattr(branch, name).detach().flatten() for branch in branches])
        assert values.std() == pytest.approx(0.02, rel=0.15) and abs(values.mean()) < 0.004
        assert values.abs().max() > 0.04  # normal, not uniform


def test_dropout_acts_in_training_only() -> None:
    model, inputs = inject(bert(), AdaLoRA(rank=4, dropout=0.5)), batch()
    for module in model.modules():
        if isinstance(module, AdaLoRABranch):
            nn.init.normal_(module.E, std=20.0)
    twin = copy.deepcopy(model)
    assert torch.equal(model(**inputs).logits, twin(**inputs).logits)
    assert not torch.equal(model.train()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4, "target_rank": 5}, "target_rank <= rank, but got 5 and 4"),
        ({"initial_warmup": 0.5, "final_tuning": 0.5}, "sum below 1, but got 0.5 and 0.5"),
        ({"initial_warmup": -0.1}, "initial_warmup >= 0"),
        ({"interval": 0}, "interval >= 1"),
        ({"orthogonality": -1}, "orthogonality >= 0"),
        ({"betas": (0.85, 1.0)}, "two betas between 0 and 1"),
        ({"rank": 0}, "AdaLoRA needs rank >= 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**settings)
