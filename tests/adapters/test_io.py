"""Save and load: one safetensors file, strict both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from open_clip.model import CLIP
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

from adapters import Full, Linear, LoRA, inject, load, merge, save


class Model(nn.Module):
    """A small BERT with a head that has a batch norm, whose statistics have to be saved too."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.bert(ids).last_hidden_state.mean(dim=1))


def trained(adapter: LoRA | Full | Linear) -> Model:
    model = inject(Model(), adapter, train=("head",))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(torch.randint(0, 50, (8, 6))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    "adapter", [LoRA(rank=3, alpha=6, targets=("q", "fc1")), Full(), Linear()], ids=lambda a: a.name
)
def test_a_saved_adapter_gives_the_same_outputs_on_a_fresh_backbone(tmp_path: Path, adapter: LoRA) -> None:
    model, ids = trained(adapter), torch.randint(0, 50, (4, 6))
    save(model, tmp_path / "adapter.safetensors")
    fresh = load(Model(), tmp_path / "adapter.safetensors").eval()
    assert torch.equal(fresh(ids), model(ids))
    held = load(inject(Model(), adapter, train=("head",)), tmp_path / "adapter.safetensors").eval()
    assert torch.equal(held(ids), model(ids))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


@pytest.mark.parametrize("adapter", [LoRA(rank=3), Full(), Linear()], ids=lambda a: a.name)
def test_a_model_that_is_frozen_by_now_saves_and_loads_the_same(tmp_path: Path, adapter: LoRA) -> None:
    model, ids = trained(adapter), torch.randint(0, 50, (4, 6))
    expected = model(ids)
    save(model.requires_grad_(False), tmp_path / "a.safetensors")
    for other in (Model(), inject(Model(), adapter, train=("head",)).requires_grad_(False)):
        assert torch.equal(load(other, tmp_path / "a.safetensors").eval()(ids), expected)


