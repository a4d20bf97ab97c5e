"""From PEFT: its folders load here, with PEFT itself as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import BACKBONES, HEAD, IDS, IN_OURS, IN_PEFT, D, assert_close, differs, of_peft, outputs, stock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters import ADAPTERS, LoRA, export_peft, inject, load, load_peft, merge, save, trainable_parameters

pytestmark = pytest.mark.filterwarnings("ignore:.*fused layers:UserWarning")


@pytest.mark.parametrize("name", BACKBONES)
def test_a_folder_of_peft_loads(name: str, tmp_path: Path) -> None:
    theirs = of_peft(name, tmp_path, lora_dropout=0.25)
    differs(name, theirs)
    ours = load_peft(stock(name), tmp_path)
    expected = outputs(name, theirs)
    assert_close(outputs(name, ours.eval()), expected)
    assert ours.injection.adapter == LoRA(rank=4, alpha=6.0, targets=IN_OURS[name], dropout=0.25)
    assert ours.injection.train == (HEAD[name],)
    trains = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert {n for n in trains if ".branches." not in n} == {
        f"{HEAD[name]}.{n}" for n, _ in stock(name).get_submodule(HEAD[name]).named_parameters()
    }

    save(ours, tmp_path / "ours.safetensors")
    assert torch.equal(outputs(name, load(stock(name), tmp_path / "ours.safetensors").eval()), outputs(name, ours))
    assert_close(outputs(name, merge(ours)), expected)
    assert_close(outputs(name, theirs.merge_and_unload()), outputs(name, ours))


def test_plain_layers_go_through_unchanged(tmp_path: Path) -> None:
    of_peft("bert", tmp_path / "theirs")
    export_peft(load_peft(stock("bert"), tmp_path / "theirs"), tmp_path / "back")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "back"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_names_without_pefts_prefix(tmp_path: Path) -> None:
    theirs = of_peft("bert", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "adapter_model.safetensors")
    assert_close(outputs("bert", load_peft(stock("bert"), tmp_path).eval()), outputs("bert", theirs))


def test_a_fused_layer_becomes_q_k_and_v(tmp_path: Path) -> None:
    of_peft("timm", tmp_path, target_modules=["qkv"])
    with pytest.warns(UserWarning, match=r"2 fused layers.* each of q, k, v .* 1,536 parameters instead of 1,024"):
        ours = load_peft(stock("timm"), tmp_path)
    assert ours.injection.adapter.targets == ("q", "k", "v")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    b = tensors["base_model.model.blocks.1.attn.qkv.lora_B.weight"]
    branches = ours.blocks[1].attn.qkv.branches
    assert torch.equal(branches["v"].B, b[2 * D :]) and torch.equal(branches["q"].A, branches["k"].A)
    assert trainable_parameters(ours) == 2 * 3 * 4 * (D + D) + 5 * (D + 1)


PATTERNS = [
    ("bert", {"rank_pattern": {"query": 2, r"layer\.1\.intermediate\.dense": 7}}),
    ("bert", {"alpha_pattern": {r"1\..*query": 20, "value": 3}}),
    ("bert", {"use_rslora": True}),
    ("bert", {"use_rslora": True, "rank_pattern": {"query": 2}, "alpha_pattern": {r"0\..*value": 11}}),
    ("clip", {"use_rslora": True, "rank_pattern": {"q_proj": 2, r"vision_model.*v_proj": 7}}),
    ("vit", {"rank_pattern": {r"layers\.1\..*q_proj": 2}, "alpha_pattern": {"fc2": 20}}),
    ("timm", {"use_rslora": True, "rank_pattern": {r"0\.attn\.qkv": 2}, "alpha_pattern": {"fc1": 11}}),
]


@pytest.mark.parametrize(("name", "settings"), PATTERNS)
def test_ranks_and_scales_by_layer(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = of_peft(name, tmp_path / "theirs", **settings)
    ours = load_peft(stock(name), tmp_path / "theirs").eval()
    assert_close(outputs(name, ours), outputs(name, theirs))
    ranks = {n.removeprefix("base_model.model."): m.r["default"] for n, m in theirs.named_modules() if hasattr(m, "r")}
    assert len(set(ranks.values())) == 1 + len(settings.get("rank_pattern", ()))
    for layer, rank in ranks.items():
        assert {len(branch.A) for branch in ours.get_submodule(layer).branches.values()} == {rank}
    save(ours, tmp_path / "ours.safetensors")
    assert torch.equal(outputs(name, load(stock(name), tmp_path / "ours.safetensors").eval()), outputs(name, ours))
    export_peft(ours, tmp_path / "back")
    assert_close(outputs(name, peft.PeftModel.from_pretrained(stock(name), tmp_path / "back")), outputs(name, theirs))


def test_rslora_is_an_alpha(tmp_path: Path) -> None:
    of_peft("bert", tmp_path, use_rslora=True)
    ours = load_peft(stock("bert"), tmp_path)
    assert ours.injection.adapter.alpha == 12.0  # 6 sqrt(4): 12 / 4 = 6 / sqrt(4)
    b = load_file(tmp_path / "adapter_model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query"
    assert torch.equal(ours.get_submodule(name).branches["q"].B, b[f"base_model.model.{name}.lora_B.weight"])


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": r".*layer\.0.*query"},
        {"target_modules": "all-linear", "modules_to_save": None},
        {"target_modules": r".*\.(query|attention\.output\.dense)"},
    ],
)
def test_however_peft_was_told_its_layers(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = of_peft("bert", tmp_path, **settings)
    ours = load_peft(stock("bert"), tmp_path).eval()
    assert_close(outputs("bert", ours), outputs("bert", theirs))
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {n for n, m in ours.named_modules() if hasattr(m, "roles")} == adapted


def test_training_takes_the_same_steps(tmp_path: Path) -> None:
    """From the same values, on the same data, SGD does the same to A, B and the head as in PEFT."""
    theirs = of_peft("bert", tmp_path)
    ours = load_peft(stock("bert"), tmp_path)
    labels = torch.tensor([0, 2])
    for model in (theirs, ours):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=labels).loss.backward()
            optimizer.step()
    before = load_file(tmp_path / "adapter_model.safetensors")
    theirs.save_pretrained(tmp_path / "trained")
    export_peft(ours, tmp_path / "ours")
    after, mine = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("trained", "ours"))
    assert before.keys() == after.keys() == mine.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-6, rtol=0)
        assert (tensor - before[name]).abs().max() > 1e-4, name


def schedule(**settings: Any) -> dict[str, Any]:
    return {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 2, "total_step": 6, "orth_reg_weight": 0.1} | settings


@pytest.mark.parametrize("alpha", [6, 0])  # PEFT takes the rank for an alpha of 0
@pytest.mark.parametrize("name", BACKBONES)
def test_adalora_of_peft_loads(name: str, alpha: int, tmp_path: Path) -> None:
    theirs = of_peft(name, tmp_path / "theirs", peft.AdaLoraConfig, **schedule(lora_alpha=alpha, r=8))
    ours = load_peft(stock(name), tmp_path / "theirs").eval()
    expected = outputs(name, theirs)
    differs(name, ours)
    assert_close(outputs(name, ours), expected)
    assert ours.injection.adapter == ADAPTERS["adalora"](
        rank=6, alpha=float(alpha or 6), targets=IN_OURS[name], target_rank=3, initial_warmup=1 / 6,
        final_tuning=2 / 6, interval=1, orthogonality=0.1,
    )  # fmt: skip
    save(ours, tmp_path / "ours.safetensors")
    assert torch.equal(outputs(name, load(stock(name), tmp_path / "ours.safetensors").eval()), outputs(name, ours))
    export_peft(ours, tmp_path / "back")
    assert_close(outputs(name, peft.PeftModel.from_pretrained(stock(name), tmp_path / "back").eval()), expected)
    assert_close(outputs(name, merge(ours)), expected)
    assert_close(outputs(name, theirs.merge_and_unload()), expected)


def test_adalora_without_its_schedule(tmp_path: Path) -> None:
    theirs = of_peft("bert", tmp_path, peft.AdaLoraConfig, **schedule())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    less = {name: value for name, value in config.items() if name not in ("deltaT", "tinit")} | {"total_step": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(less))
    with pytest.warns(UserWarning, match="without total_step, so that its schedule is not known"):
        ours = load_peft(stock("bert"), tmp_path).eval()
    assert_close(outputs("bert", ours), outputs("bert", theirs))
    assert ours.injection.adapter.interval == 1 and ours.injection.adapter.target_rank == 3


def test_adalora_that_peft_pruned_for_good(tmp_path: Path) -> None:
    settings = schedule(target_modules=IN_PEFT["bert"], modules_to_save=["classifier"])
    theirs = peft.get_peft_model(stock("bert"), peft.AdaLoraConfig(**settings)).train()
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 6):
        optimizer.zero_grad()
        theirs(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    kept = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["rank_pattern"]
    assert len(kept) == 6 and 0 < sum(map(sum, kept.values())) <= 6 * 3

    ours = load_peft(stock("bert"), tmp_path / "theirs").eval()
    assert_close(outputs("bert", ours), outputs("bert", theirs))
    for name, mask in kept.items():
        (branch,) = ours.get_submodule(name.removesuffix(".lora_E")).branches.values()
        assert branch.alive.tolist() == mask and branch.E.shape[0] == 6
        assert torch.equal(branch.E.flatten() != 0, branch.alive)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(9, 4), nn.Conv2d(3, 4, 3)
        self.attention, self.linear = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("words", r"words \(Embedding\)"),
        ("conv", r"conv \(Conv2d\)"),
        ("attention", r"attention.out_proj \(out_proj of nn.MultiheadAttention\), attention \(MultiheadAttention\)"),
        ("out_proj", r"attention.out_proj \(out_proj of nn.MultiheadAttention\)"),
    ],
)
def test_layers_without_a_counterpart_are_named(target: str, named: str, tmp_path: Path) -> None:
    peft.get_peft_model(Words(), peft.LoraConfig(target_modules=[target, "linear"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"no counterpart here.*{named}"):
        load_peft(Words(), tmp_path)


def test_tensors_that_do_not_fit_are_named_and_nothing_changes(tmp_path: Path) -> None:
    of_peft("bert", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer, prefix = "bert.encoder.layer.1.attention.self.query", "base_model.model."

    def refused(changed: dict[str, Tensor], message: str) -> None:
        save_file(changed, tmp_path / "adapter_model.safetensors")
        model = stock("bert")
        with pytest.raises(ValueError, match=message):
            load_peft(model, tmp_path)
        assert torch.equal(outputs("bert", model), outputs("bert", stock("bert")))
        assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "injection")

    less = {n: t for n, t in tensors.items() if not n.startswith(prefix + layer)}
    refused(less, rf"missing \['{layer}.lora_A'\], unexpected \[\]")
    refused(tensors | {"base_model.model.bert.new.weight": torch.zeros(2)}, r"unexpected \['bert.new.weight'\]")
    moved = {n.replace("layer.1.", "layer.7."): t for n, t in tensors.items()}
    refused(moved, r"missing \['bert.encoder.layer.1.*unexpected \['bert.encoder.layer.7")
    bias = f"{prefix}classifier.bias"
    refused({n: t for n, t in tensors.items() if n != bias}, r"missing \['classifier.bias'\]")
    refused(tensors | {bias: torch.zeros(8)}, r"misshaped \['classifier.bias \(8,\) instead of \(3,\)'\]")
    wide = f"{prefix}{layer}.lora_A.weight"
    refused(tensors | {wide: torch.zeros(4, 9)}, rf"misshaped \['{layer} \(32, 9\) instead of \(32, 32\)'\]")
    with pytest.raises(ValueError, match="already holds LoRA"):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        load_peft(inject(stock("bert"), LoRA()), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "lora_only"}, "bias='lora_only': expected no trained biases"),
        ({"lora_bias": True}, "lora_bias=True: expected no trained biases"),
        ({"use_dora": True}, "use_dora=True: DoRA rescales"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the backbone"),
    ],
)
def test_other_forms_of_lora_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    of_peft("bert", tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        load_peft(stock("bert"), tmp_path)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    of_peft("bert", tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which can run code"):
        load_peft(stock("bert"), tmp_path)
