"""ReSoRA in an existing transformers.Trainer script: the README's example, and what the optimiser really gets."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from adapters import AdaLoRA, inject
from regularizers import ReSoRA
from training import ReSoRAMixin, ReSoRATrainer

README = (Path(__file__).parents[2] / "README.md").read_text()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def peft_model() -> nn.Module:
    model = get_peft_model(
        bert(), LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def dataset(items: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1, 50, (6,), generator=generator),
            "attention_mask": (torch.arange(6) < 3 + i % 4).long(),
            "labels": torch.tensor(i % 2),
        }
        for i in range(items)
    ]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1, "report_to": "none"}
    return TrainingArguments(str(folder), use_cpu=True, save_strategy="no", **(defaults | settings))


def test_the_readmes_example_trains_with_the_penalty(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n((?:(?!```).)*ReSoRATrainer\(.*?)```", README, flags=re.DOTALL)
    changed = [line for line in example.splitlines() if "#" in line]
    assert 1 <= len(changed) <= 5, "the example marks the lines that a PEFT user changes"
    namespace = {"bert": bert(), "arguments": arguments(tmp_path), "dataset": dataset()}
    exec(example, namespace)
    logged = [entry for entry in namespace["trainer"].state.log_history if "resora_linear" in entry]
    assert len(logged) == 4 and all(entry["loss"] > entry["resora_linear"] > 0 for entry in logged)


def over_all_items(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("loss", "takes_items"),
    [(None, False), (None, True), (over_all_items, False)],
    ids=["mean of a batch", "a model that ignores the number of items", "scaled by all accumulated items"],
)
def test_the_optimizer_gets_the_gradient_of_loss_plus_penalty_over_accumulated_batches(
    tmp_path: Path, loss: Any, takes_items: bool
) -> None:
    """Two accumulated batches of two, one step of plain SGD, against a loop of our own.

    BERT's classifier takes num_items_in_batch and ignores it: transformers then adds its losses up instead of averaging
    them. The penalties are averaged in any case.
    """
    data = dataset(4)
    resora = ReSoRA("overlap", weight=0.7)
    expected = peft_model().double().train()
    losses = []
    for batch in (data[:2], data[2:]):
        with resora.capture(expected) as subspaces:
            output = expected(**{key: torch.stack([item[key] for item in batch]) for key in batch[0]})
        losses.append((output.loss * 2 if takes_items else output.loss) + sum(resora(subspaces).values()))
    torch.stack(losses).mean().backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad

    model = peft_model().double()
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "max_grad_norm": 0.0,
    }  # fmt: skip
    trainer = ReSoRATrainer(
        model=model,
        args=arguments(tmp_path, train_sampling_strategy="sequential", **settings),
        train_dataset=data,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
        regularizer=resora,
        compute_loss_func=loss,
    )
    assert trainer.model_accepts_loss_kwargs
    trainer.model_accepts_loss_kwargs = takes_items
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
    trainer.train()
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


class OwnLoss(Trainer):
    """As TRL's trainers of policies: it has no outputs to return, and does not know the number of items."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False) -> Tensor:  # type: ignore[override]
        if return_outputs:
            raise ValueError("this trainer does not support returning outputs")
        return model(**inputs).loss


