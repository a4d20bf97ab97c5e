"""A run whose data move while it is interrupted, as scratch disks of other nodes do, ends in the same bits."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/evaluate.py`

import evaluate
from command_line import compose

from retrieval.train import train
from training.record import Clock
from training.run import Unrestorable


def config(root: Path, runs: Path, *more: str) -> dict[str, Any]:
    small = "model.embed_dim=32 model.hidden_dim=16 trainer.batch_size=8 trainer.threads=1 trainer.precision=float32 "
    small += "trainer.stages.adapt.epochs=2 trainer.stages.regularize.epochs=1 trainer.evaluate_every=2"
    return compose("train_retrieval", [f"root={root}", f"runs={runs}", *small.split(), *more])


def test_a_run_goes_on_and_is_evaluated_where_its_data_are(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    shutil.copytree(scenes, first, symlinks=True)
    whole = train(config(first, tmp_path / "whole"))

    # Of several processes the second one, when all is trained, writes nothing.
    numbers = whole.read_json("metrics.json")
    (whole.path / "metrics.json").unlink()
    own = [whole.path / name for name in ("log.jsonl", "redundancy.json", "adapter.safetensors", "report.html")]
    written = [path.stat().st_mtime_ns for path in own]
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        assert not train(config(first, tmp_path / "whole")).finished
    assert [path.stat().st_mtime_ns for path in own] == written
    whole.write_json("metrics.json", numbers)

    def interrupted(clock: Clock) -> None:
        if clock.part == "train":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Clock, "tick", interrupted)  # after an epoch
        train(config(first, tmp_path / "runs"))
    (checkpoint,) = tmp_path.glob("runs/**/adapt/checkpoint-*")
    assert checkpoint.name == "checkpoint-3", "one epoch of the first stage"
    first.rename(second)
    resumed = train(config(second, tmp_path / "runs", "trainer.workers=1", "data.prepare.seed=9"))
    assert resumed.read_json("metrics.json") == whole.read_json("metrics.json")
    tensors, expected = (load_file(run.path / "adapter.safetensors") for run in (resumed, whole))
    assert tensors.keys() == expected.keys() and len(tensors) > 4
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name

    second.rename(third)
    output = tmp_path / "again.json"
    asked = compose("evaluate", [f"run={resumed.path}", f"root={third}", f"output={output}"])
    evaluate.main(asked)
    assert json.loads(output.read_text())["test"] == whole.read_json("metrics.json")["test"]
    assert train(config(third, tmp_path / "runs")).path == resumed.path, "finished: it is not trained again"

    captions = third / "openmoji" / "train_caps.txt"
    captions.write_text(captions.read_text().replace("a ", "the "))
    with pytest.raises(Unrestorable, match="was trained on other data"):
        evaluate.main(asked)
    with pytest.raises(Unrestorable, match="was trained on other data"):
        train(config(third, tmp_path / "runs"))  # not the numbers of the data that were in `second`
    torch.set_num_threads(threads)
