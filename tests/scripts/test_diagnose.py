"""`diagnose.py`: its numbers against NumPy on the stored tensors, its figures, and its answers to what does not fit."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import cast

import hydra
import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

from adapters import Linear, LoRA, inject, save
from eval.figures import LIGHT, redundancy_figure
from regularizers.diagnostics import mean_off_diagonal

ROOT = Path(__file__).parent.parent.parent
LAYER = "encoder.layer.1.attention.self.value.v"


@pytest.fixture(scope="module")
def diagnose() -> ModuleType:
    """The command as a module: a process of its own takes seconds of imports for each test."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import diagnose

        return diagnose
    finally:
        sys.path.pop(0)


def adapter_file(path: Path, rank: int = 4, common: float = 1.0, seed: int = 0) -> Path:
    """A saved LoRA on a tiny BERT whose rows of A have a part in `common`, so that they are redundant."""
    torch.manual_seed(seed)
    bert = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    inject(bert, LoRA(rank=rank, alpha=3.0, targets=("q", "v")), train=("pooler",))
    for name, parameter in bert.named_parameters():
        if ".branches." in name:
            nn.init.normal_(parameter)
        if name.endswith(".A"):
            parameter.data += common * torch.randn(1, 16)
    save(bert, path)
    return path


def table(text: str) -> dict[str, list[str]]:
    """The printed lines of layers and of the mean, by their first word."""
    lines = [line.split() for line in text.splitlines()]
    return {words[0]: words[1:] for words in lines if len(words) == 5}


