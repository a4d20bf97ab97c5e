"""Sentences in groups of similar length: the same embeddings, gradients and samples as in one padded batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_gpo import pooled_by_loop
from torch import Tensor
from transformers import BertConfig, BertModel

from adapters import LoRA, inject
from regularizers import capture, linear
from retrieval.vse_infty import TextEncoder, VSEInfinityConfig, by_length


def encoder(buckets: int) -> TextEncoder:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    text = TextEncoder(
        BertModel(config, add_pooling_layer=False), VSEInfinityConfig(embed_dim=12, text_buckets=buckets)
    )
    inject(text, LoRA(rank=2), train=("linear", "pool"))
    for name, parameter in text.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.5)
    return text


def batch() -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([9, 3, 30, 4, 5, 3, 12, 4, 7, 3])
    mask = (torch.arange(30) < lengths[:, None]).long()
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 50, mask.shape)) * mask
    return ids, mask


def test_nothing_changes_but_the_padding() -> None:
    ids, mask = batch()
    whole, grouped = encoder(1), encoder(4)
    calls: list[tuple[int, ...]] = []
    grouped.bert.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    expected, actual = whole(ids, mask), grouped(ids, mask)
    assert calls == [(3, 3), (3, 5), (3, 12), (1, 30)]
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn(expected.shape)
    for out in (expected, actual):
        (out * weight).sum().backward()
    for (name, one), other in zip(whole.named_parameters(), grouped.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("buckets", [1, 4])
def test_a_batch_equals_each_sentence_by_itself(buckets: int) -> None:
    """Unpadded, from BERT's last states: the linear map on every token, [CLS] and [SEP] too, then GPO as a loop."""
    text, (ids, mask) = encoder(buckets), batch()
    torch.nn.init.normal_(text.pool.score.weight)  # untrained, the weights of a pooling are nearly equal
    for row, length, embedding in zip(ids, mask.sum(dim=1).tolist(), text(ids, mask), strict=True):
        hidden = text.bert(row[None, :length]).last_hidden_state
        tokens = hidden @ text.linear.weight.T + text.linear.bias
        (pooled,) = pooled_by_loop(text.pool, tokens, torch.tensor([length]))
        torch.testing.assert_close(embedding, pooled / pooled.square().sum().sqrt(), atol=1e-5, rtol=1e-4)


def test_the_samples_of_a_penalty_are_the_same() -> None:
    ids, mask = batch()
    penalties = []
    for text in (encoder(1), encoder(4)):
        with capture(text) as subspaces:
            text(ids, mask)
        assert {len(pair.activations) for pair in subspaces.values()} == {int(mask.sum())}
        penalties.append(torch.stack([linear(*pair) for pair in subspaces.values()]))
    torch.testing.assert_close(penalties[1], penalties[0], atol=1e-6, rtol=1e-5)


def test_groups() -> None:
    lengths = torch.tensor([9, 3, 30, 4, 5, 3, 12, 4, 7, 3])
    groups = by_length(lengths, 4)
    assert [lengths[group].tolist() for group in groups] == [[3, 3, 3], [4, 4, 5], [7, 9, 12], [30]]
    assert sorted(torch.cat(groups).tolist()) == list(range(10))
    assert [group.tolist() for group in by_length(torch.full((6,), 8), 4)] == [[0, 1, 2, 3, 4, 5]], "nothing to save"
    assert len(by_length(lengths, 1)) == 1
    with pytest.raises(ValueError, match="text_buckets is 0"):
        VSEInfinityConfig(text_buckets=0)
