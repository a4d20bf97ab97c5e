"""FacT against W + s V M U computed on its own, the layers' formulas, and the published counts."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES, build, inputs
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from adapters import (
    ADAPTERS,
    FacTTK,
    FacTTT,
    adapter_table,
    inject,
    merge,
    save,
    stored_subspaces,
    trainable_parameters,
)
from adapters.base import Branched
from adapters.extend import Extension
from adapters.fact import FacTBranch
from regularizers import capture

D, RANK, SCALE, DEPTH = 32, 3, 0.5, 3
METHODS = ("fact_tt", "fact_tk")


def injected(method: str, backbone: str = "vit", **settings: Any) -> nn.Module:
    torch.manual_seed(2)
    return inject(build(backbone), ADAPTERS[method](**{"rank": RANK, "scale": SCALE} | settings))


def filled(method: str, backbone: str = "vit", **settings: Any) -> nn.Module:
    """With values, as if trained."""
    model = injected(method, backbone, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith(".V"):
            nn.init.normal_(parameter, std=0.2)
    return model


def branched(model: nn.Module) -> dict[str, Branched]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Branched)}


def branch(model: nn.Module, layer: str, role: str) -> Any:
    return model.get_submodule(f"{layer}.branches.{role}")


def matrices(part: Any) -> list[Tensor]:
    """A branch's S_c, (r, r) each, which are multiplied from the right."""
    if hasattr(part, "S"):
        return list(part.S.detach().T.split(RANK))
    return [torch.einsum("ijp,p->ij", part.shared.C, column).detach() for column in part.P.T]


def v_m_u(part: Any) -> list[Tensor]:
    """dW (d, d) of each of the branch's blocks of inputs, in the convention of an nn.Linear's weight."""
    u, v = part.shared.U.detach(), part.shared.V.detach()
    return [SCALE * v @ s.T @ u for s in matrices(part)]


def add_updates(stock: nn.Module, adapted: nn.Module) -> None:
    """W + dW in every layer of the stock ViT, by rows and columns."""
    for i in range(DEPTH):
        block = f"backbone.blocks.{i}"
        weight = {name: stock.get_submodule(f"{block}.{name}").weight.data for name in
                  ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}  # fmt: skip
        for k, role in enumerate("qkv"):
            weight["attn.qkv"][k * D : (k + 1) * D] += v_m_u(branch(adapted, f"{block}.attn.qkv", role))[0]
        weight["attn.proj"] += v_m_u(branch(adapted, f"{block}.attn.proj", "o"))[0]
        for k in range(4):
            columns = v_m_u(branch(adapted, f"{block}.mlp.fc2", "fc2"))
            weight["mlp.fc1"][k * D : (k + 1) * D] += v_m_u(branch(adapted, f"{block}.mlp.fc1", f"fc1_{k}"))[0]
            weight["mlp.fc2"][:, k * D : (k + 1) * D] += columns[k]


@pytest.mark.parametrize("method", METHODS)
def test_merging_adds_v_m_u_by_rows_and_columns(method: str) -> None:
    model, stock, x = filled(method), build("vit"), inputs("vit")
    before = stock(*x)
    add_updates(stock, model)
    assert (stock(*x) - before).abs().max() > 0.01
    torch.testing.assert_close(model(*x), stock(*x), atol=1e-5, rtol=1e-5)
    merge(model)
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", ["model", "injected"])
def test_bfloat16_keeps_what_is_shared_and_merges_in_float32(method: str, when: str) -> None:
    if when == "model":  # was in bfloat16 before
        torch.manual_seed(2)
        model = inject(build("vit").bfloat16(), ADAPTERS[method](rank=RANK, scale=SCALE))  # type: ignore[call-arg]
    else:
        model = injected(method).bfloat16()
    nn.init.normal_(branch(model, "backbone.blocks.0.attn.qkv", "q").shared.V, std=0.2)
    assert len({id(b.shared) for m in branched(model).values() for b in m.branches.values()}) == 1  # type: ignore[attr-defined]
    stock = build("vit").bfloat16().float()
    add_updates(stock, copy.deepcopy(model).float())
    merge(model)
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter.bfloat16(), atol=0, rtol=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_captured_subspaces_are_the_formulas_of_all_six_sites(method: str) -> None:
    model, seen = filled(method), {}
    hooks = [layer.register_forward_pre_hook(lambda layer, args: seen.update({layer: args[0].detach()}))
             for layer in branched(model).values()]  # fmt: skip
    with capture(model) as subspaces:
        model(*inputs("vit"))
    for hook in hooks:
        hook.remove()
    assert len(subspaces) == DEPTH * 9 and len(seen) == DEPTH * 4
    for name, layer in branched(model).items():
        x = seen[layer].reshape(-1, seen[layer].shape[-1])
        for role, part in layer.branches.items():
            u, v, s = part.shared.U, part.shared.V, torch.cat(matrices(part))  # type: ignore[union-attr]
            blocks = x.view(len(x), -1, D)  # (N, 4, d) of fc2's inputs
            expected = SCALE * ((blocks @ u.T).reshape(len(x), -1) @ s) @ v.T
            pair = subspaces[f"{name}.{role}"]
            assert pair.activations.shape == (len(x), RANK) and pair.basis.shape == (RANK, D)
            torch.testing.assert_close(pair.activations @ pair.basis, expected, atol=1e-5, rtol=1e-5)
            bare = nn.functional.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
            start, stop = layer.slices[role]
            difference = (layer(x) - bare)[:, start:stop]
            torch.testing.assert_close(difference, expected, atol=1e-5, rtol=1e-5)


