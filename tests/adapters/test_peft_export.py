"""To PEFT: what is exported runs there, with equal outputs, or is refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from backbones import build, inputs
from peft_models import BACKBONES, HEAD, IMAGES, IN_OURS, assert_close, differs, outputs, shaken, stock
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters import ADAPTERS, Linear, LoRA, export_peft, inject, load, load_peft, merge, save
from adapters.patterns import exact_pattern

pytestmark = pytest.mark.filterwarnings("ignore:.*fused layers:UserWarning")


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
    assert_close(outputs(name, theirs), outputs(name, ours))

    adapted = {n: m for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    branched = {n: m.roles for n, m in ours.named_modules() if hasattr(m, "roles")}
    assert {n.removeprefix("base_model.model."): m.r["default"] for n, m in adapted.items()} == {
        n: 3 * len(roles) for n, roles in branched.items()
    }
    assert_close(outputs(name, theirs.merge_and_unload()), outputs(name, ours))
    back = load_peft(stock(name), tmp_path / "out").eval()
    assert_close(outputs(name, back), outputs(name, ours))
    assert back.injection.adapter.dropout == 0.1
    assert_close(outputs(name, merge(ours)), outputs(name, back))


@pytest.mark.parametrize("name", ["bert", "timm"])
def test_exported_ranks_by_layer(name: str, tmp_path: Path) -> None:
    """Also ranks that differ within one fused layer, whose scales then differ too."""
    adapter = LoRA(rank=3, alpha=5.0, targets=IN_OURS[name], rank_pattern={r"0\..*\.q$": 2, "fc1": 5})
    ours = shaken(inject(stock(name), adapter))
    export_peft(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(stock(name), tmp_path / "out").eval()
    assert_close(outputs(name, theirs), outputs(name, ours))
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
    assert_close(outputs(name, theirs), outputs(name, ours))
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_peft(stock(name), tmp_path / "theirs").eval()
    assert_close(outputs(name, back), outputs(name, ours))
    save(back, tmp_path / "back.safetensors")
    assert torch.equal(outputs(name, load(stock(name), tmp_path / "back.safetensors").eval()), outputs(name, back))


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
    assert_close(theirs(IMAGES), model(IMAGES))
    back = load_peft(first, tmp_path / "out").eval()
    assert_close(back(IMAGES), model(IMAGES))
    assert not torch.equal(back.top[1].running_mean, torch.zeros(4))


LOW_RANK = [method for method, kind in ADAPTERS.items() if hasattr(kind, "stored_subspaces") and not kind.not_mergeable]


@pytest.mark.parametrize("method", LOW_RANK)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_low_rank_adapter_is_exported(name: str, method: str, tmp_path: Path) -> None:
    ours = shaken(inject(stock(name), ADAPTERS[method](rank=3), train=(HEAD[name],)))  # type: ignore[call-arg]
    differs(name, ours)
    export_peft(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(stock(name), tmp_path / "out").eval()
    assert_close(outputs(name, theirs), outputs(name, ours))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        export_peft(ours, tmp_path / "again")
    both = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("out", "again")]
    assert both[0].keys() == both[1].keys() and all(torch.equal(both[1][name], t) for name, t in both[0].items())


@pytest.mark.parametrize("own", [False, True])
def test_open_clip_as_far_as_peft_can(own: bool, tmp_path: Path) -> None:
    name = "clip, own attention" if own else "clip"
    ours, x = build(name), inputs(name)
    targets = ("o", "fc1", "fc2") if own else ("fc1", "fc2")
    shaken(inject(ours, LoRA(rank=2, targets=targets), train=("head",)))
    export_peft(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "out").eval()
    assert_close(theirs(*x), ours(*x))
    assert_close(load_peft(build(name), tmp_path / "out").eval()(*x), ours(*x))
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
