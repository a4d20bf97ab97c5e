"""PEFT both ways, with PEFT itself as the oracle: its folders load here, and ours run there, with equal outputs."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTModel,
)

from adapters import ADAPTERS, Linear, LoRA, export_peft, inject, load, load_peft, merge, save, trainable_parameters
from adapters.patterns import exact_pattern

D = 32
SMALL = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
pytestmark = pytest.mark.filterwarnings("ignore:.*fused layers:UserWarning")


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **SMALL))


def clip() -> nn.Module:
    text = {"vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 49, "pad_token_id": 0}
    vision = {"image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=SMALL | text, vision_config=SMALL | vision, projection_dim=16))


def vit() -> nn.Module:
    return ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL))


def timm_vit() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=D, num_heads=4, depth=2, num_classes=5
    )


IDS = torch.arange(1, 13).remainder(49).view(2, 6)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
RUN: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "bert": (bert, lambda model: model(input_ids=IDS).logits),
    "clip": (clip, lambda model: _similarities(model(input_ids=IDS, pixel_values=IMAGES))),
    "vit": (vit, lambda model: model(pixel_values=IMAGES).last_hidden_state),
    "timm": (timm_vit, lambda model: model(IMAGES)),
}
HEAD = {"bert": "classifier", "clip": "visual_projection", "vit": "layernorm", "timm": "head"}
IN_PEFT = {
    "bert": ["query", "value", "intermediate.dense"],
    "clip": ["q_proj", "v_proj", "out_proj"],
    "vit": ["q_proj", "fc2"],
    "timm": ["qkv", "fc1"],
}
IN_OURS = {"bert": ("q", "v", "fc1"), "clip": ("q", "v", "o"), "vit": ("q", "fc2"), "timm": ("q", "k", "v", "fc1")}
BACKBONES = list(RUN)


def _similarities(output: Any) -> Tensor:
    return torch.cat([output.text_embeds, output.image_embeds])


def stock(name: str) -> nn.Module:
    """The same large weights each time: at a width of 32 the usual ones let an adapter do next to nothing."""
    torch.manual_seed(0)
    model = RUN[name][0]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def outputs(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return RUN[name][1](model)


def shaken(model: nn.Module) -> nn.Module:
    """Every trained tensor moves, as if trained."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def of_peft(name: str, folder: Path, config: type[peft.LoraConfig] = peft.LoraConfig, **settings: Any) -> nn.Module:
    settings = {"target_modules": IN_PEFT[name], "modules_to_save": [HEAD[name]], "r": 4, "lora_alpha": 6} | settings
    wrapped = shaken(peft.get_peft_model(stock(name), config(**settings)))
    wrapped.save_pretrained(folder)
    return wrapped


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def differs(name: str, model: nn.Module) -> None:
    assert (outputs(name, model) - outputs(name, stock(name))).abs().max() > 1e-2


@pytest.mark.parametrize("name", BACKBONES)
def test_a_folder_of_peft_loads(name: str, tmp_path: Path) -> None:
    theirs = of_peft(name, tmp_path, lora_dropout=0.25)
    differs(name, theirs)
    ours = load_peft(stock(name), tmp_path)
    expected = outputs(name, theirs)
    close(outputs(name, ours.eval()), expected)
    assert ours.injection.adapter == LoRA(rank=4, alpha=6.0, targets=IN_OURS[name], dropout=0.25)
    assert ours.injection.train == (HEAD[name],)
    trains = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert {n for n in trains if ".branches." not in n} == {
        f"{HEAD[name]}.{n}" for n, _ in stock(name).get_submodule(HEAD[name]).named_parameters()
    }

    save(ours, tmp_path / "ours.safetensors")
    assert torch.equal(outputs(name, load(stock(name), tmp_path / "ours.safetensors").eval()), outputs(name, ours))
    close(outputs(name, merge(ours)), expected)
    close(outputs(name, theirs.merge_and_unload()), outputs(name, ours))


