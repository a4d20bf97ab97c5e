"""What a user sees who asks for help or mistypes."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/train_retrieval.py`

import evaluate
import torch
import train_retrieval
from command_line import compose, launch
from mistakes import mistakes_in_one_line
from summary import print_summary

from training import RunFolder

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ("train_retrieval", "train_classification", "prepare_data", "evaluate")


class Done(NamedTuple):
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Done]:
    """Run a command's file as its own program, in this process: a new one imports for ten seconds what is here."""

    def run(command: str, *arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", [f"scripts/{command}.py", *arguments])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{command}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return Done(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_two_examples_of_the_command(command: str, run: Callable[..., Done]) -> None:
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    examples = [line for line in done.stdout.splitlines() if line.strip().startswith(f"python scripts/{command}.py ")]
    assert len(examples) >= 2
    assert "override" not in done.stdout and ("Groups:" in done.stdout) == (command != "evaluate")


def test_the_summary_of_a_run_is_printed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = RunFolder(tmp_path)
    finished.write_json("metrics.json", {})
    counts = {"trained_parameters": 1, "total_parameters": 2, "adapter_parameters": 0, "seconds": {}}
    finished.write_json("run.json", counts)
    for number in ("0", "1"):  # as torchrun numbers its processes
        monkeypatch.setenv("RANK", number)
        print_summary(finished, lambda metrics: "the table", "the place")
    assert capsys.readouterr().out.count("the table") == 1


def test_help_offers_what_fits_the_command(run: Callable[..., Done]) -> None:
    retrieval, classification = run("train_retrieval", "--help").stdout, run("train_classification", "--help").stdout
    for group, choices in {
        "data": ("openmoji", "openmoji_clips", "msrvtt", "flickr30k", "coco"),
        "model": ("clip4clip", "vse_infty", "vse_infty_base"),
    }.items():
        for choice in choices:
            assert re.search(rf"^  {group}=(\w+\|)*{choice}(\||$)", retrieval, re.MULTILINE)
    assert "  trainer/schedule=constant|cosine|step|warmup_cosine\n" in retrieval
    for group, choice in (("data", "digits"), ("model", "dinov2_small")):
        assert re.search(rf"^  {group}=(\w+\|)*{choice}(\||$)", classification, re.MULTILINE)
    for shared in ("  adapter=", "  regularizer="):
        both = [[line for line in text.splitlines() if line.startswith(shared)] for text in (retrieval, classification)]
        assert both[0] == both[1] and len(both[0]) == 1
    assert "digits" not in retrieval and "adapter/vit" not in classification.partition("Groups:")[2]
    assert "openmoji" not in classification.partition("Groups:")[2]


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("adapter=loar", "did you mean adapter=lora?"),
        ("regularizer=liner", "did you mean regularizer=linear?"),
        ("trainer.batchsize=3", "did you mean trainer.batch_size=3?"),
        ("data=digits", "unknown data 'digits'; choose from "),
        ("protocol=as_publishd", "did you mean protocol=as_published?"),
        ("adaptor=lora", "did you mean adapter=lora?"),
        ("adapter.rank=0", "rank >= 1"),
        ("adapter=full", "use regularizer=none"),
        ("model=clip4clip", "use model=vse_infty"),
        ("root=nowhere", "python scripts/prepare_data.py data=openmoji"),
    ],
)
def test_a_mistake_gets_one_line_and_no_stack_trace(
    argument: str, hint: str, tmp_path: Path, scenes: Path, run: Callable[..., Done]
) -> None:
    done = run("train_retrieval", f"root={scenes}", f"runs={tmp_path}", argument)
    assert done.returncode == 2
    assert hint in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_a_mistake_as_it_is_launched(tmp_path: Path) -> None:
    """A process of its own: nothing but that line, whatever the libraries have to say."""
    command = [sys.executable, "scripts/train_retrieval.py", f"root={tmp_path}", f"runs={tmp_path}", "adapter=lora"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "python scripts/prepare_data.py data=openmoji" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_evaluating_what_is_no_run_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    def refused(message: str, **config: str) -> None:
        given = [f"{key}={value}" for key, value in config.items()]
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            evaluate.main(compose("evaluate", [f"run={tmp_path}", *given]))

    refused("holds no run.json and config.yaml: expected the folder of a finished run")
    RunFolder(tmp_path).write_json("run.json", {"data": {"name": "openmoji"}})
    (tmp_path / "config.yaml").touch()
    refused("its folder does not exist", output=str(tmp_path / "nowhere" / "metrics.json"))
    refused("split is 'dev'", split="dev")
    refused("folds is 'five'; expected a whole number, 1 or more", folds="five")
    RunFolder(tmp_path).write_json("run.json", {"data": {"name": "digits"}, "threads": torch.get_num_threads()})
    refused("folds and embeddings are of retrieval", folds="5")


def test_the_stack_trace_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="2"), mistakes_in_one_line():
        raise ValueError("a mistake")
    monkeypatch.setenv("RESORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a mistake"), mistakes_in_one_line():
        raise ValueError("a mistake")


