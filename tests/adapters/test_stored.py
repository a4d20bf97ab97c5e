"""What is read from the disk alone, against the model that was saved: its own layers, and PEFT's get_delta_weight."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from backbones import vit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from adapters import ADAPTERS, LowRankAdapter, inject, save, stored_subspaces
from adapters.base import Branch
from adapters.lora import LowRank

LOW_RANK = [name for name, kind in ADAPTERS.items() if hasattr(kind, "stored_subspaces")]
ON_BERT = [name for name in LOW_RANK if not name.startswith(("dtl", "noah"))]  # images: test_dtl.py, test_noah.py


def bert(layers: int = 2) -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32)
    )


def random_values(model: nn.Module) -> nn.Module:
    """Every trained tensor gets values, as if trained: at LoRA's B = 0 any scale would be right."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", ON_BERT)
def test_a_file_gives_what_the_model_holds(name: str, tmp_path: Path) -> None:
    adapter = ADAPTERS[name]()
    assert isinstance(adapter, LowRankAdapter)
    model = random_values(inject(bert(layers=11), adapter, train=("pooler",)))
    save(model, tmp_path / "adapter.safetensors")
    stored = stored_subspaces(tmp_path / "adapter.safetensors")

    layers: dict[str, Any] = {path: module for path, module in model.named_modules() if "record" in vars(module)}
    live = {f"{path}.{role}": layer.weight_subspaces(role) for path, layer in layers.items() for role in layer.roles}
    assert set(stored) == set(live)
    numbers = [int(name.split(".")[2]) for name in stored]
    assert numbers == sorted(numbers)  # layer.10 after layer.9
    for layer, pair in live.items():
        for ours, theirs in zip(stored[layer], pair, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert stored.rest == ("pooler.dense.bias", "pooler.dense.weight")


def test_a_lora_file_is_alpha_over_rank_b_a(tmp_path: Path) -> None:
    save(
        random_values(inject(bert(), ADAPTERS["lora"](rank=3, alpha=6.0, targets=("fc1",)))),  # type: ignore[call-arg]
        tmp_path / "a.safetensors",
    )
    tensors = load_file(tmp_path / "a.safetensors")
    activations, basis = stored_subspaces(tmp_path / "a.safetensors")["encoder.layer.1.intermediate.dense.fc1"]
    a, b = (tensors[f"encoder.layer.1.intermediate.dense.branches.fc1.{factor}"] for factor in "AB")
    assert activations.shape == (16, 3) and basis.shape == (3, 32)
    torch.testing.assert_close((activations @ basis).T, 2.0 * b @ a)


class Signed(LowRank):
    """A method as CONTRIBUTING.md has it: a branch, and nothing about files."""

    name: ClassVar[str] = "signed"

    def branch(self, d_in: int, d_out: int, rank: int) -> Branch:
        return SignedBranch(d_in, d_out, rank)


class SignedBranch(Branch):
    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(rank, d_in)), nn.Parameter(torch.randn(d_out, rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        return -self.A, self.B.T


def test_a_new_method_has_stored_subspaces_by_its_factors() -> None:
    model, adapter = bert(), Signed(rank=3, targets=("fc1",), rank_pattern={"layer.1": 2})
    state = inject(model, adapter).state_dict()
    random = torch.get_rng_state()
    stored = adapter.stored_subspaces(state)
    assert torch.equal(torch.get_rng_state(), random)
    branches = [layer.intermediate.dense.branches["fc1"] for layer in model.encoder.layer]
    for branch, (activations, basis) in zip(branches, stored.values(), strict=True):
        assert torch.equal(activations @ basis, -branch.A.T @ branch.B.T) and not activations.requires_grad


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - set(LOW_RANK)))
def test_an_adapter_without_rank_one_parts_is_refused(name: str, tmp_path: Path) -> None:
    model, head = (vit(), "head") if name == "vpt" else (bert(), "pooler")  # BERT has prefix tuning instead
    save(inject(model, ADAPTERS[name](), train=(head,)), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"no sum of rank-1 subspaces; the adapters that are one: .*lora"):
        stored_subspaces(tmp_path / "a.safetensors")


