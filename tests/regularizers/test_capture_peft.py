"""capture on PEFT's own LoRA, and under what a training script wraps a model in."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path
from typing import Any

import adapters  # noqa: F401  (a spawned process imports this file alone: before peft, which imports torchvision)

# isort: split
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from adapters import LoRA, inject
from regularizers import ReSoRA, capture

IDS = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query"


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def with_peft(**settings: Any) -> PeftModel:
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"]} | settings
    model = get_peft_model(bert(), LoraConfig(**config))
    fill(model)
    return model.eval()


def with_ours() -> nn.Module:
    model = inject(bert(), LoRA(rank=4, alpha=12, targets=("q", "v")), train=("classifier",))
    fill(model)
    return model.eval()


def fill(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith(".B"):
            nn.init.normal_(parameter, std=0.5)


def penalty(model: nn.Module, **batch: Tensor) -> Tensor:
    resora = ReSoRA("overlap", weight=1.0)  # moves A and B
    with resora.capture(model) as subspaces:
        model(**batch)
    return next(iter(resora(subspaces).values()))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def delta(model: nn.Module, layer: nn.Module, run: Any) -> Tensor:
    """What a layer adds to its base layer, from its output and input alone."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen["x"], seen["y"] = args[0], output

    handle = layer.register_forward_hook(keep)
    run()
    handle.remove()
    base = layer.base_layer if hasattr(layer, "base_layer") else layer
    return seen["y"] - nn.functional.linear(seen["x"], base.weight, base.bias)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"lora_dropout": 0.3, "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}],
)
def test_activations_times_basis_is_what_pefts_layer_adds(settings: dict[str, Any]) -> None:
    model = with_peft(**settings)
    with capture(model) as subspaces:
        added = delta(model, model.get_submodule(QUERY), lambda: model(input_ids=IDS))
    assert len(subspaces) == 4 and f"{QUERY}.default" in subspaces
    activations, basis = subspaces[f"{QUERY}.default"]
    assert activations.shape == (18, 4) and basis.shape == (4, 16)
    torch.testing.assert_close((activations @ basis).view(3, 6, 16), added, atol=1e-5, rtol=1e-4)


