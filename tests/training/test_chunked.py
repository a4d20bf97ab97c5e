"""A batch in chunks has the gradients of the whole batch, with the penalty, with dropout, and through the Trainer."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "retrieval"))
import small_clip
import tiny

from adapters import LoRA, inject
from regularizers import REGULARIZERS, ReSoRA
from retrieval.clip4clip import CLIP4Clip
from retrieval.losses import InfoNCE
from training.chunked import check_chunkable, chunked_backward


def model_of(head: str = "meanP", dropout: float = 0.0) -> nn.Module:
    model = CLIP4Clip(small_clip.small_clip(), head=head)
    inject(model, LoRA(rank=3, dropout=dropout, rank_pattern={"visual": 2}), train=model.heads)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.double().train()


def batch(items: int = 5) -> dict[str, Tensor]:
    """Clips of 3, 2, 1, ... frames, one without any; sentences of different lengths."""
    frames, mask = small_clip.clips(batch=items, length=3)
    mask[3] = False
    ids = small_clip.sentences(batch=items)
    real = torch.arange(16) < torch.tensor([16, 9, 4, 12, 7])[:items, None]
    return {"frames": frames.double(), "frame_mask": mask, "input_ids": ids, "attention_mask": real.long()}


def total(outputs: dict[str, Tensor], subspaces: Any, resora: ReSoRA | None) -> Tensor:
    parts = InfoNCE()(outputs, 0.0) | (resora(subspaces) if resora else {})
    return torch.stack(list(parts.values())).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole(model: nn.Module, inputs: dict[str, Tensor], resora: ReSoRA | None) -> Tensor:
    if resora is None:
        loss = total(model(**inputs), {}, None)
    else:
        with resora.capture(model) as subspaces:
            outputs = model(**inputs)
        loss = total(outputs, subspaces, resora)
    loss.backward()
    return loss.detach()


PENALTIES: list[ReSoRA | None] = [None, *(ReSoRA(name, weight=0.5) for name in REGULARIZERS)]
PENALTIES += [ReSoRA("linear", weight=0.5, samples="mean"), ReSoRA("linear", weight=0.5, on="weights")]


@pytest.mark.parametrize("resora", PENALTIES, ids=str)
def test_gradients_are_those_of_the_whole_batch(resora: ReSoRA | None) -> None:
    expected, model = model_of("seqTransf"), model_of("seqTransf")
    value = whole(expected, batch(), resora)
    found = chunked_backward(model, batch(), 2, lambda o, s: total(o, s, resora), resora)
    assert float(found) == pytest.approx(float(value), rel=1e-9)
    assert gradients(model).keys() == gradients(expected).keys() and len(gradients(model)) > 20
    for name, gradient in gradients(expected).items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            gradients(model)[name], gradient, atol=1e-9 * scale, rtol=1e-9, msg=lambda text, at=name: f"{at}: {text}"
        )


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 100])
def test_in_float32_and_chunks_of_any_size(chunk_size: int) -> None:
    resora = ReSoRA("linear", weight=0.5)
    expected, model = model_of().float(), model_of().float()
    inputs = batch() | {"frames": batch()["frames"].float()}
    whole(expected, inputs, resora)
    chunked_backward(model, inputs, chunk_size, lambda o, s: total(o, s, resora), resora)
    for name, gradient in gradients(expected).items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients(model)[name], gradient, atol=2e-6 * scale, rtol=1e-4)


def test_dropout_drops_the_same_in_both_passes_and_the_generator_goes_on() -> None:
    """Against all chunks with their graphs at once, from the same state of the generator."""
    resora = ReSoRA("overlap", weight=0.5)
    expected, model = model_of(dropout=0.4), model_of(dropout=0.4)
    torch.manual_seed(7)
    outputs, captured = [], []
    for start in (0, 2, 4):
        with resora.capture(expected) as subspaces:
            outputs.append(expected(**{name: tensor[start : start + 2] for name, tensor in batch().items()}))
        captured.append(subspaces)
    together = {key: torch.cat([o[key] for o in outputs]) for key in ("visual", "text", "valid")}
    together["logit_scale"] = outputs[0]["logit_scale"]
    joined = copy.copy(captured[0])
    for name in joined:
        rows = torch.cat([each[name].activations for each in captured])
        joined[name] = joined[name]._replace(activations=rows)
    total(together, joined, resora).backward()
    after = torch.rand(3)

    torch.manual_seed(7)
    chunked_backward(model, batch(), 2, lambda o, s: total(o, s, resora), resora)
    assert torch.equal(torch.rand(3), after)
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(model)[name], gradient, atol=1e-12, rtol=1e-9)


def test_gradients_are_added_to_those_that_are_there() -> None:
    once, twice = model_of(), model_of()
    chunked_backward(once, batch(), 2, lambda o, s: total(o, s, None))
    for _ in range(2):
        chunked_backward(twice, batch(), 3, lambda o, s: total(o, s, None))
    for name, gradient in gradients(once).items():
        torch.testing.assert_close(gradients(twice)[name], 2 * gradient)


def test_the_graph_of_one_chunk_at_a_time() -> None:
    """What autograd keeps for the backward pass, in bytes."""

    def kept(chunk_size: int) -> int:
        now, peak = 0, 0

        class Packed:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal now, peak
                self.tensor, self.size = tensor, 0 if tensor.is_leaf else tensor.nbytes
                now += self.size
                peak = max(peak, now)

            def __del__(self) -> None:
                nonlocal now
                now -= self.size

        model = model_of()
        with torch.autograd.graph.saved_tensors_hooks(Packed, lambda packed: packed.tensor):
            chunked_backward(model, batch(), chunk_size, lambda o, s: total(o, s, None))
        return peak

    assert kept(1) < 0.5 * kept(5)


def test_in_distributed_data_parallel_gradients_are_averaged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another process that has three times our gradients, and one for a parameter that has none here."""

    def all_reduce(tensor: Tensor) -> None:
        tensor += torch.where(tensor == 0, 1.0, 3 * tensor)

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)

    class Wrapped(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module, sync: bool) -> None:
            nn.Module.__init__(self)
            self.module, self.require_backward_grad_sync = module, sync

    alone, wrapped, later = model_of(), model_of(), model_of()
    for model in (alone, wrapped, later):
        model.idle = nn.Parameter(torch.zeros(2).double())
    chunked_backward(alone, batch(), 2, lambda o, s: total(o, s, None))
    chunked_backward(Wrapped(wrapped, sync=True), batch(), 2, lambda o, s: total(o, s, None))
    chunked_backward(Wrapped(later, sync=False), batch(), 2, lambda o, s: total(o, s, None))
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(gradients(wrapped)[name], gradient * 4 / 2)
        torch.testing.assert_close(gradients(later)[name], gradient)  # of accumulated batches the last one averages
    assert torch.equal(wrapped.idle.grad, torch.full((2,), 0.5).double()) and later.idle.grad is None