def launched(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, name: str = "train_retrieval", check: Any = None
) -> list[dict[str, Any]]:
    """The configurations that a command runs with."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    words = {"verify": seen.append} if name == "prepare_data" else None
    launch(seen.append, name, "", choices={"data": ["openmoji"]}, words=words, check=check)
    return seen


@pytest.mark.parametrize("name", ["train_retrieval", "prepare_data", "evaluate"])
def test_hydra_shows_the_configuration(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert launched(monkeypatch, "--cfg", "job", name=name) == []
    assert isinstance(yaml.safe_load(capsys.readouterr().out), dict)


def test_a_flags_value_is_no_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert launched(monkeypatch, "--info", "searchpath") == []
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("name: mine\n")
    (config,) = launched(monkeypatch, "--config-dir", str(tmp_path), "data=mine", "trainer=openmoji")
    assert config["data"] == {"name": "mine"}
    with pytest.raises(SystemExit, match="2"):
        launched(monkeypatch, "--cfg", "job", "adapter=loar")
    assert "did you mean adapter=lora?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        launched(monkeypatch, "trainer/schedule=cosin")
    assert "did you mean trainer/schedule=cosine?" in capsys.readouterr().err


def test_a_sweep_leaves_nothing_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, runs = tmp_path / "here", tmp_path / "runs"
    here.mkdir()
    monkeypatch.chdir(here)
    configs = launched(monkeypatch, "--multirun", "seed=0,1", f"runs={runs}")
    assert [config["seed"] for config in configs] == [0, 1]
    assert not list(here.iterdir()) and (runs / "multirun.yaml").is_file()


class Weights:
    """What a job holds on the device."""


def test_a_job_that_fails_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    done, held = [], list[weakref.ref]()

    def main(config: dict[str, Any]) -> None:
        assert all(weights() is None for weights in held), "what the failed jobs held is freed"
        weights = Weights()
        held.append(weakref.ref(weights))
        if config["seed"] == 1:
            raise ValueError("the loss is not finite")
        if config["seed"] == 2:
            raise TypeError("a bug")
        done.append(config["seed"])

    monkeypatch.setattr(sys, "argv", ["train_retrieval.py", "--multirun", "seed=0,1,2,3", f"runs={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        launch(main, "train_retrieval", "")
    assert done == [0, 3]
    at_once, _, last = capsys.readouterr().err.partition("2 of 4 jobs failed:\n")
    assert at_once.count(f"error in seed=1 runs={tmp_path}: the loss is not finite\n") == 1
    assert at_once.count("Traceback") == 1, "of the bug alone"
    assert last.splitlines() == [
        f"  seed=1 runs={tmp_path}: the loss is not finite",
        f"  seed=2 runs={tmp_path}: TypeError('a bug')",
    ]


def test_a_job_that_fails_in_another_process_is_hydras_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    begun = []

    def main(config: dict[str, Any]) -> None:
        begun.append(config["seed"])
        monkeypatch.setattr("sweep.os.getpid", lambda: -1)  # as in a process of joblib
        raise ValueError("no such data")

    monkeypatch.setattr(sys, "argv", ["train_retrieval.py", "--multirun", "seed=0,1", f"runs={tmp_path}"])
    with pytest.raises(SystemExit, match="1"):
        launch(main, "train_retrieval", "")
    assert begun == [0, 1] and capsys.readouterr().err.count(f"error in seed=1 runs={tmp_path}: no such data\n") == 1


def test_the_configuration_of_a_sweep_is_not_one(run: Callable[..., Done]) -> None:
    done = run("train_retrieval", "--multirun", "seed=0,1", "--cfg", "job")
    assert done.returncode == 2 and done.stderr.startswith("error: --cfg prints the configuration of one run")


def test_a_sweep_is_checked_before_its_first_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sweep = ("--multirun", "adapter=lora,full", "regularizer=none,linear", f"runs={tmp_path / 'runs'}")
    with pytest.raises(SystemExit, match="2"):
        launched(monkeypatch, *sweep, check=train_retrieval.check)
    error = capsys.readouterr().err
    assert error.startswith(
        "error: 1 of 4 jobs cannot run, so none was begun:\n  adapter=full regularizer=linear runs="
    )
    assert "use regularizer=none" in error and len(error.splitlines()) == 2
    assert not (tmp_path / "runs").exists()
    assert len(launched(monkeypatch, "--multirun", "adapter=lora,full", "regularizer=none", f"runs={tmp_path}",
                        check=train_retrieval.check)) == 2  # fmt: skip


def test_a_sweep_over_rows_takes_a_setting_that_the_rows_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The same for all jobs, and not there before a row has chosen its collection of data sets."""

    def sweep(*overrides: str) -> list[dict[str, Any]]:
        name = "train_classification"
        return launched(monkeypatch, "--multirun", "table2=lora,dtl_plus", *overrides, f"runs={tmp_path}", name=name)

    jobs = sweep("data.dataset=cifar", "seed=0,1", "trainer.batch_size=32")
    assert [(job["adapter"]["name"], job["seed"]) for job in jobs] == [
        (adapter, seed) for adapter in ("lora", "dtl_plus") for seed in (0, 1)
    ]
    assert {(job["data"]["dataset"], job["trainer"]["batch_size"]) for job in jobs} == {("cifar", 32)}
    with pytest.raises(SystemExit, match="2"):
        sweep("data.datset=cifar")
    assert "no setting 'data.datset'; did you mean data.dataset=cifar?" in capsys.readouterr().err
