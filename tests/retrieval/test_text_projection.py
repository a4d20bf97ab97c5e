"""VSE-infinity where a side network's last map takes the place of the text projection."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from adapters import LST, Adapter, LoRA, UniPT, inject, trainable_parameters
from retrieval import assemble
from retrieval.vse_infty import VSEInfinity, VSEInfinityConfig

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def vse(**settings: object) -> VSEInfinity:
    torch.manual_seed(0)
    config = VSEInfinityConfig(embed_dim=20, hidden_dim=8, **settings)
    return VSEInfinity(BertModel(BertConfig(**SIZES), add_pooling_layer=False), 8, config).eval()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(3, 30, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("adapter", [LST(reduction=2, output_dim=20), UniPT(dim=4, output_dim=20)])
def test_the_adapter_gives_the_width(adapter: Adapter) -> None:
    model = vse(text_projection=False)
    assert model.heads == ("image", "text.pool") and not list(model.text.linear.parameters())
    inject(model, adapter, train=model.heads).train()
    rows = model.encode_text(*texts())
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    rows.sum().backward()
    trains = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("image.")]
    assert trains and all(p.grad is not None for p in trains)
    with pytest.raises(ValueError, match=r"puts out 20 channels, but the head takes 16: set model\.text_projection=f"):
        inject(vse(), adapter).encode_text(*texts())


def test_without_such_an_adapter_the_width_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the experiment is put together, before anything trains."""
    monkeypatch.setattr(assemble, "DATASETS", {"none": lambda root, split: SimpleNamespace(captions=[])})
    monkeypatch.setattr(assemble, "build_model", lambda *_: (vse(text_projection=False), None))
    experiment = SimpleNamespace(
        data="none", root=None, data_options={}, seed=0, model={}, cache=None, adapter=LoRA(), augmentation=None
    )
    with pytest.raises(ValueError, match=r"puts out 16 channels, but the head takes 20: .*adapter\.output_dim=20"):
        assemble.assemble(experiment)


def test_published_count() -> None:
    """UniPT in VSE-infinity: its 5,921,281 parameters instead of the projection's 787,456, and the pooling."""
    with torch.device("meta"):
        bert = BertModel(BertConfig(), add_pooling_layer=False)
        model = VSEInfinity(bert, 2048, VSEInfinityConfig(text_projection=False))
    inject(model, UniPT(dim=512, output_dim=1024), train=("text.pool",))
    assert trainable_parameters(model) == 5_921_281 + 12_704