def test_the_numbers_are_those_of_numpy(
    diagnose: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = adapter_file(tmp_path / "lora.safetensors")
    tensors = load_file(path)
    dead = f"{LAYER.removesuffix('.v')}.branches.v.B"
    tensors[dead][:, 2] = 0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)

    diagnose.main(diagnose.parse([str(path), "--csv", "table.csv"]))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}, on weights\n")
    assert "2 tensors that are no low-rank part of a linear layer: pooler.dense.bias, pooler.dense.weight" in printed
    rows = {row["layer"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert len(rows) == 4 and all(row["on"] == "weights" and row["rank"] == "4" for row in rows.values())
    shown = table(printed)
    for layer, row in rows.items():
        stem, role = layer.rsplit(".", 1)
        a, b = (tensors[f"{stem}.branches.{role}.{factor}"].double().numpy() for factor in "AB")
        unit = a / np.linalg.norm(a, axis=1, keepdims=True)
        cosine = np.abs(unit @ unit.T)[np.triu_indices(4, 1)].mean()
        values = np.linalg.svd(b @ a, compute_uv=False)[:4]
        share = values[values > 1e-12 * values[0]] / values.sum()
        assert float(row["redundancy"]) == pytest.approx(cosine, abs=1e-6)
        assert float(row["effective_rank"]) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
        assert int(row["dead"]) == (1 if layer == LAYER else 0)
        assert shown[layer] == [f"{cosine:.3f}", f"{float(row['effective_rank']):.2f}", row["dead"], "4"]
    mean = {key: np.mean([float(row[key]) for row in rows.values()]) for key in ("redundancy", "effective_rank")}
    assert shown["mean"] == [f"{mean['redundancy']:.3f}", f"{mean['effective_rank']:.2f}", "0.25", "4.00"]
    assert "redundancy.png (1 of 4 layers, on weights)" in printed  # here, in the current folder
    assert Image.open(tmp_path / "redundancy.png").size[0] > 500


def test_two_adapters_side_by_side(
    diagnose: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "linear").mkdir()
    first = adapter_file(tmp_path / "none/a.safetensors")
    second = adapter_file(tmp_path / "linear/a.safetensors", common=0.0)
    drawn: list = []
    monkeypatch.setattr(diagnose, "redundancy_figure", lambda *args: drawn.append(args) or redundancy_figure(*args))
    output = tmp_path / "two.png"
    diagnose.main(diagnose.parse([str(first), str(second), "--layer", r"layer\.1\.", "--output", str(output)]))
    assert output.is_file() and "2 of 4 layers" in capsys.readouterr().out

    ((heading, rows, _),) = drawn
    assert heading == "Redundancy on weights: encoder.layer.1.attention.self.*"
    assert [[title for title, _ in row] for row in rows] == [
        ["none\nquery.q", "linear\nquery.q"],
        ["none\nvalue.v", "linear\nvalue.v"],
    ]
    assert all(mean_off_diagonal(left) > mean_off_diagonal(right) for (_, left), (_, right) in rows)
    figure = redundancy_figure(heading, rows, LIGHT)
    maps = [axis for axis in figure.axes if axis.images and axis.get_xlabel()]
    assert len(maps) == 4 and {axis.images[0].get_clim() for axis in maps} == {(0, 1)}
    assert {(axis.get_xlabel(), axis.get_ylabel()) for axis in maps} == {("subspace j", "subspace i")}
    for axis, panel in zip(maps, [panel for row in rows for panel in row], strict=True):
        assert axis.get_title(loc="left") == f"{panel[0]}\nmean {mean_off_diagonal(panel[1]):.3f}"
        np.testing.assert_allclose(axis.images[0].get_array()[0, 1:], panel[1][0][1:])


@pytest.mark.parametrize(
    ("layers", "drawn"),
    [
        (["b.0.attn.qkv.q", "b.0.attn.qkv.v", "b.1.attn.qkv.q", "b.1.attn.qkv.v"], "b.1.attn.qkv.q"),
        (["l.0.self.query", "l.0.self.value", "l.0.dense.query_dense"], "l.0.self.query"),
        (["l.0.q_proj", "l.1.q_proj", "l.1.v_proj"], "l.1.q_proj"),
        (["l.0.fc1.up", "l.1.fc1.up"], "l.1.fc1.up"),
    ],
)
def test_the_last_query_is_drawn(diagnose: ModuleType, layers: list[str], drawn: str) -> None:
    """Figure 1a shows the query of the last layer."""
    stored = {name: (torch.zeros(4, 2), torch.zeros(2, 4)) for name in layers}
    assert diagnose.layers_to_draw([stored], [Path("a")], None) == [drawn]


def test_a_peft_folder(diagnose: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import peft

    bert = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    model = peft.get_peft_model(bert, peft.LoraConfig(r=3, target_modules=["query", "word_embeddings"]))
    model.save_pretrained(tmp_path)
    diagnose.main(diagnose.parse([str(tmp_path), "--output", str(tmp_path / "x.png")]))
    printed = capsys.readouterr().out
    rows = table(printed)
    assert len(rows) == 3 and rows["encoder.layer.1.attention.self.query"][1:] == ["0.00", "3", "3"]  # B = 0
    assert "not in the table: 2 tensors" in printed and "lora_embedding_A" in printed


def test_ours_beside_pefts(diagnose: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """PEFT names the layer, we the target in it too: the same layers all the same."""
    import peft

    bert = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    peft.get_peft_model(bert, peft.LoraConfig(r=3, target_modules=["query"])).save_pretrained(tmp_path / "peft")
    ours = adapter_file(tmp_path / "a.safetensors")
    output = ["--output", str(tmp_path / "x.png")]
    for pair in ([ours, tmp_path / "peft"], [tmp_path / "peft", ours]):
        diagnose.main(diagnose.parse([*map(str, pair), *output]))
        printed = capsys.readouterr().out
        assert "heat maps" in printed and printed.count("encoder.layer.1.attention.self.query ") == 2


def test_values_that_are_not_finite_are_named(diagnose: ModuleType, tmp_path: Path) -> None:
    path = adapter_file(tmp_path / "a.safetensors")
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors[f"{LAYER.removesuffix('.v')}.branches.v.B"][0, 0] = float("nan")
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="not finite: its training diverged"):
        diagnose.main(diagnose.parse([str(path), "--output", str(tmp_path / "x.png")]))


def test_rank_one_has_no_pair(diagnose: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = adapter_file(tmp_path / "a.safetensors", rank=1)
    diagnose.main(diagnose.parse([str(path), "--layer", "q", "--output", str(tmp_path / "x.png")]))
    printed = capsys.readouterr().out
    assert table(printed)["mean"] == ["-", "1.00", "0.00", "1.00"]
    assert "no heat map: no layer has a pair of subspaces" in printed and not (tmp_path / "x.png").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """The folder of a run that never trained: an adapter with random values, probed as training does after a stage."""
    from retrieval.assemble import assemble
    from retrieval.experiment import Experiment
    from retrieval.train import probe
    from training import RunFolder
    from training.record import heat_maps, record_redundancy

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "scripts/conf")):
        composed = hydra.compose(
            "train_retrieval", ["data=openmoji", f"root={scenes}", "model.embed_dim=32", "regularizer=none"]
        )
    config = cast(dict, OmegaConf.to_container(composed, resolve=True))
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    splits, model, captions = assemble(Experiment.of(config))
    validation = (model, splits["validation"], captions["validation"])
    before = heat_maps(probe(*validation))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".branches." in name:
            nn.init.normal_(parameter, std=0.1)
    folder.begin(config)
    folder.write_json("run.json", {"threads": 1})
    save(model, folder.path / "adapter.safetensors")
    folder.write_json("metrics.json", record_redundancy(folder, [before, heat_maps(probe(*validation))]))
    return folder.path


def test_a_run_is_measured_on_features(
    diagnose: ModuleType, run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list = []
    monkeypatch.setattr(diagnose, "redundancy_figure", lambda *args: drawn.append(args) or redundancy_figure(*args))
    diagnose.main(diagnose.parse([str(run)]))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{run}, on features (validation pairs)\n")
    recorded = json.loads((run / "redundancy.json").read_text())
    rows = table(printed)
    for layer, matrix in recorded["after"].items():  # as training measured it
        assert float(rows[layer][0]) == pytest.approx(mean_off_diagonal(matrix), abs=6e-4)
    assert float(rows["mean"][0]) == pytest.approx(
        json.loads((run / "metrics.json").read_text())["redundancy"]["after"], abs=6e-4
    )
    assert (run / "redundancy.png").is_file()
    ((heading, rows_drawn, _),) = drawn
    layer = "text.bert.encoder.layer.5.attention.self.query.q"  # the value comes after it
    assert layer in recorded["after"] and heading == f"Redundancy on features (validation pairs): {layer}"
    assert rows_drawn == [
        [("after the first stage", recorded["before"][layer]), ("at the end", recorded["after"][layer])]
    ]


def test_a_run_without_its_data_is_measured_on_weights(
    diagnose: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("adapter.safetensors", "redundancy.json", "run.json"):
        (tmp_path / name).symlink_to(run / name)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"root": str(tmp_path / "nowhere")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    diagnose.main(diagnose.parse([str(tmp_path)]))
    printed = capsys.readouterr().out
    means = json.loads((run / "metrics.json").read_text())["redundancy"]
    assert "note: on weights, because the run cannot be put together again here (openmoji is not prepared" in printed
    assert f"{means['before']:.3f} after the first stage, {means['after']:.3f} at the end" in printed
    assert f"{tmp_path}, on weights\n" in printed and "on features)" in printed  # the figure is of redundancy.json

    del config["adapter"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    diagnose.main(diagnose.parse([str(tmp_path)]))
    assert "(the configuration lacks 'adapter': another version of the suite wrote it)" in capsys.readouterr().out

    both = [str(tmp_path), str(run / "adapter.safetensors"), "--output", str(tmp_path / "x.png")]
    diagnose.main(diagnose.parse(both))
    printed = capsys.readouterr().out
    assert f"only {tmp_path} is a run" in printed and printed.count(", on weights\n") == 2


def test_what_does_not_fit_is_named(diagnose: ModuleType, tmp_path: Path) -> None:
    path = adapter_file(tmp_path / "a.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/adapter.safetensors").symlink_to(path)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/config.yaml").write_text("seed: 0\n")
    (tmp_path / "notes.txt").write_text("x")
    other = inject(nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(4, 4)})}), LoRA(targets=("fc1",)))
    save(other, tmp_path / "other.safetensors")
    save(inject(nn.Sequential(nn.Linear(2, 2)), Linear(), train=("0",)), tmp_path / "linear.safetensors")
    output = ["--output", str(tmp_path / "x.png")]
    three = "expected an adapter file of this suite (.safetensors), a folder that PEFT saved"
    cases: list[tuple[list[str], str]] = [
        (["nowhere"], f"there is no {tmp_path / 'nowhere'}; {three}"),
        (["empty"], f"is a folder that holds nothing; {three}"),
        (["checkpoint"], f"name {tmp_path / 'checkpoint/adapter.safetensors'}"),
        (["unfinished"], "is a run that has not finished"),
        (["notes.txt"], f"does not end in .safetensors; {three}"),
        (["linear.safetensors"], "no sum of rank-1 subspaces"),
        (["a.safetensors", "other.safetensors"], "the two share no layer"),
    ]
    for names, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            diagnose.main(diagnose.parse([*(str(tmp_path / name) for name in names), *output]))
    for options, message in (
        (["--layer", "zzz"], "'zzz' is found in no layer to draw; they are encoder.layer.0"),
        (["--layer", "("], "no regular expression"),
        (["--output", str(tmp_path / "x.gif")], "expected the name of a .png file"),
        (["--csv", str(tmp_path / "a/b.csv")], "make it first"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            diagnose.main(diagnose.parse([str(path), *output, *options]))
    assert not (tmp_path / "x.png").exists()


def test_as_it_is_launched(tmp_path: Path, diagnose: ModuleType, capsys: pytest.CaptureFixture) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/diagnose.py", str(tmp_path / "nowhere")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: there is no ") and done.stderr.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        diagnose.parse(["a", "b", "c"])
    assert capsys.readouterr().err == "error: 3 paths; expected one, or two to compare; see --help\n"
    with pytest.raises(SystemExit, match="0"):
        diagnose.parse(["--help"])
    examples = re.findall(r"^ *python scripts/diagnose\.py ", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) == 3
