"""Where merging ends in an error and changes nothing; what it computes is in test_matrix_merging.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backbones import build, inputs
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import BertConfig, BertForMaskedLM

from adapters import SSF, LoRA, inject, load, merge, save


def shaken(model: nn.Module) -> nn.Module:
    """No update is zero any more."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_a_tied_weight_is_not_merged() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=50, **sizes)).eval()
    inject(model, LoRA(rank=2, targets=r"decoder$|query"))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    ids = torch.arange(6)[None]
    expected = model(ids).logits
    with pytest.raises(ValueError, match=r"decoder cannot be merged: its \w+ is tied to \S+, which would change too"):
        merge(model)
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_weight_in_the_memory_of_another_is_not_merged() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data)
    shaken(inject(model, LoRA(rank=2, targets=r"^0$")))
    x = torch.randn(3, 8)
    expected = model(x)
    with pytest.raises(ValueError, match="0 cannot be merged: its weight is tied to 1, which would change too"):
        merge(model)
    assert torch.equal(model(x), expected)


RECOMPUTED: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", amount=0.5), lambda m: prune.remove(m, "weight")),
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "a parametrization": (
        parametrizations.weight_norm,
        lambda m: parametrize.remove_parametrizations(m, "weight", leave_parametrized=True),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("how", RECOMPUTED)
def test_a_weight_that_is_computed_from_others_is_not_merged(how: str) -> None:
    compute, make_permanent = RECOMPUTED[how]
    for adapter in (LoRA(rank=2, targets=("fc1",)), SSF()):
        model, (x,) = build("vit"), inputs("vit")
        compute(model.backbone.blocks[0].mlp.fc1)
        expected = shaken(inject(model, adapter))(x)
        with pytest.raises(ValueError, match=r"mlp\.fc1 cannot be merged: its weight is computed from other .*remove"):
            merge(model)
        assert torch.equal(model(x), expected)

    model = build("vit")
    layer = model.backbone.blocks[0].mlp.fc1
    compute(layer)
    make_permanent(layer)
    expected = shaken(inject(model, LoRA(rank=2, targets=("fc1",))))(x)
    torch.testing.assert_close(merge(model)(x), expected)


def test_a_compiled_model_is_the_model(tmp_path: Path) -> None:
    model, (x,) = build("vit"), inputs("vit")
    compiled = torch.compile(model, backend="eager")
    assert inject(compiled, LoRA(rank=2), train=("head",)) is compiled
    expected = shaken(model)(x)
    save(compiled, tmp_path / "a.safetensors")
    torch.testing.assert_close(load(build("vit"), tmp_path / "a.safetensors").eval()(x), expected)
    assert load(compiled, tmp_path / "a.safetensors") is compiled
    torch.testing.assert_close(compiled(x), expected)
    assert merge(compiled) is compiled
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(model)
