"""Adapted attention against torch's own nn.MultiheadAttention and open_clip's Attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from adapters import LoRA, inject, merge
from regularizers import capture


class Block(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn


def multihead(batch_first: bool = True, bias: bool = True) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, 4, batch_first=batch_first, bias=bias).eval()


MASKS = {
    "none": None,
    "added": torch.full((6, 6), float("-inf")).triu(1),
    "boolean": torch.ones(6, 6, dtype=torch.bool).triu(1),
    "of each head": torch.randn(3 * 4, 6, 6, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_is_torchs(batch_first: bool, mask: str, padding: bool) -> None:
    stock = multihead(batch_first)
    adapted = copy.deepcopy(stock)
    inject(Block(adapted), LoRA(rank=2, targets=("q", "k", "v", "o")))
    x = torch.randn(3, 6, 16) if batch_first else torch.randn(6, 3, 16)
    ignored = torch.arange(6) >= torch.tensor([6, 4, 2])[:, None] if padding else None
    if padding and mask in ("added", "of each head"):  # torch wants both of one type
        assert ignored is not None
        ignored = torch.zeros(3, 6).masked_fill(ignored, float("-inf"))
    arguments = {"attn_mask": MASKS[mask], "key_padding_mask": ignored, "need_weights": False}
    with torch.enable_grad():  # torch's fast path aside
        expected = stock(x, x, x, **arguments)[0]
    torch.testing.assert_close(adapted(x, x, x, **arguments)[0], expected, atol=1e-6, rtol=1e-5)


def test_without_a_bias() -> None:
    stock = multihead(bias=False)
    adapted = copy.deepcopy(stock)
    inject(Block(adapted), LoRA(rank=2, targets=("v",)))
    x = torch.randn(3, 6, 16)
    torch.testing.assert_close(adapted(x, x, x, need_weights=False)[0], stock(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"scale_heads": True, "inner_norm": True}, {"qkv_bias": False}]
)
def test_open_clips_attention_is_its_own(options: dict[str, bool]) -> None:
    from open_clip.transformer import Attention

    torch.manual_seed(0)
    stock = Attention(16, 4, **options).eval()
    adapted = copy.deepcopy(stock)
    inject(Block(adapted), LoRA(rank=2, targets=("q", "v")))
    x = torch.randn(3, 6, 16)
    for mask in (None, MASKS["added"], MASKS["of each head"]):
        torch.testing.assert_close(adapted(x, attn_mask=mask), stock(x, attn_mask=mask), atol=1e-6, rtol=1e-5)


def test_out_proj_alone_trains() -> None:
    """Its forward is never called in nn.MultiheadAttention: a layer put around it would be ignored."""
    model = inject(Block(multihead()), LoRA(rank=2, targets=("o",)))
    x = torch.randn(3, 6, 16)
    model.attn(x, x, x, need_weights=False)[0].sum().backward()
    assert model.attn.out_proj.branches["o"].B.grad.abs().sum() > 0


def test_what_it_cannot_do_is_an_error_that_says_how_to_leave_it_out() -> None:
    model = inject(Block(multihead()), LoRA(rank=2, targets=("q",)))
    x = torch.randn(3, 6, 16)
    with pytest.raises(NotImplementedError, match=r"it got 2 dimensions.*targets=r\"self_attn\\\."):
        model.attn(x[0], x[0], x[0])
    with pytest.raises(NotImplementedError, match="is_causal=True"):
        model.attn(x, x, x, is_causal=True)


def dense(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """The same with random updates added to its weights."""
    for name, parameter in attention.named_parameters():
        if name.endswith((".B", "ssf_scale", "ssf_shift")):
            nn.init.normal_(parameter)
    return merge(copy.deepcopy(attention))


@pytest.mark.parametrize("weights", [None, "averaged", "of each head"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_is_torchs(batch_first: bool, weights: str | None, bias: bool) -> None:
    adapted = inject(multihead(batch_first, bias), LoRA(rank=2, targets=("q", "v")))
    stock = dense(adapted)
    query, key, value = torch.randn(3, 4, 16), torch.randn(3, 6, 16), torch.randn(3, 6, 16)
    ignored = torch.arange(6) >= torch.tensor([6, 4, 2])[:, None]
    for inputs in ((query, key, value), (query, key, key), (key, key, value), (key, key, key)):
        given = inputs if batch_first else tuple(x.transpose(0, 1) for x in inputs)
        settings: dict[str, Any] = {"need_weights": weights is not None, "average_attn_weights": weights == "averaged"}
        settings["key_padding_mask"] = ignored
        with torch.enable_grad():  # torch's fast path aside
            expected, found = stock(*given, **settings), adapted(*given, **settings)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_each_projection_of_cross_attention_records_its_own_input() -> None:
    model = inject(Block(multihead()), LoRA(rank=2, targets=("q", "v")))
    query, key = torch.randn(2, 1, 16), torch.randn(2, 6, 16)
    with capture(model) as subspaces:
        model.attn(query, key, key)
    for role, x in (("q", query), ("v", key)):
        expected = x.flatten(0, 1) @ model.attn.weight_subspaces(role)[0]
        torch.testing.assert_close(subspaces[f"attn.{role}"].activations, expected)


def siglip() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8)), (torch.randn(2, 3, 16, 16),)


def decoder() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerDecoder(layer, 1), (torch.randn(2, 3, 16), torch.randn(2, 5, 16))


@pytest.mark.parametrize(("build", "cross"), [(siglip, "head.attention"), (decoder, "multihead_attn")])
def test_models_with_cross_attention_inside_keep_their_outputs_and_train_it(build: Any, cross: str) -> None:
    model, inputs = build()

    def output() -> torch.Tensor:
        out = model.eval()(*inputs)
        return getattr(out, "pooler_output", out)

    before = output()
    inject(model, LoRA(rank=2, targets=("q", "k", "v")))
    after = output()
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    after.square().sum().backward()
    there = {n: p.grad for n, p in model.named_parameters() if f"{cross}.branches" in n and n.endswith(".B")}
    assert len(there) == 3 and all(gradient.abs().sum() > 0 for n, gradient in there.items() if ".k." not in n)


def test_the_updates_gradient_is_autograds() -> None:
    """The backward pass written by hand against torch's own, through the same factors as a dense weight."""
    model = inject(Block(multihead().double()), LoRA(rank=2, targets=("q", "v")), train=("attn.in_proj_bias",))
    attention = model.attn
    for branch in attention.branches.values():
        nn.init.normal_(branch.B)
    x = torch.randn(3, 6, 16, dtype=torch.float64, requires_grad=True)
    attention(x, x, x, need_weights=False)[0].square().sum().backward()

    stock = multihead().double()
    weight = stock.in_proj_weight.detach().clone()
    factors = {r: (b.A.detach().requires_grad_(), b.B.detach().requires_grad_()) for r, b in attention.branches.items()}
    rows = [weight[i * 16 : (i + 1) * 16] for i in range(3)]
    for index, role in ((0, "q"), (2, "v")):
        a, b = factors[role]
        rows[index] = rows[index] + attention.branches[role].scale * b @ a
    y = x.detach().requires_grad_()
    parameters = {**dict(stock.named_parameters()), "in_proj_weight": torch.cat(rows)}
    torch.func.functional_call(stock, parameters, (y, y, y), {"need_weights": False})[0].square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(attention.in_proj_bias.grad, stock.in_proj_bias.grad)
    for role, (a, b) in factors.items():
        torch.testing.assert_close(attention.branches[role].A.grad, a.grad)
        torch.testing.assert_close(attention.branches[role].B.grad, b.grad)


