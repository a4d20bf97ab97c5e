"""VPT against forward passes written out with the stock models' own parts."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from backbones import clip, swin
from torch import Tensor, nn

from adapters import VPT, inject, trainable_parameters

P = 3


def vit(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | settings)).eval()


def prompted(model: nn.Module, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The model with weights that make attention matter: an untouched copy, and one with prompts as large as tokens."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(std=0.25)
    stock = copy.deepcopy(model)
    inject(model, VPT(prompts=P, **settings))
    for name, parameter in model.named_parameters():
        if name.endswith(".prompts"):
            parameter.data.normal_()
    return stock, model


def prompts_of(blocks: Sequence[Any]) -> list[Tensor]:
    return [block.prompts.detach() for block in blocks if block.prompts is not None]


def run(stock: Sequence[nn.Module], prompts: list[Tensor], x: Tensor, start: int, mask: Tensor | None = None) -> Tensor:
    """Put the first prompts in, overwrite their places before later blocks where there are more, cut them out."""
    x = torch.cat([x[:, :start], prompts[0].expand(len(x), -1, -1), x[:, start:]], dim=1)
    for index, block in enumerate(stock):
        if 0 < index < len(prompts):
            x = x.clone()
            x[:, start : start + P] = prompts[index]
        x = block(x) if mask is None else block(x, attn_mask=mask)
    return torch.cat([x[:, :start], x[:, start + P :]], dim=1)


def causal(length: int) -> Tensor:
    return torch.full((length, length), -math.inf).triu(1)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({}, 32),
        ({"reg_tokens": 2}, 32),
        ({"class_token": False, "global_pool": "avg"}, 32),
        ({"dynamic_img_size": True, "pre_norm": True}, 48),
    ],
)
def test_equals_the_written_out_vit(settings: dict[str, Any], side: int, deep: bool) -> None:
    stock, model = prompted(vit(**settings), deep=deep)
    images = torch.randn(2, 3, side, side)
    prompts = prompts_of(model.blocks)
    assert len(prompts) == (3 if deep else 1)
    x = stock.norm_pre(stock._pos_embed(stock.patch_embed(images)))
    x = run(stock.blocks, prompts, x, stock.num_prefix_tokens)
    expected = stock.forward_head(stock.norm(x))
    assert model.forward_features(images).shape == stock.forward_features(images).shape
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert (expected - stock(images)).abs().max() > 0.05


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("own_attention", [False, True])
def test_equals_the_written_out_clip(own_attention: bool, deep: bool) -> None:
    torch.manual_seed(0)
    stock, model = prompted(clip(own_attention).backbone.eval(), deep=deep)
    images, texts = torch.randn(2, 3, 32, 32), torch.randint(3, 40, (2, 12))
    texts[0, 5], texts[1, 9] = 49, 49  # the end has the highest id

    visual = stock.visual
    x = run(visual.transformer.resblocks, prompts_of(model.visual.transformer.resblocks), visual._embeds(images), 1)
    torch.testing.assert_close(model.encode_image(images), visual.ln_post(x)[:, 0] @ visual.proj, atol=1e-5, rtol=1e-5)

    x = stock.token_embedding(texts) + stock.positional_embedding
    x = run(stock.transformer.resblocks, prompts_of(model.transformer.resblocks), x, 1, causal(12 + P))
    x = stock.ln_final(x)[torch.arange(2), torch.tensor([5, 9])] @ stock.text_projection
    torch.testing.assert_close(model.encode_text(texts), x, atol=1e-5, rtol=1e-5)

    after = texts.clone()
    after[:, 10:] = 7  # what follows the end of a text has no influence
    torch.testing.assert_close(model.encode_text(after), model.encode_text(texts), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("cls_at_the_end", [True, False])
def test_masks_of_each_text_grow(cls_at_the_end: bool, deep: bool) -> None:
    """Padding masks (B heads, L, L): CoCa's causal text with a class token, and text in both directions."""
    from open_clip.transformer import TextTransformer

    torch.manual_seed(0)
    kind = {"embed_cls": True} if cls_at_the_end else {"no_causal_mask": True, "use_pad_mask": True}
    kind |= {"correct_cls_mask": True, "pool_type": "last" if cls_at_the_end else "first"}
    text = TextTransformer(context_length=9, vocab_size=50, width=24, heads=4, layers=3, output_dim=16, **kind).eval()
    stock, model = prompted(text, deep=deep)
    ids = torch.randint(3, 50, (2, 9))
    ids[0, 6:] = 0
    x, _ = stock._embeds(ids)
    length = x.shape[1] + P
    padding = torch.zeros(2, length)
    padding[0, 6 + P : 9 + P] = -math.inf  # of the keys; CoCa's class token follows at 9 + P
    mask = padding[:, None, :].expand(-1, length, -1)
    mask = (mask + causal(length) if cls_at_the_end else mask).repeat_interleave(4, dim=0)
    x = run(stock.transformer.resblocks, prompts_of(model.transformer.resblocks), x, 1, mask)
    x = stock.ln_final(x)[:, -1 if cls_at_the_end else 0] @ stock.text_projection
    torch.testing.assert_close(model(ids), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("boolean", [True, False])
def test_masks_given_to_a_vit_grow(boolean: bool) -> None:
    stock, model = prompted(vit())
    images = torch.randn(2, 3, 32, 32)
    allowed = torch.ones(2, 1, 17, 17, dtype=torch.bool)
    allowed[0, ..., 12:] = False
    grown = torch.ones(2, 1, 17 + P, 17 + P, dtype=torch.bool)
    grown[0, ..., 12 + P :] = False
    if not boolean:
        allowed, grown = (torch.zeros(m.shape).masked_fill(~m, -math.inf) for m in (allowed, grown))
    x = run(stock.blocks, prompts_of(model.blocks), stock._pos_embed(stock.patch_embed(images)), 1, grown)
    torch.testing.assert_close(model.forward_features(images, attn_mask=allowed), stock.norm(x), atol=1e-5, rtol=1e-5)


def window_attention(attn: nn.Module, tokens: Tensor, prompts: Tensor, codes: Tensor | None) -> Tensor:
    """One window's N tokens (N, d) and normed prompts (p, d) -> (N, d), head by head; codes (N,): who may meet whom."""
    n, width = tokens.shape[0], attn.dim // attn.num_heads
    q, k, v = (torch.cat([tokens, prompts]) @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, dim=-1)
    side = attn.window_size[0]
    heads = []
    for head in range(attn.num_heads):
        part = slice(head * width, (head + 1) * width)
        logits = q[:n, part] @ k[:, part].T / math.sqrt(width)
        for i in range(n):
            for j in range(n):
                dy, dx = i // side - j // side, i % side - j % side
                row = (dy + side - 1) * (2 * side - 1) + dx + side - 1
                logits[i, j] += attn.relative_position_bias_table[row, head]
                if codes is not None and codes[i] != codes[j]:
                    logits[i, j] -= 100
        heads.append(logits.softmax(dim=-1) @ v[:, part])
    return torch.cat(heads, dim=-1) @ attn.proj.weight.T + attn.proj.bias


def swin_attention(block: Any, x: Tensor, prompts: Tensor) -> Tensor:
    """x (B, H, W, d), normed, window by window."""
    side, shift = block.window_size[0], block.shift_size[0]
    height = x.shape[1]
    # Tokens that only the cyclic shift has brought together do not meet.
    region = torch.tensor([0 if i < height - side else 1 if i < height - shift else 2 for i in range(height)])
    codes = region[:, None] * 3 + region[None, :]
    rolled, out = x.roll((-shift, -shift), dims=(1, 2)), torch.empty_like(x)
    for sample in range(len(x)):
        for top in range(0, height, side):
            for left in range(0, height, side):
                at = (slice(top, top + side), slice(left, left + side))
                window = rolled[sample][at].reshape(side * side, -1)
                result = window_attention(block.attn, window, prompts, codes[at].flatten() if shift else None)
                out[sample][at] = result.view(side, side, -1)
    return out.roll((shift, shift), dims=(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_equals_swin_window_by_window(fused: bool) -> None:
    torch.manual_seed(0)
    stock, model = prompted(swin().backbone.eval())
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    images = torch.randn(2, 3, 64, 64)
    x, shifts = stock.patch_embed(images), set()
    for theirs, ours in zip(stock.layers, model.layers, strict=True):
        x = theirs.downsample(x)
        for block, with_prompts in zip(theirs.blocks, ours.blocks, strict=True):
            x = x + swin_attention(block, block.norm1(x), block.norm1(with_prompts.prompts))
            x = x + block.mlp(block.norm2(x))
            shifts.add(block.shift_size[0])
    assert shifts == {0, 2}
    torch.testing.assert_close(model(images), stock.forward_head(stock.norm(x)), atol=1e-5, rtol=1e-4)
    assert (model(images) - stock(images)).abs().max() > 0.05


def test_windows_get_the_prompts_of_their_sample() -> None:
    """The published code repeats them in the order (windows, samples), but windows are ordered sample by sample."""
    _, model = prompted(swin().backbone.eval())
    attention = model.layers[0].blocks[1].attn
    x, mask, prompts = torch.randn(2 * 16, 16, 16), torch.randn(16, 16, 16), torch.randn(2, P, 16)
    apart = [attention(x[i * 16 : (i + 1) * 16], mask, prompts=prompts[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(attention(x, mask, prompts=prompts), torch.cat(apart), atol=1e-6, rtol=1e-5)


def test_published_counts() -> None:
    with torch.device("meta"):
        models = [timm.create_model("vit_base_patch16_224", num_classes=0) for _ in range(2)]
        models += [timm.create_model("swin_base_patch4_window7_224", num_classes=0)]
        from open_clip.model import CLIP

        text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
        vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
        models += [CLIP(embed_dim=512, vision_cfg=vision, text_cfg=text, quick_gelu=True)]
    settings = [VPT(prompts=10, deep=False), VPT(prompts=10), VPT(prompts=13), VPT()]
    counts = [trainable_parameters(inject(model, vpt)) for model, vpt in zip(models, settings, strict=True)]
    assert counts == [7_680, 92_160, 156_416, 153_600]


def test_initial_values() -> None:
    model = vit(patch_size=16, embed_dim=768, depth=2, num_heads=12)
    inject(model, VPT(prompts=50))
    for block in model.blocks:
        assert 0.062 < block.prompts.abs().max() <= 0.0625  # sqrt(6 / (3 * 16 * 16 + 768))
        assert block.prompts.std().item() == pytest.approx(0.0625 / math.sqrt(3), rel=0.02)  # of a uniform distribution
    assert not torch.equal(model.blocks[0].prompts, model.blocks[1].prompts)
    both = inject(clip().backbone, VPT(prompts=50))
    assert both.transformer.resblocks[0].prompts.std().item() == pytest.approx(0.02, rel=0.1)
    bound = math.sqrt(6 / (3 * 8 * 8 + 32))
    assert 0.98 * bound < both.visual.transformer.resblocks[0].prompts.abs().max() <= bound


@pytest.mark.parametrize("build", [vit, lambda: swin().backbone])
def test_dropout_acts_in_training_only_and_on_each_sample(build: Any) -> None:
    _, model = prompted(build(), dropout=0.5)
    side = 32 if hasattr(model, "blocks") else 64
    images = torch.randn(1, 3, side, side).expand(2, -1, -1, -1)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.train()
    out = model(images)
    assert not torch.allclose(out, model(images), atol=1e-5)
    assert not torch.allclose(out[0], out[1], atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "clip", "clip with its own attention"])
def test_shallow_prompts_under_gradient_checkpointing(name: str) -> None:
    if name == "vit":
        _, model = prompted(vit(), deep=False)
        inputs, switch = (torch.randn(2, 3, 32, 32),), model
    else:
        _, whole = prompted(clip(name != "clip"), deep=False)
        model, switch = whole, whole.backbone
        inputs = (torch.randn(2, 3, 32, 32), torch.randint(3, 40, (2, 12)))
    gradients = []
    for checkpointed in (False, True):
        switch.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        model.train()(*inputs).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0] and all(g.abs().sum() > 0 for g in gradients[0].values())
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-6, rtol=1e-5)


def test_hidden_states_of_deep_prompting_have_the_backbones_shape() -> None:
    stock, model = prompted(vit())
    images = torch.randn(2, 3, 32, 32)
    ours, theirs = (m.forward_intermediates(images, intermediates_only=True) for m in (model, stock))
    assert [x.shape for x in ours] == [x.shape for x in theirs]


def test_swin_of_another_size_after_injection() -> None:
    _, model = prompted(swin().backbone.eval())
    model.set_input_size((96, 96), window_size=(6, 6))
    assert model(torch.randn(1, 3, 96, 96)).isfinite().all()


def test_what_it_does_not_work_on_is_refused() -> None:
    with pytest.raises(ValueError, match="vpt with deep=False does not work on Swin"):
        inject(swin(), VPT(deep=False))
    with torch.device("meta"):
        others = [
            timm.create_model("swinv2_tiny_window8_256"),
            timm.create_model("eva02_tiny_patch14_224"),
            timm.create_model("beit_base_patch16_224"),
            timm.create_model("vit_relpos_small_patch16_224"),
            timm.create_model("samvit_base_patch16"),
            timm.create_model("cait_xxs24_224"),
            timm.create_model("convit_tiny"),
        ]
    for model in others:
        with pytest.raises(ValueError, match="vpt works on .*" + type(model).__name__):
            inject(model, VPT())
        assert not any(name.endswith("prompts") for name, _ in model.named_parameters())


@pytest.mark.parametrize("settings", [{"prompts": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="prompts >= 1 and 0 <= dropout < 1"):
        VPT(**settings)


def test_distilled_vit_has_two_tokens_before_the_prompts() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=32, num_heads=4, depth=2, num_classes=5
    ).eval()
    stock, model = prompted(model)
    images = torch.randn(2, 3, 32, 32)
    x = run(stock.blocks, prompts_of(model.blocks), stock._pos_embed(stock.patch_embed(images)), 2)
    torch.testing.assert_close(model(images), stock.forward_head(stock.norm(x)), atol=1e-5, rtol=1e-5)
    model.train()(images).square().sum().backward()
    assert all(block.prompts.grad.abs().sum() > 0 for block in model.blocks)