class Tiny(nn.Module):
    """A convolution and GPT-2's transposed linear layer, which has no semantic target but which PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.proj = Conv1D(6, 5)  # d_out 6, d_in 5; the weight is (d_in, d_out)


def saved_by_peft(folder: Path, model: nn.Module | None = None, **settings: Any) -> peft.PeftModel:
    settings = {"target_modules": ["query", "intermediate.dense"], "r": 4, "lora_alpha": 6} | settings
    wrapped = peft.get_peft_model(bert() if model is None else model, peft.LoraConfig(**settings))
    random_values(wrapped).save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"query": 2, r"layer\.1\.intermediate\.dense": 5}, "alpha_pattern": {r"1\..*query": 20}},
        {"lora_bias": True},
        {"modules_to_save": ["pooler"], "bias": "lora_only"},
    ],
    ids=["plain", "rslora", "patterns", "lora_bias", "modules_to_save"],
)
def test_a_peft_folder_gives_pefts_own_delta(settings: dict[str, Any], tmp_path: Path) -> None:
    wrapped = saved_by_peft(tmp_path, **settings)
    stored = stored_subspaces(tmp_path)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(stored) == set(layers) and len(stored) == 4
    for name, layer in layers.items():
        activations, basis = stored[name]
        assert activations.shape[1] == basis.shape[0] == layer.r["default"]
        torch.testing.assert_close((activations @ basis).T, layer.get_delta_weight("default"))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored.rest) + 2 * len(stored) == len(tensors) and set(stored.rest) <= set(tensors)


def test_adalora_of_peft_too(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(bert(), peft.AdaLoraConfig(target_modules=["query"], init_r=3, total_step=9))
    random_values(wrapped).save_pretrained(tmp_path)
    stored = stored_subspaces(tmp_path)
    assert len(stored) == 2 and stored.rest == ()
    for name, (activations, basis) in stored.items():
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close((activations @ basis).T, layer.get_delta_weight("default"))


def test_transposed_weights_and_what_is_no_linear_layer(tmp_path: Path) -> None:
    wrapped = saved_by_peft(tmp_path, Tiny(), target_modules=["conv", "proj"], fan_in_fan_out=True, r=2)
    stored = stored_subspaces(tmp_path)
    activations, basis = stored["proj"]
    torch.testing.assert_close(activations @ basis, wrapped.base_model.model.proj.get_delta_weight("default"))
    assert stored.rest == ("base_model.model.conv.lora_A.weight", "base_model.model.conv.lora_B.weight")

    saved_by_peft(tmp_path / "conv", Tiny(), target_modules=["conv"])
    with pytest.raises(ValueError, match=r"no low-rank update of a linear layer; its tensors are .*conv\.lora_A"):
        stored_subspaces(tmp_path / "conv")

    saved_by_peft(tmp_path / "words", target_modules=["query", "word_embeddings"])
    assert any(name.endswith("word_embeddings.lora_embedding_A") for name in stored_subspaces(tmp_path / "words").rest)


def test_bfloat16_is_read_as_float32(tmp_path: Path) -> None:
    wrapped = saved_by_peft(tmp_path, bert().bfloat16())
    wrapped.to(torch.bfloat16).save_pretrained(tmp_path)
    for activations, basis in stored_subspaces(tmp_path).values():
        assert activations.dtype == basis.dtype == torch.float32


def test_other_forms_are_refused(tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match=r"use_dora=True: DoRA rescales .* only plain LoRA"):
        stored_subspaces(tmp_path / "dora")
    peft.get_peft_model(bert(), peft.IA3Config(target_modules=["query"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    with pytest.raises(ValueError, match="peft_type 'IA3'; expected 'LORA'"):
        stored_subspaces(tmp_path / "ia3")


def test_every_lora_variant_of_peft_is_refused_or_known_to_be_plain() -> None:
    """A variant that a later PEFT adds has to be looked at: is its update still B A?"""
    from dataclasses import fields

    from adapters.peft_folder import OTHER_FORMS

    variants = {field.name for field in fields(peft.LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants - set(OTHER_FORMS) <= {"velora_config"}  # another backward pass, the same update


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    saved_by_peft(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.encoder.layer.0.attention.self.query.lora_B.weight"

    for change, message in (({"r": 8}, r"expected A \(8, d_in\)"), ({"alpha_pattern": {"(": 1}}, "regular expression")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            stored_subspaces(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    missing = copy.copy(tensors)
    del missing[name]
    save_file(missing, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"encoder.layer.0.attention.self.query: .* B is missing"):
        stored_subspaces(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="not a safetensors file"):
        stored_subspaces(tmp_path)

    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only adapter_model.bin, a pickle.*safe_serialization=True"):
        stored_subspaces(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json"):
        stored_subspaces(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        stored_subspaces(tmp_path / "nowhere.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not an adapter file of this suite"):
        stored_subspaces(tmp_path / "x.safetensors")