@pytest.mark.parametrize("targets", [("q", "v"), r"linear1$", r"self_attn\.(q|v)$", r"out_proj"])
def test_torchs_encoder_layer_does_not_pass_the_adapter_by_in_evaluation(targets: Any) -> None:
    """Its fast path would read the frozen weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    stock, x = copy.deepcopy(model).eval(), torch.randn(2, 5, 16)
    inject(model, LoRA(rank=2, targets=targets))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    trained = model.train()(x).detach()
    assert (trained - stock(x)).abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)
        merge(model)
        torch.testing.assert_close(model(x), trained, atol=1e-5, rtol=1e-5)
    assert vars(model.layers[0]).keys() - {"injection", "_has_been_injected"} == vars(stock.layers[0]).keys()
    assert model.layers[0].activation_relu_or_gelu == stock.layers[0].activation_relu_or_gelu == 2


@pytest.mark.parametrize("targets", [("q", "v"), r"linear1$"])
def test_torchs_encoder_hands_no_nested_tensor_to_adapted_layers(targets: Any) -> None:
    """By default it would, in evaluation under a padding mask."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    x, padding = torch.randn(2, 5, 16), torch.arange(5) >= torch.tensor([5, 3])[:, None]
    with torch.no_grad():
        expected = model.eval()(x, src_key_padding_mask=padding)
        inject(model, LoRA(rank=2, targets=targets))
        found = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], expected[~padding], atol=1e-5, rtol=1e-5)
        merge(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected, atol=1e-5, rtol=1e-5)
    assert model.use_nested_tensor is True


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_what_the_steps_leave_out_is_refused(option: str) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True, **{option: True})
    inject(attention, LoRA(rank=2, targets=("q",)))
    x = torch.randn(2, 5, 16)
    with pytest.raises(NotImplementedError, match="no add_bias_kv and no add_zero_attn"):
        attention(x, x, x, need_weights=False)


def test_an_attention_with_a_bias_of_its_own_and_no_qkv() -> None:
    """DeBERTa's kind: the rest of the model can be adapted, what reads a weight directly cannot."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj, self.q_bias = nn.Linear(4, 12, bias=False), nn.Parameter(torch.zeros(4))

    model = nn.ModuleDict({"attn": Attention(), "top": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="found in no linear layer"):
        inject(model, LoRA(targets="in_proj"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    inject(model, LoRA(rank=2, targets="top"))