def vit_b() -> nn.Module:
    return _timm("vit_base_patch16_224")


def swin_b() -> nn.Module:
    return _timm("swin_base_patch4_window7_224")


def convnext_b() -> nn.Module:
    return _timm("convnext_base")


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=0)


def bert_base() -> nn.Module:
    return BertModel(BertConfig())


def clip_b32() -> nn.Module:
    from open_clip import create_model

    return create_model("ViT-B-32", device="meta")


@pytest.mark.parametrize(
    ("model", "adapter", "count"),
    [
        (vit_b, FacTTT(rank=4), 8_448),
        (vit_b, FacTTT(rank=8), 21_504),
        (vit_b, FacTTT(), 61_440),
        (vit_b, FacTTK(rank=8), 13_952),
        (vit_b, FacTTK(rank=16), 30_976),
        (vit_b, FacTTK(), 86_528),
        (swin_b, FacTTK(rank=8), 35_072),
        (swin_b, FacTTK(rank=16), 82_432),
        (swin_b, FacTTK(rank=32), 263_168),
        (bert_base, FacTTT(rank=60), 610_560),
        (bert_base, FacTTK(rank=80), 646_400),
        (clip_b32, FacTTT(rank=48), 786_432),
        (convnext_b, FacTTK(rank=8), 4 * 8**3 + 2 * 8 * 1920 + 8 * 36 * 8),  # 36 blocks, widths 128 to 1024
    ],
)
def test_published_counts(model: Callable[[], nn.Module], adapter: FacTTT | FacTTK, count: int) -> None:
    with torch.device("meta"):
        backbone = model()
    assert trainable_parameters(inject(backbone, adapter)) == count


def test_initial_values() -> None:
    def check(values: Tensor, bound: float) -> None:
        assert 0.9 * bound < values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)  # of a uniform distribution

    tt, tk = injected("fact_tt", rank=12), injected("fact_tk", rank=12)
    for model in (tt, tk):
        shared = branch(model, "backbone.blocks.0.attn.qkv", "q").shared
        check(shared.U, 1 / math.sqrt(D))
        assert not shared.V.any()
    check(branch(tt, "backbone.blocks.1.attn.qkv", "v").S, 1 / math.sqrt(12))
    check(branch(tt, "backbone.blocks.1.mlp.fc1", "fc1_3").S, 1 / math.sqrt(12))
    check(branch(tt, "backbone.blocks.1.mlp.fc2", "fc2").S, 1 / math.sqrt(48))
    check(shared.C, math.sqrt(6 / (2 * 12**2)))
    columns = [p for name, p in tk.named_parameters() if name.endswith(".P")]
    check(torch.cat(columns, dim=1), math.sqrt(6 / (12 + 12 * DEPTH)))
    assert sum(p.shape[1] for p in columns) == 12 * DEPTH

    convnext = injected("fact_tk", "convnext", rank=12)  # depths 1, 1, 2, 1
    for stage, depth in enumerate((1, 1, 2, 1)):
        of_stage = [p for n, p in convnext.named_parameters() if f"stages.{stage}." in n and n.endswith(".P")]
        check(torch.cat(of_stage, dim=1), math.sqrt(6 / (12 + 8 * depth)))
        assert sum(p.shape[1] for p in of_stage) == 8 * depth


