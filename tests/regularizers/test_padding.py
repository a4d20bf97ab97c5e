"""Padding that no `attention_mask` tells of: texts of open_clip's towers, and torch's `key_padding_mask`s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adapters  # noqa: F401  (before open_clip)

# isort: split
import numpy as np
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from adapters import LoRA, inject
from regularizers import capture

END = 49
VISION = CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=4, image_size=8)
TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
IDS = torch.tensor([[48, 7, END, 0, 0, 0, 0, 0], [48, 3, 9, 2, 5, END, 0, 0]])  # 3 and 6 tokens
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def clip(kind: type[nn.Module] = CLIP, **text: Any) -> nn.Module:
    torch.manual_seed(0)
    return inject(kind(8, VISION, CLIPTextCfg(**(TEXT | text))), LoRA(rank=2, alpha=6, targets=("q",))).eval()


def expected(layer: Any, run: Callable[[], Any], lengths: list[int]) -> np.ndarray:
    """3 x A^T of the first tokens of each item, in numpy, from the inputs (B, L, D) that a hook saw."""
    seen: list[np.ndarray] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().numpy()))
    run()
    handle.remove()
    (x,), a = seen, layer.branches["q"].A.detach().numpy()
    return np.concatenate([item[:length] for item, length in zip(x, lengths, strict=True)]) @ a.T * 3


@pytest.mark.parametrize("call", ["forward", "encode_text", "forward_intermediates"])
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_what_follows_the_end_of_a_text_is_no_sample(kind: type[nn.Module], call: str) -> None:
    model: Any = clip(kind)
    text = model.text if kind is CustomTextCLIP else model
    run = {
        "forward": lambda: model(PIXELS, IDS),
        "encode_text": lambda: model.encode_text(IDS),
        "forward_intermediates": lambda: model.forward_intermediates(PIXELS, IDS),
    }[call]
    with capture(model) as subspaces:
        samples = expected(text.transformer.resblocks[1].attn, run, [3, 6])
    (name,) = (name for name in subspaces if "resblocks.1." in name)
    np.testing.assert_allclose(subspaces[name].activations.detach(), samples, atol=1e-6)
    assert {len(pair.activations) for name, pair in subspaces.items() if "visual" in name} <= {2 * 5}
    with capture(model, samples="mean") as means:
        run()
    rows = np.stack([samples[:3].mean(axis=0), samples[3:].mean(axis=0)])
    np.testing.assert_allclose(means[name].activations.detach(), rows, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ({"pool_type": "eos", "eos_id": 9}, 3 + 1),  # its first token, where the id does not occur
        ({"pool_type": "last"}, 8 + 8),  # SigLIP reads its padding
        ({"embed_cls": True}, 4 + 7),  # CoCa's class token
    ],
    ids=str,
)
def test_a_text_ends_where_its_tower_takes_it_to_end(text: dict[str, Any], samples: int) -> None:
    model: Any = clip(CustomTextCLIP, **text)
    with capture(model) as subspaces:
        model.encode_text(IDS)
    assert {len(pair.activations) for name, pair in subspaces.items()} == {samples}


def test_of_pefts_lora_on_clip() -> None:
    model = get_peft_model(CLIP(8, VISION, CLIPTextCfg(**TEXT)), LoraConfig(r=2, target_modules=["c_fc"]))
    with capture(model) as subspaces:
        model(PIXELS, IDS)
    rows = {"visual" in name: len(pair.activations) for name, pair in subspaces.items()}
    assert rows == {True: 2 * 5, False: 3 + 6}


def test_the_ids_of_each_call_count() -> None:
    model: Any = clip()
    with capture(model) as subspaces:
        model.encode_text(IDS)
        model.encode_text(IDS[:1])
    assert {len(pair.activations) for pair in subspaces.values()} == {3 + 6 + 3}


# ---- torch's own modules


PADDING = torch.tensor([[False, False, False, True, True], [False] * 5])  # True is padding
WAYS = {
    "encoder": lambda model, x: model(x, src_key_padding_mask=PADDING),
    "layer": lambda model, x: model.layers[0](x, None, PADDING),
    "attention": lambda model, x: model.layers[0].self_attn(x, x, x, key_padding_mask=PADDING),
}


def encoder(batch_first: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return inject(model, LoRA(rank=2, targets=r"self_attn\.q|linear1"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_a_key_padding_mask_is_read(way: str, training: bool) -> None:
    model, x = encoder().train(training), torch.randn(2, 5, 16)
    with capture(model) as subspaces:
        WAYS[way](model, x)
    with capture(model) as first:
        model(x[:1, :3])
    with capture(model) as second:
        model(x[1:])
    assert len(subspaces) == (1 if way == "attention" else 2)
    for name, (activations, _) in subspaces.items():
        alone = torch.cat([first[name].activations, second[name].activations])
        torch.testing.assert_close(activations, alone, atol=1e-5, rtol=1e-4)


def test_with_the_length_first_it_is_refused() -> None:
    model, x = encoder(batch_first=False), torch.randn(5, 2, 16)
    with pytest.raises(ValueError, match=r"\(length, batch\) are not supported"), capture(model):
        model(x, src_key_padding_mask=PADDING)
    with capture(model, layers="q$") as subspaces:  # the attention has its batch first inside
        model(x, src_key_padding_mask=PADDING)
    assert [len(pair.activations) for pair in subspaces.values()] == [8]


def decoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return inject(nn.TransformerDecoder(layer, 1), LoRA(rank=2, targets=r"attn\.(q|k)|linear1"))


def rows(model: nn.Module, length: int, **masks: Tensor) -> dict[str, int]:
    with capture(model) as subspaces:
        model(torch.randn(2, length, 16), torch.randn(2, 5, 16), **masks)
    return {name.removeprefix("layers.0."): len(pair.activations) for name, pair in subspaces.items()}


def test_cross_attention_sees_the_memorys_tokens() -> None:
    own = torch.tensor([[False, False, True], [False, False, False]])
    masks = {"tgt_key_padding_mask": own, "memory_key_padding_mask": PADDING}
    expected = {"self_attn.q": 5, "self_attn.k": 5, "multihead_attn.q": 5, "multihead_attn.k": 8, "linear1.whole": 5}
    assert rows(decoder(), 3, **masks) == expected
    masks.pop("tgt_key_padding_mask")
    assert rows(decoder(), 3, **masks) == {**dict.fromkeys(expected, 6), "multihead_attn.k": 8}
    with pytest.raises(ValueError, match="which have the same length"):
        rows(decoder(), 5, **masks)


def test_a_mask_of_other_numbers_than_one_weighs_nothing() -> None:
    """Segment numbers of packed sequences, as some collators give them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x)

    model, x = inject(Model(), LoRA(rank=2, alpha=2, targets="layer")), torch.randn(1, 4, 4)
    with capture(model, samples="mean") as subspaces:
        model(x, torch.tensor([[1, 2, 3, 0]]))
    ((activations, _),) = subspaces.values()
    a = model.get_submodule("layer").branches["whole"].A
    torch.testing.assert_close(activations, x[:, :3].mean(dim=1) @ a.T)
