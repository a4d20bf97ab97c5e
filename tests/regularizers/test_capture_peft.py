"""capture on PEFT's own LoRA, beside ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_berts import IDS, MASK, QUERY, fill, penalty, with_ours, with_peft

# isort: split
from peft import LoraConfig
from torch import Tensor, nn

from regularizers import ReSoRA, capture


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
