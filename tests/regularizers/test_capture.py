"""What capture records is what the layer adds, on real tokens only."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from adapters import LoRA, inject
from regularizers import ReSoRA, capture


def small_bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    bert = inject(BertModel(config, add_pooling_layer=False), LoRA(rank=4, alpha=12, targets=("q", "v")))
    for name, parameter in bert.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    return bert.eval()


def test_activations_times_basis_is_the_delta_of_the_layer() -> None:
    bert = small_bert()
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    layer = bert.encoder.layer[1].attention.self.query

    def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        inputs["x"], outputs["y"] = args[0], output

    handle = layer.register_forward_hook(keep)
    with capture(bert) as subspaces:
        bert(torch.randint(0, 50, (3, 7)))
    handle.remove()
    activations, basis = subspaces["encoder.layer.1.attention.self.query.q"]
    assert activations.shape == (21, 4) and basis.shape == (4, 16)
    delta = outputs["y"] - nn.functional.linear(inputs["x"], layer.weight, layer.bias)
    torch.testing.assert_close((activations @ basis).view(3, 7, 16), delta, atol=1e-5, rtol=1e-4)


def test_padding_is_no_sample() -> None:
    bert = small_bert()
    ids = torch.randint(1, 50, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    with capture(bert) as padded:
        bert(ids, mask)  # also when it is passed by position
    with capture(bert) as first:
        bert(ids[:1])
    with capture(bert) as second:
        bert(ids[1:, :3])
    for name, (activations, _) in padded.items():
        assert len(activations) == 9
        alone = torch.cat([first[name].activations, second[name].activations])
        torch.testing.assert_close(activations, alone, atol=1e-5, rtol=1e-4)


def test_the_mask_of_an_inner_model_is_found() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = small_bert()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.text(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state

    model = Wrapper()
    with capture(model) as subspaces:
        model(torch.tensor([[3, 4, 0, 0], [5, 6, 7, 0]]))
    assert {len(s.activations) for s in subspaces.values()} == {5}


def test_the_penalty_reaches_a_and_the_recording_ends_with_the_context() -> None:
    bert = small_bert().train()
    with capture(bert) as subspaces:
        bert(torch.randint(0, 50, (2, 5)))
    sum(ReSoRA("linear", weight=1.0)(subspaces).values()).backward()
    last = bert.encoder.layer[-1].attention.self.query.branches["q"]
    assert last.A.grad.abs().sum() > 0
    assert last.B.grad is None  # Eq. 7 moves A; B of a lower layer moves through the layers above it
    seen = len(subspaces)
    bert(torch.randint(0, 50, (2, 5)))
    assert len(subspaces) == seen and all(len(s.activations) == 10 for s in subspaces.values())


def test_an_exception_ends_the_recording() -> None:
    bert = small_bert()
    with pytest.raises(IndexError), capture(bert):
        bert(torch.tensor([[999]]))
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in bert.modules()]
    assert not any(hooks)
    assert all(module.record is None for module in bert.modules() if hasattr(module, "record"))


def test_a_layer_that_runs_twice_adds_up_and_nesting_is_refused() -> None:
    bert = small_bert()
    with capture(bert) as subspaces:
        bert(torch.randint(0, 50, (2, 5)))
        bert(torch.randint(0, 50, (1, 3)))
        with pytest.raises(RuntimeError, match="captured already"), capture(bert):
            pass
    assert {len(s.activations) for s in subspaces.values()} == {13}
    with pytest.raises(ValueError, match="no low-rank layer"), capture(nn.Linear(2, 2)):
        pass


def test_a_users_attribute_named_record_is_no_low_rank_layer() -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.record = small_bert(), list[torch.Tensor]()

        def forward(self, ids: torch.Tensor) -> None:
            self.record.append(self.bert(ids).last_hidden_state)

    model = Recorder()
    with capture(model) as subspaces:
        model(torch.randint(0, 50, (2, 5)))
    assert len(subspaces) == 4 and len(model.record) == 1
    alone = nn.Linear(2, 2)
    alone.record = []
    with pytest.raises(ValueError, match="no low-rank layer"), capture(alone):
        pass
