"""`make demo` itself at tiny size, end to end: real encoders, real data, a real FAISS index."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/evaluate.py`

import evaluate

from retrieval.train import train

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "demo": ("data.prepare.scenes=[24,8,8] data.prepare.size=64", "model.embed_dim=32", "openmoji/vse_infty"),
    "demo-clips": ("data.prepare.clips=[24,8,8]", "model.image_size=28 data.size=28", "openmoji_clips/clip4clip"),
}


def make(target: str, root: Path, cache: Path, runs: Path) -> subprocess.CompletedProcess:
    root.mkdir(exist_ok=True)
    if not (root / "cache").exists():
        (root / "cache").symlink_to(cache.resolve())
    prepare, training, _ = TINY[target]
    small = "trainer.batch_size=8 trainer.stages.adapt.epochs=1 trainer.stages.regularize.epochs=1"
    small += " trainer.threads=1 trainer.precision=float32"
    return subprocess.run(
        ["make", "-o", ".venv/demo.installed", target, f"BIN={Path(sys.executable).parent}",
         f"PREPARE=root={root} {prepare}", f"TRAIN=root={root} runs={runs} {training} {small}"],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", TINY)
def test_make_demo(target: str, tmp_path: Path, cache: Path) -> None:
    done = make(target, tmp_path / "data", cache, tmp_path / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/retrieval" / TINY[target][2] / "lora/linear/seed0"

    # What it prints is what it measured.
    metrics, described = json.loads((run / "metrics.json").read_text()), json.loads((run / "run.json").read_text())
    assert re.search(rf"test .* {metrics['test']['rsum']:.1f}", done.stdout)
    assert f"{metrics['redundancy']['before']:.3f} after the first stage" in done.stdout
    assert f"{described['trained_parameters']:,}" in done.stdout
    assert str(run / "report.html") in done.stdout
    report = (run / "report.html").read_text()
    assert f"{metrics['test']['rsum']:.1f}" in report and "data:image/" in report
    stages = {json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()}
    assert stages == {"adapt", "regularize"}

    # A finished run is not repeated.
    written = (run / "metrics.json").stat().st_mtime_ns
    assert train(yaml.safe_load((run / "config.yaml").read_text())).path == run
    assert (run / "metrics.json").stat().st_mtime_ns == written

    # Its adapter file alone gives the same numbers on the same backbone, those of folds, and embeddings to look at.
    output, folder = tmp_path / "again.json", tmp_path / "embeddings"
    asked = {"run": str(run), "split": "test", "root": None, "output": str(output)}
    evaluate.main(asked | {"folds": 2, "embeddings": str(folder)})
    again = json.loads(output.read_text())
    assert again["test"] == metrics["test"]
    images, texts, owners = (np.load(folder / f"{name}.npy") for name in ("images", "texts", "owners"))
    half, hits = len(images) // 2, []
    for first in (0, half):
        captions = np.flatnonzero((owners >= first) & (owners < first + half))
        best = first + (texts[captions] @ images[first : first + half].T).argmax(axis=1)
        hits.append((best == owners[captions]).mean())
    assert again["folds"]["test"]["t2i_R@1"] == pytest.approx(100 * np.mean(hits))
    assert again["folds"]["chance"]["test"]["t2i_R@1"] == pytest.approx(100 / half)
