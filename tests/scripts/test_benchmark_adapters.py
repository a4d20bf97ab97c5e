"""The benchmark of the adapters: tiny ones from options to page, and rows that are measured anew. No time is tested."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/benchmark.py`

import benchmark
import benchmarks.adapted_models as adapted_models
import benchmarks.adapters as adapters_subject


def test_a_tiny_benchmark_of_the_adapters_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, which spares the imports; only resident memory, which is not looked at, needs fresh ones."""
    monkeypatch.setattr(adapters_subject, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(adapters_subject, "bfloat16_speed", lambda: 0.1)
    monkeypatch.setattr(adapters_subject, "WARM_UP", 0)  # no time is looked at
    options = "--tiny --backbones vit vit_transformers --methods lora dtl --batch 1 --pairs 1 --few-pairs 1"
    options += " --paper-batch 2 --paper-rounds 2 --small-rounds 1 --merged-pairs 1 --threads 1"
    benchmark.main(["adapters", *options.split(), "--output", str(tmp_path)])
    found = json.loads((tmp_path / "adapters.json").read_text(encoding="utf-8"))["rows"]
    rows = {row["method"]: row for row in found if row["part"] == "methods"}
    assert list(rows) == ["full", "PEFT's LoRA", "lora", "dtl"]
    blocks, width = 2, 768
    assert rows["lora"]["trained"] == blocks * 3 * 8 * 2 * width
    assert rows["PEFT's LoRA"]["trained"] == blocks * 8 * (width + 3 * width)
    assert len(rows["dtl"]["time_ratios"]) == 1 and not rows["full"]["time_ratios"]
    assert rows["lora"]["counts"]["flops"] < rows["full"]["counts"]["flops"]

    compared = {(row["backbone"], *row["layers"], row["batch"]): row for row in found if row["part"] == "peft"}
    layers = [("vit", "q", "k", "v"), ("vit", "o", "fc1", "fc2"), ("vit_transformers", "q", "k", "v")]
    assert list(compared) == [(*each, batch) for each in layers for batch in (2, 1)]
    for (*_, batch), row in compared.items():
        assert len(row["time_ratios"]) == len(row["without_lora"]) == batch  # --paper-rounds and --small-rounds
    fused = compared["vit", "q", "k", "v", 1]
    assert fused["trained"] == [rows["lora"]["trained"], rows["PEFT's LoRA"]["trained"]]
    wider = fused["wider_peft"]
    assert (wider["rank"], wider["trained"]) == (12, fused["trained"][0])
    assert fused["peak_bytes"][1] < fused["peak_bytes"][0] <= wider["peak_bytes"]
    for same, number in ((layers[1], blocks * 8 * (2 * width + 2 * 5 * width)), (layers[2], rows["lora"]["trained"])):
        assert compared[*same, 1]["trained"] == [number, number]
        assert compared[*same, 2]["peak_bytes"][0] > compared[*same, 1]["peak_bytes"][0]
        assert compared[*same, 2]["peak_bytes"][0] <= compared[*same, 2]["peak_bytes"][1]
        assert "wider_peft" not in compared[*same, 1]
    page = (tmp_path / "adapters.md").read_text(encoding="utf-8")
    assert "| ViT-B/16 of transformers: q, k, v | 2 images, float32 | 73,728 / 73,728 | 2 | x " in page
    assert "| ViT-B/16, 224 px: q, k, v | 1 images, float32 | 73,728 / 49,152 | 1 | x " in page
    ratio = f"{fused['peak_bytes'][0] / wider['peak_bytes']:.4f}"
    assert f"; PEFT's rank 12, 73,728 parameters: x {ratio} | no; yes |" in page
    assert page.count("| ViT-B/16, 224 px | 1 images, float32 | 1 | x ") == 2  # over full fine-tuning, and merged
    assert {row["precision"] for row in found} == {"float32"}  # bfloat16 is too slow here, by the patch above


def test_a_row_that_is_measured_anew_takes_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapters_subject, "bfloat16_speed", lambda: 1.0)
    monkeypatch.setattr(adapters_subject, "WARM_UP", 0)
    options = f"adapters --tiny --backbones vit --threads 1 --output {tmp_path}"

    def measured(more: str) -> dict[str, Any]:
        benchmark.main([*options.split(), *more.split()])
        numbers: dict[str, Any] = json.loads((tmp_path / "adapters.json").read_text(encoding="utf-8"))
        return numbers

    merged = "--parts merged --batch 1 --precisions"
    first = measured(f"{merged} float32 --merged-pairs 1")
    second = measured(f"{merged} bfloat16 --merged-pairs 2")
    assert [len(row["time_ratios"]) for row in first["rows"]] == [1]
    assert second["rows"][0] == first["rows"][0] and second["runs"][0] == first["runs"][0]
    assert [len(row["time_ratios"]) for row in second["rows"]] == [1, 2]
    assert [row["run"] for row in second["rows"]] == [1, 2] and len(second["runs"]) == 2
    third = measured(f"{merged} float32 --merged-pairs 3")
    assert [len(row["time_ratios"]) for row in third["rows"]] == [3, 2]
    assert [third["runs"][row["run"] - 1]["merged_pairs"] for row in third["rows"]] == [3, 2] and len(
        third["runs"]
    ) == 2

    against_peft = "--parts peft --precisions bfloat16 --batches small --batch 1 --small-rounds"
    both = measured(f"{against_peft} 1")["rows"][2:]
    one = measured(f"{against_peft} 2 --layers q k v")["rows"][2:]
    assert [row["layers"] for row in both] == [row["layers"] for row in one] == [["q", "k", "v"], ["o", "fc1", "fc2"]]
    for row, number in zip(one, (2, 1), strict=True):
        assert row["batch"] == 1
        assert [len(row[times]) for times in ("time_ratios", "adapter_alone", "without_lora")] == [number] * 3
    assert [row["run"] for row in one] == [4, 3] and one[1] == both[1]
    with pytest.raises(SystemExit, match="2"):
        measured(f"{against_peft} 1 --layers q v")
    assert "layers are q v; expected one of: q k v, o fc1 fc2" in capsys.readouterr().err
    page = (tmp_path / "adapters.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith(("| ViT", "1. ", "2. ", "3. ", "4. "))]
    assert [line.split(" | ")[1] for line in lines[:4]] == [f"1 images, {each}" for each in
                                                          ("bfloat16", "bfloat16", "float32", "bfloat16")]  # fmt: skip
    assert [line.rpartition(" | ")[2] for line in lines[:4]] == ["4 |", "3 |", "2 |", "1 |"] and len(lines) == 8

    (tmp_path / "adapters.json").write_text('{"merged": {"rows": []}}', encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        measured("")
    assert "does not hold runs and rows: remove it" in capsys.readouterr().err


def test_a_stopped_run_keeps_the_rows_that_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = adapters_subject.one_merged_against_stock

    def stopped_at_bert(name: str, *others: Any) -> dict[str, Any]:
        if name == "bert":
            raise KeyboardInterrupt
        return measure(name, *others)

    monkeypatch.setattr(adapters_subject, "one_merged_against_stock", stopped_at_bert)
    options = f"adapters --tiny --parts merged --precisions float32 --batch 1 --merged-pairs 1 --output {tmp_path}"
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(options.split())
    numbers = json.loads((tmp_path / "adapters.json").read_text(encoding="utf-8"))
    assert [(row["backbone"], row["run"]) for row in numbers["rows"]] == [("vit", 1)] and len(numbers["runs"]) == 1
    assert "| ViT-B/16, 224 px | 1 images, float32 | 1 | x " in (tmp_path / "adapters.md").read_text(encoding="utf-8")


def test_methods_with_two_batches_have_a_table_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each over the full fine-tuning of its own batch."""
    monkeypatch.setattr(adapters_subject, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(adapters_subject, "WARM_UP", 0)
    options = "adapters --tiny --parts methods --precisions float32 --backbones vit --methods lora --few-pairs 1"
    for batch in (1, 2):
        benchmark.main([*options.split(), "--batch", str(batch), "--threads", "1", "--output", str(tmp_path)])
    page = (tmp_path / "adapters.md").read_text(encoding="utf-8")
    for heading in ("### ViT-B/16, 224 px: 1 images", "### ViT-B/16, 224 px: 2 images"):
        table = page.partition(f"{heading}\n\n")[2].partition("\n\n")[0].splitlines()[2:]
        assert [line.split(" | ")[0] for line in table] == ["| full", "| PEFT's LoRA", "| lora"]
        memory, flops = table[0].split(" | ")[4:6]
        assert memory.endswith("x 1.000") and flops == "x 1.0000"


@pytest.mark.parametrize("pair", adapted_models.PAIRS, ids=lambda pair: f"{pair.backbone} {'-'.join(pair.targets)}")
def test_a_step_without_lora_differs_by_the_products_of_lora_alone(pair: adapted_models.Pair) -> None:
    """In exact FLOPs, so the gradient passes through the same frozen maps."""
    with_it, without = (
        adapted_models.step(make(pair, tiny=True), pair.backbone, batch=1).count().flops
        for make in (adapted_models.with_lora, adapted_models.without_lora)
    )
    tokens, rank = (4 * 32 if pair.backbone == "bert" else 197), 8
    d_in = {"fc2": 3072}
    d_out = {"fc1": 3072}
    expected = 0
    for block in range(2):
        for target in pair.targets:
            first = block == 0 and target not in ("fc1", "fc2")  # its input needs no gradient
            down, up = (2 * tokens * rank * width.get(target, 768) for width in (d_in, d_out))
            fused = pair.modules == ("qkv",)  # whose activations are computed twice
            expected += (2 + fused if first else 3 + fused) * down + 3 * up
    assert with_it - without == expected