# What one U and V are shared by: one set for each pattern.
LISTS = {
    "bert": ["encoder.layer"],
    "vit": ["blocks"],
    "swin": ["layers.0", "layers.1"],
    "convnext": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "clip": ["visual", r"backbone\.transformer"],
    "clip, own attention": ["visual", r"backbone\.transformer"],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_one_list_of_blocks_shares_its_factors_also_in_copies_and_files(
    method: str, backbone: str, tmp_path: Path
) -> None:
    model = filled(method, backbone)
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")  # replaces every parameter
    for twin in (model, copy.deepcopy(model), moved):
        found = [
            {
                id(parameter)
                for name, module in branched(twin).items()
                if re.search(pattern, name)
                for part in module.branches.values()
                for parameter in part.shared.parameters()  # type: ignore[union-attr]
            }
            for pattern in LISTS[backbone]
        ]
        count = 2 if method == "fact_tt" else 3  # U, V and C
        assert [len(ids) for ids in found] == [count] * len(LISTS[backbone])
        assert len(set().union(*found)) == count * len(LISTS[backbone])
        assert trainable_parameters(twin) == trainable_parameters(model)

    check_file(model, tmp_path / "a.safetensors")


def check_file(model: nn.Module, path: Path) -> None:
    """It holds one copy of what is shared, and tells every layer's update without the model."""
    save(model, path)
    assert sum(tensor.numel() for tensor in load_file(path).values()) == trainable_parameters(model)
    stored = stored_subspaces(path)
    live = {f"{name}.{role}": m.weight_subspaces(role) for name, m in branched(model).items() for role in m.roles}
    assert set(stored) == set(live) and stored.rest == ()
    for name, pair in live.items():
        assert pair[1].any()
        for ours, theirs in zip(stored[name], pair, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_towers_of_one_width_have_factors_of_their_own(tmp_path: Path) -> None:
    from open_clip.model import CLIP

    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
    clip = CLIP(16, vision, {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2})
    inject(clip, FacTTT(rank=RANK))
    assert trainable_parameters(clip) == 2 * (2 * 32 * RANK + 2 * 12 * RANK**2)
    for name, parameter in clip.named_parameters():
        if name.endswith(".V"):
            nn.init.normal_(parameter)
    check_file(clip, tmp_path / "a.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_the_table_counts_shared_parameters_once(method: str) -> None:
    lines = [line.split() for line in adapter_table(injected(method)).splitlines()[1:]]
    counts = [int(line[-1].replace(",", "")) for line in lines]
    assert sum(counts[:-1]) == counts[-1] and len(lines) == 1 + 9 * DEPTH
    own = RANK**2 if method == "fact_tt" else RANK
    core = 0 if method == "fact_tt" else RANK**3
    assert counts[:3] == [2 * D * RANK + core + own, own, own]  # q, with all that is shared, k and v
    assert all(line[-2] == str(RANK) for line in lines[:-1])


def test_dropout_acts_on_the_activations_in_training_only() -> None:
    model = filled("fact_tt", dropout=0.5).train()
    with capture(model) as training:
        model(*inputs("vit"))
    dropped = torch.cat([pair.activations.flatten() for pair in training.values()]) == 0
    assert dropped.float().mean() == pytest.approx(0.5, abs=0.05)
    with capture(model.eval()) as evaluation:
        model(*inputs("vit"))
    first = "backbone.blocks.0.attn.qkv.q"  # its input is the same in both
    kept = training[first].activations != 0
    torch.testing.assert_close(training[first].activations[kept], 2 * evaluation[first].activations[kept])
    assert all(pair.activations.all() for pair in evaluation.values())


def test_dropout_does_not_form_the_factors_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[FacTBranch] = []
    factors = FacTBranch.factors
    monkeypatch.setattr(FacTBranch, "factors", lambda branch: formed.append(branch) or factors(branch))
    model = filled("fact_tk", dropout=0.5).train()
    model(*inputs("vit"))
    assert formed and len(formed) == len(set(formed)) == sum(isinstance(m, FacTBranch) for m in model.modules())


def vit(mlp_ratio: float) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=D, num_heads=4, depth=2, num_classes=0, mlp_ratio=mlp_ratio
    ).eval()


@pytest.mark.parametrize("method", METHODS)
def test_an_mlp_of_another_ratio(method: str) -> None:
    model, x = inject(vit(2), ADAPTERS[method](rank=RANK)), torch.randn(2, 3, 32, 32)  # type: ignore[call-arg]
    assert tuple(model.blocks[0].mlp.fc1.branches) == ("fc1_0", "fc1_1")
    nn.init.normal_(branch(model, "blocks.0.attn.qkv", "q").shared.V)
    expected = model(x)
    torch.testing.assert_close(merge(model)(x), expected, atol=1e-5, rtol=1e-5)

    model = vit(2.5)
    with pytest.raises(ValueError, match=rf"{method} cuts .* 32, but blocks.0.mlp.fc1.fc1 maps 32 to 80 channels"):
        inject(model, ADAPTERS[method]())
    assert not any(isinstance(module, Extension) for module in model.modules())


def test_blocks_without_their_model_are_adapted() -> None:
    """What `classification` trains: the last blocks of a ViT, under their numbers in the whole."""
    blocks = dict(vit(4).blocks.named_children())
    model = nn.ModuleDict({"blocks": nn.ModuleDict({f"1{number}": block for number, block in blocks.items()})})
    assert trainable_parameters(inject(model, FacTTT(rank=RANK))) == 2 * D * RANK + 2 * 12 * RANK**2


def test_what_cannot_be_adapted_is_refused() -> None:
    for method in METHODS:
        for settings in ({"rank": 0}, {"scale": 0.0}, {"dropout": 1.0}):
            with pytest.raises(ValueError, match=f"{method} needs rank >= 1, scale > 0 and 0 <= dropout < 1"):
                ADAPTERS[method](**settings)
        with pytest.raises(ValueError, match=f"{method} works on the blocks of .* but Sequential has no"):
            inject(nn.Sequential(nn.Linear(3, 3)), ADAPTERS[method]())
    model = vit(4)
    model.blocks[1].attn.proj = nn.Linear(2 * D, 2 * D)
    with pytest.raises(ValueError, match=r"fact_tt shares factors .* 'blocks.'.* one width, but have \[32, 64\]"):
        inject(model, FacTTT())