def test_what_was_unfrozen_by_hand_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = trained(LoRA(rank=3))
    model.bert.encoder.layer[1].output.LayerNorm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layer\.1\.output\.LayerNorm\.weight trains, .*train=\('head',\)"):
        save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_file_holds_what_trains_and_its_configuration(tmp_path: Path) -> None:
    save(trained(LoRA(rank=3, targets=("q",))), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    branches = {f"bert.encoder.layer.{i}.attention.self.query.branches.q.{f}" for i in range(2) for f in "AB"}
    norm = {f"head.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert names == branches | norm | {"head.0.weight", "head.0.bias"}
    assert json.loads(metadata["adapter"]) == {
        "name": "lora",
        "rank": 3,
        "alpha": 8.0,
        "targets": ["q"],
        "dropout": 0.0,
        "rank_pattern": {},
    }


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(trained(LoRA(rank=3)), path)
    other = Model(seed=1)
    with pytest.raises(ValueError, match="trained on another backbone"):
        load(other, path)
    assert not hasattr(other, "injection") and all(p.requires_grad for p in other.parameters()), "it stays as it was"
    with pytest.raises(ValueError, match="rank=3"):
        load(inject(Model(), LoRA(rank=4), train=("head",)), path)
    with pytest.raises(ValueError, match="holds no adapter"):
        save(Model(), path)

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    renamed = copy.copy(tensors)
    renamed["head.9.weight"] = renamed.pop("head.0.weight")
    save_file(renamed, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"missing \['head.0.weight'\], unexpected \['head.9.weight'\]"):
        load(Model(), path)
    save_file(tensors | {"head.0.bias": torch.zeros(7)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"head.0.bias \(7,\) instead of \(4,\)"):
        load(Model(), path)
    newer = metadata | {"adapter": json.dumps(json.loads(metadata["adapter"]) | {"newer": 1})}
    save_file(tensors, path, metadata=newer)
    with pytest.raises(ValueError, match=r"lora with settings that this version does not know: .*'newer'"):
        load(Model(), path)
    save_file(tensors, path, metadata={name: value for name, value in metadata.items() if name != "base"})
    with pytest.raises(ValueError, match="not complete: its metadata lack base"):
        load(Model(), path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="not an adapter file"):
        load(Model(), path)
    with pytest.raises(ValueError, match="holds no adapter any more: save before merge"):
        save(merge(trained(LoRA(rank=3))), path)


def test_a_bfloat16_backbone_is_the_same_backbone(tmp_path: Path) -> None:
    save(trained(LoRA(rank=3)), tmp_path / "a.safetensors")
    model = load(Model().to(torch.bfloat16), tmp_path / "a.safetensors")
    assert model.head[0].weight.dtype == torch.bfloat16


def test_a_file_from_inside_a_wrapper_says_so(tmp_path: Path) -> None:
    inside, ids = nn.ModuleDict({"module": Model()}), torch.randint(0, 50, (4, 6))
    save(inject(inside, LoRA(rank=3), train=("module.head",)), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"another backbone .* its names begin with module, .* \(DDP\)"):
        load(Model(), tmp_path / "a.safetensors")
    load(nn.ModuleDict({"module": Model()}), tmp_path / "a.safetensors")["module"](ids)


def test_float16_rounds_otherwise_and_the_error_says_so(tmp_path: Path) -> None:
    save(trained(LoRA(rank=3)), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"another backbone .*in the precision that it was saved in: float16 rounds"):
        load(Model().half(), tmp_path / "a.safetensors")
    assert load(Model(), tmp_path / "a.safetensors").half().head[0].weight.dtype == torch.float16


@pytest.mark.parametrize("adapter", [LoRA(rank=3), Full()], ids=lambda a: a.name)
def test_running_statistics_without_parameters_beside_them(tmp_path: Path, adapter: LoRA) -> None:
    """The head of MAE and of AdaptFormer."""

    def fresh() -> Model:
        model = Model()
        model.head = nn.Sequential(nn.BatchNorm1d(16, affine=False), nn.Linear(16, 4))
        return model

    model, ids = inject(fresh(), adapter, train=("head",)).train(), torch.randint(0, 50, (4, 6))
    for _ in range(3):
        model(torch.randint(0, 50, (8, 6)))
    save(model, tmp_path / "a.safetensors")
    torch.manual_seed(7)
    back = fresh()
    back.head.load_state_dict({n: t for n, t in model.head.state_dict().items() if "running" not in n}, strict=False)
    assert torch.equal(load(back, tmp_path / "a.safetensors").eval()(ids), model.eval()(ids))


def test_frozen_batch_norms_move_and_come_back(tmp_path: Path) -> None:
    """Their statistics follow the data in training mode, as in any frozen backbone: CLIP's ResNet beside LoRA."""
    vision = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8, "head_width": 8}
    text = {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 4, "layers": 2}

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return CLIP(16, vision_cfg=vision, text_cfg=text)

    model, images = inject(fresh(), LoRA(rank=2, targets=("q", "v"))).train(), torch.randn(4, 3, 32, 32)
    model.encode_image(images)
    save(model, tmp_path / "a.safetensors")
    expected = model.eval().encode_image(images)
    assert not torch.allclose(fresh().eval().encode_image(images), expected, rtol=0.01)
    assert torch.equal(load(fresh(), tmp_path / "a.safetensors").eval().encode_image(images), expected)


@pytest.mark.parametrize("adapter", [LoRA(rank=3), Full()], ids=lambda a: a.name)
def test_a_file_with_another_head_leaves_the_model_as_it_was(tmp_path: Path, adapter: LoRA) -> None:
    save(trained(adapter), tmp_path / "a.safetensors")
    wide, more = Model(), Model()
    wide.head[0] = nn.Linear(16, 9)
    more.head.append(nn.Linear(4, 4))
    for model, message in ((wide, r"head.0.weight \(4, 16\) instead of \(9, 16\)"), (more, r"missing \['head.2.bias'")):
        before = set(dict(model.named_parameters()))
        with pytest.raises(ValueError, match=message):
            load(model, tmp_path / "a.safetensors")
        assert not hasattr(model, "injection") and set(dict(model.named_parameters())) == before
        assert all(parameter.requires_grad for parameter in model.parameters())
        inject(model, adapter)


def test_a_file_with_another_rank_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(trained(LoRA(rank=3)), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({n: torch.zeros(2, 16) if n.endswith(".A") else t for n, t in load_file(path).items()}, path, metadata)
    model = Model()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"branches.q.A \(2, 16\) instead of \(3, 16\)"):
        load(model, path)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not hasattr(model, "injection") and all(parameter.requires_grad for parameter in model.parameters())


class Tied(nn.Module):
    """A head that has the weight of the embeddings, as in language models."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.emb, self.head = nn.Linear(8, 8), nn.Embedding(20, 8), nn.Linear(8, 20)
        torch.manual_seed(seed)
        nn.init.normal_(self.emb.weight)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.emb(ids)))


@pytest.mark.parametrize("train", ["head", "head.weight"])
def test_a_head_whose_weight_is_tied_trains_and_comes_back(tmp_path: Path, train: str) -> None:
    model = inject(Tied(seed=1), LoRA(rank=2, targets="fc"), train=(train,))
    assert model.head.weight.requires_grad and model.head.weight is model.emb.weight
    assert not model.fc.weight.requires_grad and model.head.bias.requires_grad == (train == "head")
    nn.init.normal_(model.fc.branches["whole"].B)
    save(model, tmp_path / "a.safetensors")
    fresh, ids = load(Tied(seed=1 if train == "head.weight" else 2), tmp_path / "a.safetensors"), torch.arange(20)
    assert fresh.head.weight is fresh.emb.weight
    assert torch.equal(fresh(ids), model(ids))
    untied = Tied(seed=1)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"missing \['head.weight'\]"):
        load(untied, tmp_path / "a.safetensors")
    assert not hasattr(untied, "injection")
