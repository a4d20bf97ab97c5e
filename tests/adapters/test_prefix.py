"""Prefix tuning against attention written out on BERT's own weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from adapters import Prefix, inject, trainable_parameters

D, HEADS, P, LAYERS = 32, 4, 3, 3
SIZES = {
    "vocab_size": 50, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def bert(attention: str = "sdpa") -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, attn_implementation=attention), add_pooling_layer=False)
    for parameter in model.parameters():
        parameter.data *= 3  # attention that is not uniform
    return model.eval()


def prefixed(model: Any) -> tuple[Any, Any]:
    stock = copy.deepcopy(model)
    torch.manual_seed(1)
    return stock, inject(model, Prefix(prompts=P, hidden=8))


@torch.no_grad()
def written_out(stock: BertModel, tensors: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings, then each layer head by head, with the prefix before the keys and values."""
    made = torch.tanh(F.linear(tensors["embedding.weight"], tensors["inner.weight"], tensors["inner.bias"]))
    made = F.linear(made, tensors["outer.weight"], tensors["outer.bias"]).view(P, LAYERS, 2, HEADS, D // HEADS)
    bias = torch.where(torch.cat([torch.ones(len(ids), P), mask], dim=1) > 0, 0.0, -math.inf)[:, None, :]
    x = stock.embeddings(ids)
    for index, layer in enumerate(stock.encoder.layer):
        own = layer.attention.self
        q, k, v = (
            linear(x).view(*ids.shape, HEADS, D // HEADS).unbind(2) for linear in (own.query, own.key, own.value)
        )
        heads = []
        for head in range(HEADS):
            keys, values = (
                torch.cat([made[:, index, which, head].expand(len(ids), -1, -1), text[head]], dim=1)
                for which, text in ((0, k), (1, v))
            )
            weights = (q[head] @ keys.mT / math.sqrt(D // HEADS) + bias).softmax(dim=-1)
            heads.append(weights @ values)
        output = layer.attention.output
        x = output.LayerNorm(output.dense(torch.cat(heads, dim=-1)) + x)
        x = layer.output(layer.intermediate(x), x)
    return x


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False, None])
def test_equals_written_out_attention(attention: str, padded: bool | None) -> None:
    stock, model = prefixed(bert(attention))
    ids, mask = torch.randint(3, 50, (3, 7)), torch.ones(3, 7)
    if padded:
        mask[0, 4:], mask[1, 6:] = 0, 0
    tensors = {name: p.detach() for name, p in model.encoder.prefix.named_parameters()}
    expected = written_out(stock, tensors, ids, mask)
    actual = model(ids, attention_mask=None if padded is None else mask.long()).last_hidden_state
    torch.testing.assert_close(actual[mask > 0], expected[mask > 0], atol=1e-4, rtol=1e-4)
    assert (actual - stock(ids, attention_mask=mask.long()).last_hidden_state)[mask > 0].abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_does_not_count(attention: str) -> None:
    _, model = prefixed(bert(attention))
    ids, mask = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    padded = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(padded[:1, :5], model(ids[:1, :5]).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_published_counts() -> None:
    """10.66 M ("Prompt" in Table 1) with VSE-infinity's projection, 768 -> 1024."""
    with torch.device("meta"):
        model = inject(BertModel(BertConfig()), Prefix())
    assert trainable_parameters(model) == 9_872_384
    assert 9_872_384 + torch.nn.Linear(768, 1024).weight.numel() + 1024 == 10_659_840
    keys_and_values = [model.encoder.prefix.keys_and_values(layer) for layer in range(12)]
    assert sum(part.numel() for pair in keys_and_values for part in pair) == 552_960


def test_the_network_stands_in_the_model_once() -> None:
    stock, model = prefixed(bert())
    added = set(model.state_dict()) - set(stock.state_dict())
    parts = ("embedding.weight", "inner.weight", "inner.bias", "outer.weight", "outer.bias")
    assert added == {f"encoder.prefix.{part}" for part in parts}
    assert set(stock.state_dict()) < set(model.state_dict())


def test_initial_values_are_those_of_torch() -> None:
    model = bert()
    inject(model, Prefix(prompts=100, hidden=64))
    network = model.encoder.prefix
    assert network.embedding.weight.std().item() == pytest.approx(1, rel=0.05)
    for layer, d_in in ((network.inner, D), (network.outer, 64)):
        assert 0.95 / math.sqrt(d_in) < layer.weight.abs().max() <= 1 / math.sqrt(d_in)


@pytest.mark.parametrize("reentrant", [True, False])
def test_both_kinds_of_gradient_checkpointing(reentrant: bool) -> None:
    _, model = prefixed(bert())
    model.train()
    model.enable_input_require_grads()  # reentrant checkpointing needs an input with a gradient
    ids, mask = torch.randint(3, 50, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(ids, attention_mask=mask).last_hidden_state[:, :4].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.encoder.prefix.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(again, plain, atol=1e-4, rtol=1e-4)


def test_attention_weights_and_hidden_states_can_be_had() -> None:
    _, model = prefixed(bert("eager"))
    out = model(torch.randint(3, 50, (2, 5)), output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in out.attentions] == [(2, HEADS, 5, P + 5)] * LAYERS
    assert [h.shape for h in out.hidden_states] == [(2, 5, D)] * (LAYERS + 1)


def test_works_on_relatives_of_bert() -> None:
    torch.manual_seed(0)
    stock, model = prefixed(RobertaModel(RobertaConfig(**SIZES), add_pooling_layer=False).eval())
    ids = torch.randint(3, 50, (2, 6))
    tensors = {name: p.detach() for name, p in model.encoder.prefix.named_parameters()}
    expected = written_out(stock, tensors, ids, torch.ones(2, 6))
    torch.testing.assert_close(model(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_what_it_does_not_work_on_is_refused() -> None:
    with pytest.raises(ValueError, match="prefix works on encoders"):
        inject(BertModel(BertConfig(**SIZES, is_decoder=True)), Prefix())
    for settings in ({"prompts": 0}, {"hidden": 0}):
        with pytest.raises(ValueError, match="prompts >= 1 and hidden >= 1"):
            Prefix(**settings)
