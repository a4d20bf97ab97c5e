"""UniPT against its formulas in loops over samples and layers, on the stock model's hidden states."""

from __future__ import annotations

import copy

import open_clip
import pytest
import timm
import torch
from backbones import build, inputs
from test_lst import seen, shaken
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from adapters import UniPT, inject, trainable_parameters


def linear(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def normed(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    unit = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return unit * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def tokens_by_hand(side: nn.Module, states: list[Tensor]) -> Tensor:
    """One sample without padding: states (N, d) -> (N, output_dim)."""
    t = dict(side.named_parameters())
    z = [normed(t, f"down.{i}.1", linear(t, f"down.{i}.0", h)) for i, h in enumerate(states)]
    anchor, centre = z[-1], z[-1].mean(dim=0)
    gates, read = [], []
    for zi in z[:-1]:
        s = torch.relu(anchor @ zi.T)
        s = s / (s.sum(dim=1, keepdim=True) + 1e-8) + torch.eye(len(zi))
        read.append(s @ zi)
        gates.append(linear(t, "gate", centre * zi.mean(dim=0)))
    w = torch.softmax(torch.cat(gates), dim=0)
    fused = torch.stack([w[i] * m for i, m in enumerate(read)]).sum(dim=0)
    return linear(t, "up", torch.relu(anchor + normed(t, "project.1", linear(t, "project.0", fused))))


def feature_by_hand(side: nn.Module, states: list[Tensor], f: Tensor, position: int) -> Tensor:
    """One sample: its real tokens (N, d), the tower's feature (D,) -> (D,)."""
    t = dict(side.named_parameters())
    q = linear(t, "query", torch.relu(f))
    gates, read = [], []
    for i, h in enumerate(states):
        z = linear(t, f"down.{i}", torch.relu(h))
        s = torch.relu(z @ q)
        read.append((s / max(float(s.sum()), 1e-6)) @ z + z[position])
        gates.append(linear(t, "gate", q * z.mean(dim=0)))
    w = torch.softmax(torch.cat(gates), dim=0)
    return f + linear(t, "up", torch.relu(torch.stack([w[i] * m for i, m in enumerate(read)]).sum(dim=0)))


def test_bert_by_hand() -> None:
    stock, (ids, mask) = build("bert").backbone, inputs("bert")
    adapted = shaken(inject(copy.deepcopy(stock), UniPT(dim=8, output_dim=20)))
    actual = adapted(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, real, output in zip(ids, mask.sum(dim=1), actual, strict=True):
        states = [h[0] for h in stock(input_ids=row[None, :real], output_hidden_states=True).hidden_states]
        expected = tokens_by_hand(adapted.encoder.layer[-1].unipt, states)
        torch.testing.assert_close(output[:real], expected, atol=1e-5, rtol=1e-4)


def test_vit_by_hand() -> None:
    stock, x = build("vit").backbone, inputs("vit")
    adapted = shaken(inject(copy.deepcopy(stock), UniPT(dim=8)))
    actual, states = adapted(*x), seen(stock, stock.blocks, stock, *x)
    for i, output in enumerate(actual):
        tokens = tokens_by_hand(adapted.blocks[-1].unipt, [h[i] for h in states])
        torch.testing.assert_close(output, stock.norm(tokens)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("separate_text", [False, True])
def test_clip_by_hand(separate_text: bool) -> None:
    stock, (images, texts) = build("clip").backbone, inputs("clip")
    texts[1, 8], texts[1, 6] = 49, 3  # texts of different lengths
    if separate_text:
        from open_clip import CustomTextCLIP

        towers = {
            "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8},
            "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 4, "layers": 3,
                         "pool_type": "eos", "eos_id": 49},
        }  # fmt: skip
        stock = CustomTextCLIP(embed_dim=16, quick_gelu=True, **towers).eval()
    adapted = shaken(inject(copy.deepcopy(stock), UniPT(dim=8)))
    image, text = adapted.encode_image(images), adapted.encode_text(texts)
    torch.testing.assert_close(adapted.encode_text(texts, normalize=True).norm(dim=1), torch.ones(3))

    frozen = stock.encode_image(images)
    states = seen(stock, stock.visual.transformer.resblocks, stock.encode_image, images)
    for i, output in enumerate(image):
        expected = feature_by_hand(adapted.visual.side, [h[i] for h in states], frozen[i], 0)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)

    frozen = stock.encode_text(texts)
    tower = stock.text if separate_text else stock
    states = seen(stock, tower.transformer.resblocks, stock.encode_text, texts)
    side = adapted.text.side if separate_text else adapted.side
    for i, (output, end) in enumerate(zip(text, (6, 8, 6), strict=True)):
        expected = feature_by_hand(side, [h[i, : end + 1] for h in states], frozen[i], end)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("build_model", "settings", "count"),
    [
        (lambda: BertModel(BertConfig(), False), {"output_dim": 1024}, 5_921_281),
        (lambda: open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")), {}, 9_584_642),
        (lambda: timm.create_model("vit_base_patch16_224", num_classes=0), {}, 5_921_281 - 256 * 513),
    ],
)
def test_published_counts(build_model: object, settings: dict, count: int) -> None:
    """5.9 M and 9.6 M of Table 1; on ViT the last map goes to 768 channels instead of 1,024."""
    with torch.device("meta"):
        model = build_model()
    assert trainable_parameters(inject(model, UniPT(dim=512, **settings))) == count


def test_first_values() -> None:
    side = inject(build("bert").backbone, UniPT(dim=8)).encoder.layer[-1].unipt
    for name, parameter in side.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:  # nn.Linear's: uniform in +-1/sqrt(inputs)
            bound = parameter.shape[1] ** -0.5
            assert 0.7 * bound < parameter.abs().max() <= bound
    for norm in (*(down[1] for down in side.down), side.project[1]):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_other_poolings_are_refused() -> None:
    model = build("clip")
    model.backbone.visual.pool_type = "avg"
    with pytest.raises(ValueError, match=r"unipt works on CLIP towers .*backbone\.visual pools otherwise"):
        inject(model, UniPT())
    with pytest.raises(ValueError, match="dim >= 1"):
        UniPT(dim=0)
