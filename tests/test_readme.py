"""The README's examples run as they are printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # as for `python scripts/train_retrieval.py`

from command_line import compose

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def example(containing: str) -> str:
    (found,) = (text for text in EXAMPLES if containing in text)
    assert len(found.splitlines()) <= 12
    return found


def test_several_processes_have_the_batch_of_the_recipe() -> None:
    (found,) = re.findall(r"^torchrun --nproc_per_node (\d+) scripts/train_retrieval\.py (.*?)  ", README, re.MULTILINE)
    overrides = found[1].split()
    recipe, each = (compose("train_retrieval", some)["trainer"]["batch_size"] for some in (overrides[:1], overrides))
    assert int(found[0]) * each == recipe == 128


def test_the_adapter_and_then_the_regularizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = example("merge(model)")
    assert adapter.index("from adapters") < adapter.index("import timm"), "fails where torch is a CPU build"
    exec(adapter, {})
    printed = capsys.readouterr().out.strip()
    assert f"print(trainable_parameters(model))  # {int(printed):,}:" in adapter
    assert (tmp_path / "adapter.safetensors").is_file()

    import timm

    from adapters import LoRA, inject

    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5)
    names: dict[str, Any] = {
        "model": inject(model, LoRA(), train=("head",)), "criterion": nn.CrossEntropyLoss(),
        "images": torch.randn(2, 3, 224, 224), "labels": torch.tensor([0, 3]),
    }  # fmt: skip
    exec(example("resora.capture"), names)
    assert 0 < float(capsys.readouterr().out) < 1
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith(".A"))