class OwnStep(Trainer):
    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = model.train()(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_trainer_that_returns_no_outputs_is_penalised(tmp_path: Path) -> None:
    class Mine(ReSoRAMixin, OwnLoss): ...

    model, batch = peft_model().train(), {k: torch.stack([x[k] for x in dataset(4)]) for k in dataset(1)[0]}
    resora = ReSoRA("linear", weight=0.5)
    with resora.capture(model) as subspaces:
        plain = model(**batch).loss
    found = Mine(model=model, args=arguments(tmp_path), regularizer=resora).compute_loss(model, dict(batch))
    torch.testing.assert_close(found, plain + resora(subspaces)["resora_linear"])


def test_a_training_that_never_adds_the_penalty_is_stopped(tmp_path: Path) -> None:
    class Mine(ReSoRAMixin, OwnStep): ...

    data = {"args": arguments(tmp_path, num_train_epochs=1), "train_dataset": dataset()}
    with pytest.raises(RuntimeError, match=r"Mine has trained without ReSoRA\('linear', weight=0.01\)"):
        Mine(model=peft_model(), regularizer=ReSoRA("linear"), **data).train()
    Mine(model=peft_model(), **data).train()


def test_evaluation_has_no_penalty(tmp_path: Path) -> None:
    plain = Trainer(model=peft_model(), args=arguments(tmp_path), eval_dataset=dataset())
    ours = ReSoRATrainer(
        model=peft_model(), args=arguments(tmp_path), eval_dataset=dataset(), regularizer=ReSoRA("linear", weight=9.0)
    )
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


def test_without_a_regularizer_it_is_the_plain_trainer(tmp_path: Path) -> None:
    models = [peft_model(), peft_model()]
    for trainer, model in zip((Trainer, ReSoRATrainer), models, strict=True):
        trainer(model=model, args=arguments(tmp_path), train_dataset=dataset()).train()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


ADALORA = AdaLoRA(rank=3, target_rank=1, targets=("q", "v"))


def adalora_model(adapter: AdaLoRA = ADALORA) -> nn.Module:
    model = bert()
    torch.manual_seed(1)
    return inject(model, adapter, train=("classifier",))


def ranks(model: nn.Module) -> list[int]:
    return [int(tensor.sum()) for name, tensor in model.state_dict().items() if name.endswith(".alive")]


@pytest.mark.parametrize("regularizer", [None, ReSoRA("linear", weight=0.1)], ids=str)
def test_an_adapter_brings_its_penalty_and_its_schedule(tmp_path: Path, regularizer: ReSoRA | None) -> None:
    model = adalora_model()
    trainer = ReSoRATrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=4),
        train_dataset=dataset(),
        regularizer=regularizer,
    )
    assert ranks(model) == [3] * 4
    trainer.train()
    assert sum(ranks(model)) == 4, "a rank a layer is left, on average"
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 8 and all(entry["loss"] > entry["adalora_orthogonality"] > 0 for entry in logged)
    assert all(("resora_linear" in entry) == (regularizer is not None) for entry in logged)


def test_a_schedule_that_is_over_prunes_no_more(tmp_path: Path) -> None:
    model = adalora_model()
    args = arguments(tmp_path, num_train_epochs=4)
    ReSoRATrainer(model=model, args=args, train_dataset=dataset(), later_stage=True).train()
    assert ranks(model) == [3] * 4


def test_an_adapters_penalty_is_averaged_over_accumulated_batches(tmp_path: Path) -> None:
    """As the regularizer's is: BERT's loss counts as divided already."""
    batch = {key: torch.stack([item[key] for item in dataset(4)]) for key in dataset(1)[0]}
    losses = []
    for adapter in (ADALORA, dataclasses.replace(ADALORA, orthogonality=0.0)):
        trainer = ReSoRATrainer(model=adalora_model(adapter).train(), args=arguments(tmp_path))
        trainer.current_gradient_accumulation_steps = 2
        for items in (None, torch.tensor(8)):
            loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
            losses.append(float(loss.detach()))
        if adapter is ADALORA:
            (part,) = adapter.loss_parts(trainer.model).values()
    assert losses[0] - losses[2] == pytest.approx(float(part), rel=1e-4)
    assert losses[1] - losses[3] == pytest.approx(float(part) / 2, rel=1e-4)


class _TwoProcesses:
    """What accelerate is to one of two processes, of which the other has parts of three times the size."""

    num_processes = 2
    device = torch.device("cpu")

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "mean"
        return torch.stack([tensor, 3 * tensor]).mean(dim=0)


def test_parts_are_logged_as_means_over_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the loss is; a log of anything else is that of one process, and must wait for none."""
    trainer = ReSoRATrainer(model=peft_model(), args=arguments(tmp_path))
    monkeypatch.setattr(trainer, "accelerator", _TwoProcesses())
    for value in (1.0, 2.0):
        trainer.note({"first": torch.tensor(value), "second": torch.tensor(10 * value)})
    trainer.log({"eval_loss": 0.5})
    trainer.log({"loss": 7.0})
    assert "first" not in trainer.state.log_history[0]
    logged = trainer.state.log_history[1]
    assert {name: logged[name] for name in ("loss", "first", "second")} == {"loss": 7.0, "first": 3.0, "second": 30.0}
