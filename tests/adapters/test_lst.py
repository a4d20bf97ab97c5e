"""LST against the stock blocks at the smaller size, on the stock model's hidden states."""

from __future__ import annotations

import copy

import numpy as np
import open_clip
import pytest
import timm
import torch
from backbones import build, inputs
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer

from adapters import LST, inject, trainable_parameters


def shaken(model: nn.Module) -> nn.Module:
    """Every trainable value moved, gates included."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def by_hand(rungs: list[nn.Module], states: list[Tensor], side: list[nn.Module], **named: Tensor) -> Tensor:
    """The formula, with fresh blocks of the stock classes that hold the side network's values."""
    s = F.linear(states[0], rungs[0].start.weight, rungs[0].start.bias)
    for rung, h, block in zip(rungs, states[1:], side, strict=True):
        block.load_state_dict(rung.block.state_dict(), strict=True)
        g = 1 / (1 + torch.exp(-rung.alpha / 0.1))
        s = block.eval()(g * s + (1 - g) * (h @ rung.down.weight.T + rung.down.bias), **named)
    return s @ rungs[-1].up.weight.T + rungs[-1].up.bias


def test_bert_by_hand() -> None:
    stock, (ids, mask) = build("bert").backbone, inputs("bert")
    adapted = shaken(inject(copy.deepcopy(stock), LST(reduction=4, output_dim=20)))
    states = stock(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    config = BertConfig(hidden_size=8, num_attention_heads=4, intermediate_size=32, attn_implementation="eager")
    additive = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
    expected = by_hand(
        [b.rung for b in adapted.encoder.layer], states, [BertLayer(config) for _ in range(3)], attention_mask=additive
    )
    actual = adapted(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)


def seen(model: nn.Module, blocks: nn.Module, call: object, *x: Tensor) -> list[Tensor]:
    """The input of the first block and the output of each."""
    states: list[Tensor] = []
    blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    for block in blocks:
        block.register_forward_hook(lambda _, __, output: states.append(output))
    call(*x)
    return states


def test_vit_by_hand() -> None:
    stock, x = build("vit").backbone, inputs("vit")
    adapted = shaken(inject(copy.deepcopy(stock), LST(reduction=4)))
    actual = adapted(*x)
    states = seen(stock, stock.blocks, stock, *x)
    tokens = by_hand([b.rung for b in adapted.blocks], states, [Block(8, 4, qkv_bias=True) for _ in range(3)])
    torch.testing.assert_close(actual, stock.norm(tokens)[:, 0], atol=1e-5, rtol=1e-4)


def test_clip_by_hand() -> None:
    stock, (images, texts) = build("clip").backbone, inputs("clip")
    adapted = shaken(inject(copy.deepcopy(stock), LST(reduction=2)))
    image, text = adapted.encode_image(images), adapted.encode_text(texts)

    states = seen(stock, stock.visual.transformer.resblocks, stock.encode_image, images)
    side = [ResidualAttentionBlock(16, 4, act_layer=QuickGELU) for _ in range(3)]
    expected = by_hand(list(adapted.visual.side.rungs), states, side)
    torch.testing.assert_close(image, expected[:, 0], atol=1e-5, rtol=1e-4)

    states = seen(stock, stock.transformer.resblocks, stock.encode_text, texts)
    side = [ResidualAttentionBlock(12, 4, act_layer=QuickGELU) for _ in range(3)]
    causal = torch.full((12, 12), float("-inf")).triu(1)
    expected = by_hand(list(adapted.side.rungs), states, side, attn_mask=causal)
    torch.testing.assert_close(text, expected[:, 6], atol=1e-5, rtol=1e-4)  # the texts end at 6


@pytest.mark.parametrize(("backbone", "reduction"), [("vit", 4), ("clip", 2), ("bert", 2)])
def test_side_blocks_start_as_the_strongest_channels(backbone: str, reduction: int) -> None:
    """The kept rows and columns, found with plain loops over the stock weights."""
    stock = build(backbone).backbone
    named = {
        "vit": lambda m: [(b.attn.qkv.weight.chunk(3), b.attn.proj, b.mlp.fc1, b.mlp.fc2) for b in m.blocks],
        "clip": lambda m: [(b.attn.in_proj_weight.chunk(3), b.attn.out_proj, b.mlp.c_fc, b.mlp.c_proj)
                           for b in m.visual.transformer.resblocks],
        "bert": lambda m: [((a.self.query.weight, a.self.key.weight, a.self.value.weight), a.output.dense,
                            b.intermediate.dense, b.output.dense)
                           for b in m.encoder.layer for a in [b.attention]],
    }[backbone]  # fmt: skip
    adapted = inject(copy.deepcopy(stock), LST(reduction=reduction))
    side = nn.Module()
    rungs = nn.ModuleList(m.block for m in adapted.modules() if type(m).__name__ == "Rung")[:3]
    side.blocks, side.encoder, side.visual = rungs, nn.Module(), nn.Module()
    side.encoder.layer, side.visual.transformer = rungs, nn.Module()
    side.visual.transformer.resblocks = rungs

    def top(strength: np.ndarray, keep: int) -> list[int]:
        return sorted(np.argsort(-strength)[:keep].tolist())

    parts = [[np.abs(p.detach().numpy()) for p in (*qkv, o.weight, fc1.weight, fc2.weight)]
             for qkv, o, fc1, fc2 in named(stock)]  # fmt: skip
    reads = sum(m.sum(axis=0) for q, k, v, _, fc1, _ in parts for m in (q, k, v, fc1))
    writes = sum(m.sum(axis=1) for *_, o, _, fc2 in parts for m in (o, fc2))
    stream = top(reads + writes, 32 // reduction)
    for block, cut, (q, k, v, o, fc1, fc2) in zip(named(stock), named(side), parts, strict=True):
        (wq, wk, wv), wo, w1, w2 = block
        (sq, sk, sv), so, s1, s2 = cut
        qk, vo = [], []
        for head in range(0, 32, 8):
            of_head = slice(head, head + 8)
            qk += [head + c for c in top((q.sum(1) + k.sum(1))[of_head], 8 // reduction)]
            vo += [head + c for c in top((v.sum(1) + o.sum(0))[of_head], 8 // reduction)]
        units = top(fc1.sum(1) + fc2.sum(0), len(fc1) // reduction)
        for actual, whole, r, c in ((sq, wq, qk, stream), (sk, wk, qk, stream), (sv, wv, vo, stream),
                                    (so.weight, wo.weight, stream, vo), (s1.weight, w1.weight, units, stream),
                                    (s2.weight, w2.weight, stream, units)):  # fmt: skip
            assert torch.equal(actual, whole[r][:, c])
        assert torch.equal(s1.bias, w1.bias[units]) and torch.equal(s2.bias, w2.bias[stream])


def test_first_values() -> None:
    adapted = inject(build("vit").backbone, LST(reduction=2))
    for block in adapted.blocks:
        assert block.rung.alpha == 0 and block.rung.down.weight.abs().max() <= 32**-0.5
        x, h = torch.randn(2, 3, 16), torch.randn(2, 3, 32)
        torch.testing.assert_close(block.rung.mix(x, h), (x + block.rung.down(h)) / 2)


@pytest.mark.parametrize(
    ("build_model", "settings", "count", "gates"),
    [
        (lambda: timm.create_model("vit_base_patch16_224", num_classes=0), {}, 2_376_288, 12),
        (lambda: BertModel(BertConfig(), False), {"reduction": 4, "output_dim": 1024}, 7_455_424, 12),
        (lambda: open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")), {"reduction": 4}, 10_655_552, 24),
    ],
)
def test_published_counts(build_model: object, settings: dict, count: int, gates: int) -> None:
    """2.38 M of Table 2 and 7.5 M of Table 1 (11.2 M for CLIP has no reading), without a gate for each block."""
    with torch.device("meta"):
        model = build_model()
    assert trainable_parameters(inject(model, LST(**settings))) == count + gates


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    model = build("clip")  # a text tower of width 24 with 4 heads
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=r"lst with reduction=4: .* has width 24 and 4 heads.* width 6 is no multiple"):
        inject(model, LST(reduction=4))
    assert set(model.state_dict()) == keys
    with pytest.raises(ValueError, match="reduction >= 2"):
        LST(reduction=1)
