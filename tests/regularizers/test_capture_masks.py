"""Which tokens are samples where several masks, or none, are about; and what capture leaves behind."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import adapters  # noqa: F401  (before peft, which imports torchvision)

# isort: split
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)

from adapters import LoRA, inject
from regularizers import ReSoRA, capture
from regularizers.padding import Masks, Padding

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def clip() -> nn.Module:
    config = CLIPConfig(
        text_config=SMALL | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49},
        vision_config=SMALL | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    return get_peft_model(CLIPModel(config), LoraConfig(r=2, target_modules=["q_proj"]))


def t5() -> nn.Module:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return get_peft_model(T5ForConditionalGeneration(config), LoraConfig(r=2, target_modules=["v"]))


def test_a_mask_of_the_text_tower_is_none_of_the_vision_towers() -> None:
    ids, mask = torch.randint(0, 49, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    model = clip()  # whose vision tower has as many tokens: four patches and the class token
    with capture(model) as subspaces:
        model(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 8, 8))
    rows = {name.split("base_model.model.")[1].split(".")[0]: len(p.activations) for name, p in subspaces.items()}
    assert rows == {"text_model": 8, "vision_model": 10}


def test_cross_attention_sees_the_encoders_tokens() -> None:
    model, ids = t5(), torch.randint(1, 50, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with capture(model) as subspaces:
        model(input_ids=ids, attention_mask=mask, labels=torch.randint(1, 50, (2, 4)))
    rows = {name.split(".block.")[1]: len(pair.activations) for name, pair in subspaces.items() if "decoder" in name}
    assert rows == {"0.layer.0.SelfAttention.v.default": 8, "0.layer.1.EncDecAttention.v.default": 10}
    with pytest.raises(ValueError, match="which have the same length"), capture(model):
        model(input_ids=ids, attention_mask=mask, labels=torch.randint(1, 50, (2, 6)))


def test_inputs_with_the_length_first_are_refused() -> None:
    config = XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=32)
    model = inject(XLNetModel(config), LoRA(rank=2, targets=r"ff\.layer_1"))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match=r"\(length, batch\) are not supported"), capture(model):
        model(input_ids=torch.randint(0, 50, (2, 5)), attention_mask=mask)


def test_an_item_of_padding_alone_has_no_mean() -> None:
    bert = inject(BertModel(BertConfig(vocab_size=50, **SMALL), add_pooling_layer=False), LoRA(rank=2)).eval()
    ids, mask = torch.randint(0, 50, (2, 4)), torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])
    with capture(bert, samples="mean") as subspaces:
        bert(input_ids=ids, attention_mask=mask)
    assert {len(pair.activations) for pair in subspaces.values()} == {1}


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize(("samples", "rows"), [("tokens", 8), ("mean", 2)])
def test_a_mask_may_be_on_another_device_than_the_layer(samples: str, rows: int) -> None:
    """As where a `device_map` spreads the layers over several."""
    with torch.device("meta"):
        model, inputs = get_peft_model(Masked(), LoraConfig(r=2, target_modules=["layer"])), torch.ones(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    with capture(model, samples=samples) as subspaces:
        model(inputs, attention_mask=mask)
    (pair,) = subspaces.values()
    assert pair.activations.device.type == "meta" and pair.activations.shape == (rows, 2)


def test_masks_on_two_devices_are_compared_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda one, other: one.device == other.device)  # meta tensors have no values
    padding = Padding()
    padding.masks.append(Masks(torch.ones(2, 5, dtype=torch.bool, device="meta"), torch.ones(2, 5, dtype=torch.bool)))
    assert padding.mask_of("layer", torch.Size([2, 5])) is not None


class Nonzeros(TorchDispatchMode):
    """How often a mask is turned into places, for which an accelerator has to be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        boolean = function is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.count += boolean or function is torch.ops.aten.nonzero.default
        return function(*args, **(kwargs or {}))


def bert(layers: int) -> nn.Module:
    config = BertConfig(vocab_size=50, **SMALL | {"num_hidden_layers": layers})
    return inject(BertModel(config, add_pooling_layer=False), LoRA(rank=2))