@pytest.mark.parametrize("name", BACKBONES)
def test_peft_runs_what_is_exported(name: str, tmp_path: Path) -> None:
    adapter = LoRA(rank=3, alpha=5.0, targets=IN_OURS[name], dropout=0.1)
    ours = shaken(inject(stock(name), adapter, train=(HEAD[name],)))
    differs(name, ours)
    export_peft(ours, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["adapter_config.json", "adapter_model.safetensors", "out"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(stock(name), tmp_path / "out").eval()
    close(outputs(name, theirs), outputs(name, ours))

    adapted = {n: m for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    branched = {n: m.roles for n, m in ours.named_modules() if hasattr(m, "roles")}
    assert {n.removeprefix("base_model.model."): m.r["default"] for n, m in adapted.items()} == {
        n: 3 * len(roles) for n, roles in branched.items()
    }
    close(outputs(name, theirs.merge_and_unload()), outputs(name, ours))
    back = load_peft(stock(name), tmp_path / "out").eval()
    close(outputs(name, back), outputs(name, ours))
    assert back.injection.adapter.dropout == 0.1
    close(outputs(name, merge(ours)), outputs(name, back))


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
    close(outputs("bert", load_peft(stock("bert"), tmp_path).eval()), outputs("bert", theirs))


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
    {"rank_pattern": {"query": 2, r"layer\.1\.intermediate\.dense": 7}},
    {"alpha_pattern": {r"1\..*query": 20, "value": 3}},
    {"use_rslora": True},
    {"use_rslora": True, "rank_pattern": {"query": 2}, "alpha_pattern": {r"0\..*value": 11}},
]


@pytest.mark.parametrize("settings", PATTERNS)
def test_ranks_and_scales_by_layer(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = of_peft("bert", tmp_path / "theirs", **settings)
    ours = load_peft(stock("bert"), tmp_path / "theirs").eval()
    close(outputs("bert", ours), outputs("bert", theirs))
    ranks = {n.removeprefix("base_model.model."): m.r["default"] for n, m in theirs.named_modules() if hasattr(m, "r")}
    for name, rank in ranks.items():
        assert [len(branch.A) for branch in ours.get_submodule(name).branches.values()] == [rank]
    save(ours, tmp_path / "ours.safetensors")
    assert torch.equal(
        outputs("bert", load(stock("bert"), tmp_path / "ours.safetensors").eval()), outputs("bert", ours)
    )
    export_peft(ours, tmp_path / "back")
    close(outputs("bert", peft.PeftModel.from_pretrained(stock("bert"), tmp_path / "back")), outputs("bert", theirs))


def test_rslora_is_an_alpha(tmp_path: Path) -> None:
    of_peft("bert", tmp_path, use_rslora=True)
    ours = load_peft(stock("bert"), tmp_path)
    assert ours.injection.adapter.alpha == 12.0  # 6 sqrt(4): 12 / 4 = 6 / sqrt(4)
    b = load_file(tmp_path / "adapter_model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query"
    assert torch.equal(ours.get_submodule(name).branches["q"].B, b[f"base_model.model.{name}.lora_B.weight"])


@pytest.mark.parametrize("name", ["bert", "timm"])
def test_exported_ranks_by_layer(name: str, tmp_path: Path) -> None:
    """Also ranks that differ within one fused layer, whose scales then differ too."""
    adapter = LoRA(rank=3, alpha=5.0, targets=IN_OURS[name], rank_pattern={r"0\..*\.q$": 2, "fc1": 5})
    ours = shaken(inject(stock(name), adapter))
    export_peft(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(stock(name), tmp_path / "out").eval()
    close(outputs(name, theirs), outputs(name, ours))
    ranks = {m.r["default"] for m in theirs.modules() if hasattr(m, "r")}
    assert ranks == ({2, 3, 5} if name == "bert" else {8, 9, 5})


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("bert", r"layer\.1\.attention\.self\.query"),
        ("bert", "pooler"),
        ("timm", r"blocks\.0\.attn\.qkv\.(q|v)$"),
        ("clip", r"vision_model.*(q|fc2)$|text_projection"),
    ],
)
def test_some_layers_only(name: str, targets: str, tmp_path: Path) -> None:
    ours = shaken(inject(stock(name), LoRA(rank=2, targets=targets)))
    differs(name, ours)
    export_peft(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(stock(name), tmp_path / "out").eval()
    close(outputs(name, theirs), outputs(name, ours))
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_peft(stock(name), tmp_path / "theirs").eval()
    close(outputs(name, back), outputs(name, ours))
    save(back, tmp_path / "back.safetensors")
    assert torch.equal(outputs(name, load(stock(name), tmp_path / "back.safetensors").eval()), outputs(name, back))


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
    close(outputs("bert", ours), outputs("bert", theirs))
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {n for n, m in ours.named_modules() if hasattr(m, "roles")} == adapted


def test_a_head_with_running_statistics(tmp_path: Path) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = stock("timm")
            self.top = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))

        def forward(self, images: Tensor) -> Tensor:
            return self.top(self.backbone(images))

    torch.manual_seed(0)
    model = Headed()
    first = copy.deepcopy(model)
    inject(model, LoRA(rank=2), train=("top",)).train()(IMAGES)
    shaken(model)
    export_peft(model, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(first), tmp_path / "out").eval()
    close(theirs(IMAGES), model(IMAGES))
    back = load_peft(first, tmp_path / "out").eval()
    close(back(IMAGES), model(IMAGES))
    assert not torch.equal(back.top[1].running_mean, torch.zeros(4))


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


needs_adalora = pytest.mark.skipif("adalora" not in ADAPTERS, reason="no AdaLoRA here")


@needs_adalora
@pytest.mark.parametrize("alpha", [6, 0])  # PEFT takes the rank for an alpha of 0
@pytest.mark.parametrize("name", BACKBONES)
def test_adalora_of_peft_loads(name: str, alpha: int, tmp_path: Path) -> None:
    theirs = of_peft(name, tmp_path / "theirs", peft.AdaLoraConfig, **schedule(lora_alpha=alpha, r=8))
    ours = load_peft(stock(name), tmp_path / "theirs").eval()
    expected = outputs(name, theirs)
    differs(name, ours)
    close(outputs(name, ours), expected)
    assert ours.injection.adapter == ADAPTERS["adalora"](
        rank=6, alpha=float(alpha or 6), targets=IN_OURS[name], target_rank=3, initial_warmup=1 / 6,
        final_tuning=2 / 6, interval=1, orthogonality=0.1,
    )  # fmt: skip
    save(ours, tmp_path / "ours.safetensors")
    assert torch.equal(outputs(name, load(stock(name), tmp_path / "ours.safetensors").eval()), outputs(name, ours))
    export_peft(ours, tmp_path / "back")
    close(outputs(name, peft.PeftModel.from_pretrained(stock(name), tmp_path / "back").eval()), expected)
    close(outputs(name, merge(ours)), expected)
    close(outputs(name, theirs.merge_and_unload()), expected)


@needs_adalora
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
    close(outputs("bert", ours), outputs("bert", theirs))
    for name, mask in kept.items():
        (branch,) = ours.get_submodule(name.removesuffix(".lora_E")).branches.values()
        assert branch.alive.tolist() == mask and branch.E.shape[0] == 6
        assert torch.equal(branch.E.flatten() != 0, branch.alive)


LOW_RANK = [method for method, kind in ADAPTERS.items() if hasattr(kind, "stored_subspaces") and not kind.not_mergeable]


@pytest.mark.parametrize("method", LOW_RANK)
@pytest.mark.parametrize("name", ["bert", "timm"])
def test_every_low_rank_adapter_is_exported(name: str, method: str, tmp_path: Path) -> None:
    ours = shaken(inject(stock(name), ADAPTERS[method](rank=3), train=(HEAD[name],)))  # type: ignore[call-arg]
    differs(name, ours)
    export_peft(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(stock(name), tmp_path / "out").eval()
    close(outputs(name, theirs), outputs(name, ours))


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


@pytest.mark.parametrize("own", [False, True])
def test_open_clip_as_far_as_peft_can(own: bool, tmp_path: Path) -> None:
    from backbones import build, inputs

    name = "clip, own attention" if own else "clip"
    ours, x = build(name), inputs(name)
    targets = ("o", "fc1", "fc2") if own else ("fc1", "fc2")
    shaken(inject(ours, LoRA(rank=2, targets=targets), train=("head",)))
    export_peft(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "out").eval()
    close(theirs(*x), ours(*x))
    close(load_peft(build(name), tmp_path / "out").eval()(*x), ours(*x))
    for targets in (("q", "fc1"),) if own else (("v",), ("o", "fc1")):
        with pytest.raises(
            ValueError, match=rf"PEFT cannot express .*attn.*\.{targets[0]}.* save the adapter with save"
        ):
            export_peft(inject(build(name), LoRA(targets=targets)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    def refused(model: nn.Module, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            export_peft(model, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    refused(stock("bert"), "holds no adapter")
    refused(merge(inject(stock("bert"), LoRA())), "holds no adapter")
    refused(inject(stock("bert"), Linear(), train=("classifier",)), "linear has no low-rank update")
    refused(inject(stock("timm"), LoRA(), train=("cls_token",)), "'cls_token' is a Parameter")
    refused(inject(stock("timm"), LoRA(), train=("norm",)), "'norm' would mean patch_embed.norm, blocks.0.attn.q_norm")
    refused(inject(stock("timm"), LoRA(), train=("blocks.1",)), r"not adapt .* blocks.1.attn.qkv is, by train=")
    refused(inject(stock("timm"), LoRA(targets="blocks.0.*q$"), train=("blocks",)), "'blocks' is a Sequential|is, by")
    free = inject(stock("timm"), LoRA())
    free.norm.weight.requires_grad_(True)
    refused(free, "lora trains norm.weight, which is no low-rank update")


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    model = inject(stock("vit"), LoRA())
    (tmp_path / "empty").mkdir()
    export_peft(model, tmp_path / "empty")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_peft(model, tmp_path / "empty")
    export_peft(model, tmp_path / "in" / "depth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "in"]
    assert json.loads((tmp_path / "in" / "depth" / "adapter_config.json").read_text())["r"] == 8


def test_patterns_are_exact() -> None:
    layers = [f"a.{i}.{end}" for i in range(12) for end in ("q", "q.x", "v")]
    among = [*layers, "b.a.1.q", "q", "ax1xq"]
    for names, pattern in (
        ([n for n in layers if n.endswith(".q")], r"^(?:a\.\d+\.q)$"),
        (["a.1.q", "a.10.q"], r"^(?:a\.(?:1|10)\.q)$"),
        (["a.1.q", "a.2.v"], r"^(?:a\.1\.q|a\.2\.v)$"),
        (["q"], "^(?:q)$"),
    ):
        assert exact_pattern(names, among) == pattern
    uneven = [f"s.{i}.b.{j}" for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert exact_pattern(uneven[:3], uneven) == r"^(?:s\.0\.b\.0|s\.0\.b\.1|s\.1\.b\.0)$"
