"""Towers and blocks of every architecture, at any depth of a model."""

from __future__ import annotations

import pytest
from backbones import build
from torch import nn

from adapters.towers import find_towers

EXPECTED = {
    "bert": [("backbone", "bert", [32, 32, 32])],
    "clip": [("backbone", "clip_text", [24, 24, 24]), ("backbone.visual", "clip_vision", [32, 32, 32])],
    "vit": [("backbone", "vit", [32, 32, 32])],
    "swin": [("backbone", "swin", [16, 16, 32, 32])],
    "convnext": [("backbone", "convnext", [8, 16, 24, 24, 32])],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_towers(name: str) -> None:
    model = build(name)
    towers = find_towers(model)
    assert [(t.name, t.kind, [block.width for block in t.blocks]) for t in towers] == EXPECTED[name]
    for tower in towers:
        assert model.get_submodule(tower.name) is tower.module
        for block in tower.blocks:
            assert model.get_submodule(block.name) is block.module
    bare = find_towers(model.backbone)
    assert [t.kind for t in bare] == [t.kind for t in towers]


def test_stages() -> None:
    (tower,) = find_towers(build("convnext"))
    assert [[block.width for block in stage] for stage in tower.stages()] == [[8], [16], [24, 24], [32]]


def test_two_models_in_one_and_blocks_that_were_cut_from_theirs() -> None:
    vit = build("vit").backbone
    end = nn.Module()
    end.blocks = nn.ModuleDict({"1": vit.blocks[1], "2": vit.blocks[2]})
    towers = find_towers(nn.ModuleDict({"text": build("bert"), "image": end}))
    assert [(t.name, [block.name for block in t.blocks]) for t in towers] == [
        ("text.backbone", [f"text.backbone.encoder.layer.{i}" for i in range(3)]),
        ("image", ["image.blocks.1", "image.blocks.2"]),
    ]


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="prefix works on towers of kind bert, but Image holds vit"):
        find_towers(build("vit"), ("bert",), "prefix")
    with pytest.raises(ValueError, match="none that is known"):
        find_towers(nn.Linear(2, 2))