def test_through_the_trainer_a_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoBatchNorm(tiny.Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 1)

    monkeypatch.setattr(tiny, "Model", NoBatchNorm)
    recipe = tiny.Recipe
    weights = []
    for chunk_size in (None, 2):
        monkeypatch.setattr(tiny, "Recipe", lambda chunk_size=chunk_size, **k: recipe(chunk_size=chunk_size, **k))
        weights.append(tiny.train(tmp_path / str(chunk_size)).state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-4)
    logs = [(tmp_path / name / "log.jsonl").read_text().count("resora_linear") for name in ("None", "2")]
    assert logs[0] == logs[1] > 0


def test_batch_norm_is_refused_unless_it_is_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.Recipe
    monkeypatch.setattr(tiny, "Recipe", lambda **k: recipe(chunk_size=2, **k))
    with pytest.raises(ValueError, match=r"batch norm head\.1: .* use chunk_size=null"):
        tiny.train(tmp_path)

    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Frozen:
            super().train(False)
            return self

    check_chunkable(nn.Sequential(nn.Linear(2, 2), Frozen(2)))


def test_what_has_no_row_an_item_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="inputs with a row an item"):
        chunked_backward(model, {"a": torch.ones(3, 2), "b": torch.ones(2)}, 2, lambda o, s: o.sum())

    class Mixes(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"mixed": x.T}

    with pytest.raises(ValueError, match=r"of 2 items it returns mixed of shape \(3, 2\)"):
        chunked_backward(Mixes(), {"x": torch.ones(4, 3)}, 2, lambda o, s: o["mixed"].sum())