def torchs_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return get_peft_model(encoder, LoraConfig(r=2, target_modules=["linear1", "linear2"]))


REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
ONES = torch.ones(2, 4, dtype=torch.long)


@pytest.mark.parametrize("samples", ["tokens", "mean"])
@pytest.mark.parametrize(
    ("model", "inputs", "masks"),
    [
        (bert(3), {"input_ids": torch.zeros_like(REAL), "attention_mask": REAL}, 1),
        (t5(), {"input_ids": torch.ones_like(REAL), "attention_mask": REAL, "labels": ONES}, 1),
        (torchs_encoder(), {"src": torch.randn(2, 5, 16), "src_key_padding_mask": REAL == 0}, 1),
    ],
    ids=["bert", "t5", "torch"],
)
def test_of_each_mask_the_places_are_found_once(model: nn.Module, inputs: Any, masks: int, samples: str) -> None:
    with Nonzeros() as plain:
        model(**inputs)
    with Nonzeros() as nonzeros, capture(model, samples=samples) as subspaces:
        model(**inputs)
    assert len(subspaces) > masks
    assert nonzeros.count - plain.count == masks


def test_a_mask_that_is_filled_anew_between_two_passes_is_read_anew() -> None:
    model, mask = bert(1), REAL.clone()
    with capture(model) as subspaces:
        model(input_ids=torch.zeros_like(mask), attention_mask=mask)
        mask[0, 1:] = 0
        model(input_ids=torch.zeros_like(mask), attention_mask=mask)
    assert {len(pair.activations) for pair in subspaces.values()} == {8 + 4}


# ---- what is refused


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


def linear_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("model", "config", "why"),
    [
        (linear_layers, LoraConfig(r=2, target_modules=["0"], lora_bias=True), "a bias is part of no subspace"),
        (Attention, LoraConfig(r=2, target_modules=["attention"]), "never calls lora_A"),
        (linear_layers, LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"]), "never calls lora_A"),
        (linear_layers, AdaLoraConfig(init_r=2, target_modules=["0"], total_step=9), "not linear layers"),
    ],
)
def test_updates_that_are_no_sum_of_captured_parts_are_refused(model: Any, config: Any, why: str) -> None:
    adapted = get_peft_model(model(), config)
    with pytest.raises(ValueError, match=f"cannot capture .*{why}"), capture(adapted):
        pass


def test_a_compiled_forward_is_refused() -> None:
    model = inject(BertModel(BertConfig(vocab_size=50, **SMALL), add_pooling_layer=False), LoRA(rank=2))
    block = model.encoder.layer[0]
    block.forward = torch.compile(block.forward, backend="eager")
    with pytest.raises(ValueError, match=r"encoder\.layer\.0 is compiled"), capture(model):
        pass


def test_the_penalty_inside_the_context_says_so() -> None:
    model = inject(BertModel(BertConfig(vocab_size=50, **SMALL), add_pooling_layer=False), LoRA(rank=2))
    resora = ReSoRA("linear")
    with pytest.raises(ValueError, match="behind the with block"), resora.capture(model) as subspaces:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))
        resora(subspaces)


# ---- what is left behind


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_passes_without_a_graph_leave_no_hooks() -> None:
    """As of a teacher: inside the context, but never repeated in a backward pass."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    before = hooks(model)
    for _ in range(4):
        with capture(model) as subspaces, torch.no_grad():
            model(torch.randn(3, 4))
        assert len(subspaces) == 1
        del subspaces
    model(torch.randn(3, 4))
    assert hooks(model) == before


def test_nothing_is_held_of_a_model_that_is_gone() -> None:
    """Also where an instance brings its own forward, as accelerate's offloading does."""
    model = inject(BertModel(BertConfig(vocab_size=50, **SMALL), add_pooling_layer=False), LoRA(rank=2))
    model.forward = functools.partial(type(model).forward, model)
    with capture(model) as subspaces:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    activations = weakref.ref(next(iter(subspaces.values())).activations)
    model_is = weakref.ref(model)
    del subspaces
    gc.collect()
    assert activations() is None
    del model
    gc.collect()
    assert model_is() is None