def test_peft_and_ours_show_the_same_subspaces_without_padding() -> None:
    peft, ours = with_peft(), with_ours()
    layers = {name: module for name, module in peft.named_modules() if hasattr(module, "lora_A")}
    for name, module in layers.items():
        branch = next(iter(ours.get_submodule(name.removeprefix("base_model.model.")).branches.values()))
        with torch.no_grad():
            branch.A.copy_(module.lora_A["default"].weight)
            branch.B.copy_(module.lora_B["default"].weight)
    with capture(peft) as of_peft, capture(ours) as of_ours:
        peft(input_ids=IDS, attention_mask=MASK)
        ours(input_ids=IDS, attention_mask=MASK)
    assert len(of_peft) == len(of_ours) == 4
    for one, other in zip(of_peft.values(), of_ours.values(), strict=True):
        assert len(one.activations) == MASK.sum()
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_samples_may_be_the_mean_over_real_tokens(build: Any) -> None:
    model = build()
    with capture(model, samples="mean") as means:
        model(input_ids=IDS, attention_mask=MASK)
    for item, length in enumerate(MASK.sum(dim=1).tolist()):
        with capture(model) as alone:
            model(input_ids=IDS[item : item + 1, :length])
        for name, (activations, _) in means.items():
            torch.testing.assert_close(activations[item], alone[name].activations.mean(dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_on_weights_the_update_is_the_layers_weight(build: Any) -> None:
    model = build().train()
    with capture(model, on="weights", layers="query|q$") as subspaces:
        pass
    assert len(subspaces) == 2 and all(pair.activations.requires_grad for pair in subspaces.values())
    for name, (activations, basis) in subspaces.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        weight = layer.get_delta_weight("default") if hasattr(layer, "get_delta_weight") else None
        if weight is None:
            branch = layer.branches["q"]
            weight = 12 / 4 * branch.B @ branch.A
        torch.testing.assert_close((activations @ basis).T, weight)
    (part,) = ReSoRA("linear", weight=1.0, on="weights", layers="query|q$")(subspaces).values()
    part.backward()


def test_several_adapters_disabled_ones_and_merged_ones() -> None:
    model = with_peft()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    fill(model)

    def names() -> set[str]:
        with capture(model) as subspaces:
            model(input_ids=IDS)
        return {name.rpartition(".")[2] for name in subspaces}

    assert names() == {"default"}
    model.set_adapter("second")
    assert names() == {"second"}
    model.base_model.set_adapter(["default", "second"])
    assert names() == {"default", "second"}
    with capture(model) as subspaces:
        added = delta(model, model.get_submodule(QUERY), lambda: model(input_ids=IDS))
    both = sum(
        subspaces[f"{QUERY}.{name}"].activations @ subspaces[f"{QUERY}.{name}"].basis for name in ("default", "second")
    )
    torch.testing.assert_close(both.view(3, 6, 16), added, atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        assert names() == set()
        with pytest.raises(ValueError, match="adapters switched on"):
            penalty(model, input_ids=IDS)
    model.base_model.set_adapter(["default"])
    model.merge_adapter()
    assert names() == set()
    model.unmerge_adapter()
    assert names() == {"default"}


def test_layers_that_share_a_module_add_up() -> None:
    model = with_peft(target_modules=["query"])
    first, second = model.base_model.model.bert.encoder.layer
    second.attention.self.query = first.attention.self.query
    with capture(model) as subspaces:
        model(input_ids=IDS)
    assert [len(pair.activations) for pair in subspaces.values()] == [36]


def test_what_has_no_rank_one_parts_is_refused_by_name() -> None:
    dora = with_peft(use_dora=True)
    with pytest.raises(ValueError, match=r"query: adapter 'default' is a LoRA variant \(Dora"), capture(dora):
        dora(input_ids=IDS)
    embedding = with_peft(target_modules=["word_embeddings", "query"])
    with pytest.raises(ValueError, match="word_embeddings: it adapts Embedding"), capture(embedding):
        embedding(input_ids=IDS)
    with capture(embedding, layers="query") as subspaces:
        embedding(input_ids=IDS)
    assert len(subspaces) == 2
    with (
        pytest.raises(ValueError, match="layers='key' is found in no low-rank layer"),
        capture(embedding, layers="key"),
    ):
        pass


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_nothing_stays_outside_the_context(build: Any) -> None:
    model = build()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert hooks() == 0
    with capture(model) as subspaces:
        model(input_ids=IDS)
        assert hooks() > 0
    with pytest.raises(IndexError), capture(model):
        model(input_ids=torch.tensor([[999]]))
    model(input_ids=IDS)
    assert hooks() == 0 and {len(pair.activations) for pair in subspaces.values()} == {18}


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_autocast(build: Any) -> None:
    model = build()
    exact = penalty(model, input_ids=IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = penalty(model, input_ids=IDS)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0)
    rounded.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def loss_and_penalty(model: nn.Module, measure: str) -> Tensor:
    resora = ReSoRA(measure, weight=1.0)
    with resora.capture(model) as subspaces:
        loss = model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([1, 0, 1])).loss
    return loss + sum(resora(subspaces).values())


@pytest.mark.parametrize("build", [with_peft, with_ours])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("measure", ["overlap", "linear", "cosine", "euclidean"])
def test_gradient_checkpointing(build: Any, reentrant: bool, measure: str) -> None:
    plain, checkpointed = build().train(), build().train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    embeddings = checkpointed.get_submodule("base_model.model.bert" if build is with_peft else "bert").embeddings
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
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
    plain, checkpointed = build().train(), build().train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    embeddings = checkpointed.get_submodule("base_model.model.bert" if build is with_peft else "bert").embeddings
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
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
def test_compilation_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="is compiled"), capture(torch.compile(build(), backend="eager")):
        pass
    in_place = build()
    in_place.compile(backend="eager")
    with pytest.raises(ValueError, match="is compiled"), capture(in_place):
        pass


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_accumulated_gradients_are_the_sum_of_those_of_each_batch(build: Any) -> None:
    separate: dict[str, Tensor] = {}
    for rows in (slice(0, 2), slice(2, 3)):
        model = build()
        penalty(model, input_ids=IDS[rows], attention_mask=MASK[rows]).backward()
        separate = {n: g + separate.get(n, 0.0) for n, g in gradients(model).items()}
    model = build()
    for rows in (slice(0, 2), slice(2, 3)):
        penalty(model, input_ids=IDS[rows], attention_mask=MASK[rows]).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, separate[name])


def _penalised(wrapped: nn.Module, row: int) -> list[str]:
    rows = slice(row, row + 1)
    resora = ReSoRA("overlap", weight=1.0)
    with resora.capture(wrapped) as subspaces:
        output = wrapped(input_ids=IDS[rows], attention_mask=MASK[rows], labels=torch.tensor([1]))
    (output.loss + sum(resora(subspaces).values())).backward()
    return list(subspaces)


def _process(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for build in (with_ours, with_peft):
        model = build().train()
        names = _penalised(nn.parallel.DistributedDataParallel(model), rank)
        assert not any(name.startswith("module.") for name in names)
        torch.save(gradients(model), f"{folder}/{build.__name__}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ddp_averages_the_penalties_of_its_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    for build in (with_ours, with_peft):
        expected: dict[str, Tensor] = {}
        for row in (0, 1):
            model = build().train()
            _penalised(model, row)
            expected = {name: g / 2 + expected.get(name, 0.0) for name, g in gradients(model).items()}
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{build.__name__}{rank}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_linear_costs_next_to_no_flops(build: Any) -> None:
    """At these tiny sizes the share is larger than in a real layer; the forward pass is not computed twice."""
    model = build().train()

    def flops(resora: ReSoRA | None) -> int:
        with FlopCounterMode(display=False) as counter:
            if resora is None:
                model(input_ids=IDS, labels=torch.zeros(3, dtype=torch.long)).loss.backward()
            else:
                with resora.capture(model) as subspaces:
                    loss = model(input_ids=IDS, labels=torch.zeros(3, dtype=torch.long)).loss
                (loss + sum(resora(subspaces).values())).backward()
        return counter.get_total_flops()

    gram = 2 * 18 * 4 * 4  # (r, N) x (N, r)
    assert flops(ReSoRA("linear")) - flops(None) == 4 * (gram + 2 * gram)  # four layers; the product is derived twice


def test_a_copy_of_the_model_is_captured_on_its_own() -> None:
    model = with_ours()
    twin = copy.deepcopy(model)
    with capture(twin) as subspaces:
        model(input_ids=IDS)
    assert not subspaces
