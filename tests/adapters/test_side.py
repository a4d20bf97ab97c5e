"""What LST and UniPT share: no graph in the backbone, no influence of padding, where they may change a width."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from backbones import WIDTH, build, inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from adapters import DTL, LST, Adapter, DTLPlus, UniPT, inject

METHODS = [LST(reduction=2), UniPT(dim=8)]


def bert(pooler: bool = False) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=pooler).eval()


@pytest.mark.parametrize("adapter", METHODS, ids=["lst", "unipt"])
@pytest.mark.parametrize("backbone", ["bert", "vit", "clip", "clip, own attention"])
def test_no_graph_is_kept_for_the_backbone(adapter: Adapter, backbone: str) -> None:
    model = build(backbone)
    stock = [m for m in model.backbone.modules() if isinstance(m, nn.Linear)]
    blocks = [m for n, m in model.named_modules() if n.endswith(("encoder.layer", "blocks", "resblocks"))]
    in_blocks = {p.data_ptr() for block in blocks for p in block.parameters()}
    inject(model, adapter, train=("head",))
    graphs: list[bool] = []
    for module in stock:
        module.register_forward_hook(lambda _, __, output: graphs.append(output.requires_grad))
    saved: list[int] = []
    for parameter in model.backbone.parameters():  # even an embedding that trains gives the blocks no graph
        parameter.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        output = model(*inputs(backbone))
    assert graphs and not any(graphs)
    assert saved and not in_blocks & set(saved)
    output.sum().backward()
    reached = {p.data_ptr() for p in model.parameters() if p.grad is not None}
    assert reached and not reached & in_blocks


CARRIED = [(adapter, name) for adapter in METHODS for name in ("bert", "vit")]
CARRIED += [(adapter, name) for adapter in (DTL(), DTLPlus()) for name in ("vit", "swin")]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize(("adapter", "backbone"), CARRIED)
def test_reentrant_checkpointing_is_refused(adapter: Adapter, backbone: str) -> None:
    """It would give the side network no gradient, and say nothing."""
    model, x = inject(build(backbone), adapter, train=("head",)).train(), inputs(backbone)
    if backbone == "bert":
        model.backbone.gradient_checkpointing_enable({"use_reentrant": True})
        model.backbone.embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())
    else:
        for block in [m for name, m in model.named_modules() if re.search(r"blocks\.\d+$", name)]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=True)
        x[0].requires_grad_()
    with pytest.raises(ValueError, match="use use_reentrant=False"):
        model(*x)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("adapter", METHODS, ids=["lst", "unipt"])
def test_padding_changes_nothing(adapter: Adapter, attention: str) -> None:
    model = bert()
    model.set_attn_implementation(attention)
    inject(model, adapter)
    short = torch.randint(3, 50, (1, 5))
    ids, mask = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ids[0, :5], mask[0, 5:] = short, 0
    padded = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(padded[:1, :5], model(input_ids=short).last_hidden_state, atol=1e-5, rtol=1e-4)
    ids[0, 5:] = 7
    again = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(again[0, :5], padded[0, :5], atol=1e-5, rtol=1e-4)


def test_what_follows_the_end_of_a_text_changes_nothing() -> None:
    model, (images, texts) = inject(build("clip"), UniPT(dim=8)), inputs("clip")
    expected, other = model(images, texts), texts.clone()
    other[:, 7:] = torch.randint(3, 40, other[:, 7:].shape)
    torch.testing.assert_close(model(images, other), expected, atol=1e-5, rtol=1e-4)
    other[:, 2] += 1
    assert not torch.allclose(model(images, other), expected, atol=1e-3)


@pytest.mark.parametrize("method", [LST, UniPT])
def test_the_output_may_have_another_width_in_bert_alone(method: type[Adapter]) -> None:
    settings = {"reduction": 2} if method is LST else {"dim": 8}
    model = inject(bert(), method(**settings, output_dim=20))
    output: Tensor = model(input_ids=torch.randint(0, 50, (2, 5))).last_hidden_state
    assert output.shape == (2, 5, 20)
    for other, follows in ((bert(pooler=True), "pooler"), (build("vit"), "norm"), (build("clip"), "leave output_dim")):
        keys = set(other.state_dict())
        with pytest.raises(ValueError, match=f"{method.name}.*{follows}"):
            inject(other, method(**settings, output_dim=20))
        assert set(other.state_dict()) == keys
    with pytest.raises(ValueError, match="output_dim=0"):
        method(output_dim=0)
