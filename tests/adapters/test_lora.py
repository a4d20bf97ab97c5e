"""LoRA against W + BA computed on its own, and against PEFT."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from adapters import LoRA, inject, merge, trainable_parameters

D = 32


@pytest.fixture
def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def vit() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=D, num_heads=4, depth=2, num_classes=5
    ).eval()


def fill(model: nn.Module) -> None:
    """Give B values, as if trained."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.2)


def factors(model: nn.Module, layer: str, role: str) -> tuple[Tensor, Tensor]:
    branch = model.get_submodule(f"{layer}.branches.{role}")
    return branch.A.detach(), branch.B.detach()


def test_starts_as_the_backbone_and_adds_scaled_ba(vit: nn.Module) -> None:
    x = torch.randn(3, 3, 32, 32)
    stock = copy.deepcopy(vit)
    inject(vit, LoRA(rank=4, alpha=8, targets=("q", "k", "v", "o", "fc1", "fc2")), train=("head",))
    assert torch.equal(vit(x), stock(x))

    fill(vit)
    for name, module in stock.named_modules():  # W + 2 B A, row block by row block, with nothing of ours but A and B
        if name.endswith("attn.qkv"):
            for i, role in enumerate("qkv"):
                a, b = factors(vit, name, role)
                module.weight.data[i * D : (i + 1) * D] += 2.0 * b @ a
        for suffix, role in (("attn.proj", "o"), ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2")):
            if name.endswith(suffix):
                a, b = factors(vit, name, role)
                module.weight.data += 2.0 * b @ a
    torch.testing.assert_close(vit(x), stock(x), atol=1e-5, rtol=1e-5)

    merge(vit)
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(vit.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


def test_merge_leaves_the_stock_model(vit: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    stock = copy.deepcopy(vit)
    inject(vit, LoRA(rank=4, targets=("q", "v")), train=("head",))
    fill(vit)
    adapted = vit(x)
    merge(vit)
    assert {name: type(m) for name, m in vit.named_modules()} == {name: type(m) for name, m in stock.named_modules()}
    stock.load_state_dict(vit.state_dict(), strict=True)
    torch.testing.assert_close(stock(x), adapted, atol=1e-5, rtol=1e-5)


def test_equals_peft_on_bert(bert: BertModel) -> None:
    import peft

    ids = torch.randint(0, 50, (3, 9))
    ours, theirs = bert, copy.deepcopy(bert)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    theirs = peft.get_peft_model(theirs, config).eval()
    inject(ours, LoRA(rank=4, alpha=8, targets=("q", "v")))
    fill(ours)
    for i in range(2):
        for layer, role in (("query", "q"), ("value", "v")):
            path = f"encoder.layer.{i}.attention.self.{layer}"
            a, b = factors(ours, path, role)
            lora = theirs.base_model.model.get_submodule(path)
            lora.lora_A["default"].weight.data.copy_(a)
            lora.lora_B["default"].weight.data.copy_(b)
    torch.testing.assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, atol=1e-6, rtol=1e-5)
    assert trainable_parameters(ours) == theirs.get_nb_trainable_parameters()[0]

    merged = theirs.merge_and_unload()
    merge(ours)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, atol=1e-6, rtol=1e-5)


def test_only_the_adapter_and_the_head_train(vit: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in vit.named_parameters()}
    inject(vit, LoRA(rank=4, targets=("q", "k", "v")), train=("head",))
    optimizer = torch.optim.SGD([p for p in vit.parameters() if p.requires_grad], lr=0.1)
    grown = {name for name, p in vit.named_parameters() if p.requires_grad}
    assert {name for name in grown if ".branches." not in name} == {"head.weight", "head.bias"}
    reached: set[str] = set()
    for _ in range(2):
        F.cross_entropy(vit(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])).backward()
        reached |= {name for name, p in vit.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert reached == grown
    for name, parameter in before.items():
        if name not in grown:
            assert torch.equal(vit.get_parameter(name), parameter), name


@pytest.mark.parametrize(("rank", "count"), [(2, 110_592), (4, 221_184), (8, 442_368)])
def test_published_counts_on_vit_b16(rank: int, count: int) -> None:
    """0.11, 0.22 and 0.44 M parameters, Tables 2 and 5 of the paper."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    inject(model, LoRA(rank=rank, targets=("q", "k", "v")))
    assert trainable_parameters(model) == count


def test_published_count_on_bert_base() -> None:
    """294,912: with the 787,456 of VSE-infinity's projection, the 1.1 M of Table 1."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
    assert trainable_parameters(inject(model, LoRA(rank=8, targets=("q", "v")))) == 294_912


def test_initial_values(bert: BertModel) -> None:
    inject(bert, LoRA(rank=8))
    a, b = factors(bert, "encoder.layer.0.attention.self.query", "q")
    assert not b.any()
    assert a.abs().max() <= 1 / math.sqrt(D)
    assert a.std() == pytest.approx(1 / math.sqrt(3 * D), rel=0.15)  # of a uniform distribution


def test_dropout_acts_in_training_only(bert: BertModel) -> None:
    inject(bert, LoRA(rank=4, dropout=0.5))
    fill(bert)
    ids = torch.randint(0, 50, (2, 5))
    assert torch.equal(bert(ids).last_hidden_state, bert(ids).last_hidden_state)
    bert.train()
    assert not torch.equal(bert(ids).last_hidden_state, bert(ids).last_hidden_state)


def test_runs_under_autocast_and_deepcopy(vit: nn.Module) -> None:
    inject(vit, LoRA(rank=4, targets=("q", "o")))
    fill(vit)
    x = torch.randn(2, 3, 32, 32)
    twin = copy.deepcopy(vit)
    assert torch.equal(twin(x), vit(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = vit(x)
    torch.testing.assert_close(half.float(), vit(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank >= 1"),
        ({"alpha": -1}, "alpha > 0"),
        ({"dropout": 1.0}, "dropout < 1"),
        ({"targets": ("query",)}, "q, k, v, o, fc1, fc2"),
        ({"targets": "q("}, "no regular expression"),
        ({"rank_pattern": {"visual": 0}}, "rank=8, 0"),
        ({"targets": ("q", "q")}, "distinct"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


def test_bad_injections_are_refused(vit: nn.Module) -> None:
    with pytest.raises(ValueError, match="did you mean head"):
        inject(vit, LoRA(), train=("haed",))
    with pytest.raises(ValueError, match="no layer for target 'q'"):
        inject(nn.Sequential(nn.Linear(3, 3)), LoRA(targets=("q",)))
    with pytest.raises(ValueError, match="holds no adapter"):
        merge(vit)
    inject(vit, LoRA())
    with pytest.raises(ValueError, match="already holds"):
        inject(vit, LoRA())


def test_a_second_adapter_is_refused_at_every_level(vit: nn.Module) -> None:
    def fresh() -> nn.Sequential:
        return nn.Sequential(copy.deepcopy(vit), copy.deepcopy(vit))

    for first, second in ((lambda m: m, lambda m: m[0]), (lambda m: m[0], lambda m: m)):
        for finish in (lambda m: m, merge):
            model = fresh()
            finish(inject(first(model), LoRA(rank=2)))
            with pytest.raises(
                ValueError, match=r"not fresh: an adapter was injected into (its 0|what it is a part of)"
            ):
                inject(second(model), LoRA(rank=3, targets=("k",)))
    model = fresh()
    inject(model[0], LoRA(rank=2)), inject(model[1], LoRA(rank=3))  # side by side there is no conflict
    assert len(model[0].blocks[0].attn.qkv.branches["q"].A) == 2
    assert len(model[1].blocks[0].attn.qkv.branches["q"].A) == 3


def test_a_refused_injection_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].requires_grad_(False)
    with pytest.raises(ValueError, match="no layer for target 'q'"):
        inject(model, LoRA())
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    assert inject(model, LoRA(targets="0")).injection.adapter.targets == "0"


def test_a_target_given_as_a_text_is_taken_for_no_pattern() -> None:
    with pytest.raises(ValueError, match=r"'q', a pattern; did you mean the semantic target \('q',\)"):
        LoRA(targets="q")
