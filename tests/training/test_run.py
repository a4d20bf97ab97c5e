"""The run folder, the hardware choice and the optimiser groups."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import training.run as training_run
from adapters import Full, LoRA, inject, load, save
from training import Hardware, LearningRates, Recipe, RunFolder, Stage, choose_hardware
from training.hardware import compute_device, device_name
from training.optimizers import parameter_groups
from training.record import clock, hardware_for
from training.run import Unrestorable, environment


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def test_the_commit_of_a_run_says_whether_the_code_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "training"
    (tmp_path / "docs").mkdir(), package.mkdir()
    monkeypatch.setattr(training_run, "__file__", str(package / "run.py"))
    assert environment()["git_commit"] is None, "no checkout"
    for name in ("training/run.py", "docs/results.md"):
        (tmp_path / name).write_text("as committed")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    for name, mark in (
        ("docs/results.md", ""),
        ("docs/figure.py", ""),
        ("metrics.json", ""),
        ("training/new.py", "-dirty"),
        ("training/run.py", "-dirty"),
    ):
        file = tmp_path / name
        before = file.read_text() if file.exists() else None
        file.write_text("another")
        assert environment()["git_commit"] == f"{commit}{mark}", name
        file.unlink() if before is None else file.write_text(before)
    assert environment()["git_commit"] == commit


def test_parameters_fall_into_groups_by_what_they_are() -> None:
    rates = LearningRates(adapter=3.0, head=2.0, backbone=1.0, weight_decay=0.5)
    model = inject(Tower(), LoRA(rank=2, targets=("q",)), train=("head",))
    groups = parameter_groups(model, rates, ("head",))
    sizes = {(g["name"], g["lr"], g["weight_decay"]): sum(p.numel() for p in g["params"]) for g in groups}
    assert sizes == {("adapter", 3.0, 0.5): 16, ("head", 2.0, 0.5): 8, ("head", 2.0, 0.0): 2}
    full = parameter_groups(inject(Tower(), Full(), train=("head",)), rates, ("head",))
    assert {(g["name"], g["lr"]) for g in full} == {("backbone", 1.0), ("head", 2.0)}
    assert sum(p.numel() for g in full for p in g["params"]) == sum(p.numel() for p in model.parameters()) - 16
    with pytest.raises(ValueError, match="nothing trains"):
        parameter_groups(Tower().requires_grad_(False), rates, ("head",))


def test_a_head_that_is_tied_trains_at_the_heads_rate() -> None:
    head = nn.Linear(4, 5, bias=False)
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "fc1": nn.Linear(4, 4), "head": head})
    head.weight = model["embedding"].weight  # which named_parameters calls embedding.weight
    inject(model, LoRA(rank=2, targets=r"^fc1"), train=("head",))
    groups = parameter_groups(model, LearningRates(), ("head",))
    assert [group["name"] for group in groups if head.weight in set(group["params"])] == ["head"]


def test_a_run_refuses_another_configuration_and_a_path_out_of_its_root(tmp_path: Path) -> None:
    run = RunFolder.of(tmp_path, "retrieval", "openmoji", "seed0")
    run.begin({"seed": 0, "adapter": {"rank": 8}})
    run.begin({"seed": 0, "adapter": {"rank": 8}})
    with pytest.raises(ValueError, match=r"adapter.rank: 8 then, 4 now"):
        run.begin({"seed": 0, "adapter": {"rank": 4}})
    for level in ("..", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="cannot name a folder"):
            RunFolder.of(tmp_path, level)
    assert not run.finished
    run.write_json("metrics.json", {"a": 1})
    assert run.finished and run.read_json("metrics.json") == {"a": 1} and run.read_json("other.json") is None
    assert not list(run.path.glob("*.partial"))
    with pytest.raises(ValueError):
        run.write_json("bad.json", {"a": float("nan")})
    assert not (run.path / "bad.json").exists()


def test_a_run_goes_on_where_only_places_and_workers_differ(tmp_path: Path) -> None:
    def config(root: str, workers: int, weights: str, **more: Any) -> dict[str, Any]:
        data = {"name": "vtab", "root": root, "prepare": {"workers": workers}, "pictures": root}
        trainer = {"workers": workers, "report_to": ["wandb"] * workers, "batch_size": 8}
        return {"root": root, "runs": root, "data": data, "model": {"weights": weights}, "trainer": trainer} | more

    run = RunFolder(tmp_path)
    run.begin(config("data", 4, "data/ViT-B_16.npz"))
    moved = config("/scratch/7", 0, "/scratch/7/ViT-B_16.npz", start_from="/scratch/7/linear")
    run.begin(moved)
    run.check(config("data/", 0, "data//ViT-B_16.npz"))
    with pytest.raises(
        ValueError, match=r"\(model.weights: '\$\{root\}/ViT-B_16.npz' then, '/other/ViT-B_16.npz' now\)"
    ):
        run.check(config("/scratch/7", 0, "/other/ViT-B_16.npz"))
    with pytest.raises(ValueError, match=r"\(data.name: 'vtab' then, 'digits' now\)"):
        run.check(config("vtab", 0, "vtab/ViT-B_16.npz") | {"data": {"name": "digits", "root": "vtab"}})

    with pytest.raises(FileNotFoundError, match=r"holds no adapter\.safetensors: expected the folder of a run that"):
        run.finished_config()
    (tmp_path / "adapter.safetensors").touch()
    assert run.finished_config() == moved
    again = run.finished_config(root="here")
    assert again["data"]["root"] == again["root"] == "here" and again["model"]["weights"] == "here/ViT-B_16.npz"
    assert again["data"]["name"] == "vtab" and again["start_from"] == "here/linear"


def test_other_data_are_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.check_data("anything, as long as nothing has run")
    run.write_json("run.json", {"data": {"fingerprint": "a" * 64}})
    run.check_data("a" * 64)
    with pytest.raises(Unrestorable, match=r"was trained on other data .*aaaa then, bbbb.* root=FOLDER"):
        run.check_data("b" * 64)


@pytest.mark.parametrize("text", ["", '{"seconds": {"tra', "\0\0\0"])
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/run\.json is not JSON \(.*delete it and launch the run again"):
        RunFolder(tmp_path).read_json("run.json")


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a file is empty under its name after a power cut."""
    synced, replaced, fsync, replace = dict[int, int](), list[str](), os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def noted_replace(source: Path, target: Path) -> None:
        size = source.stat().st_size
        assert size > 0 and synced[source.stat().st_ino] == size
        assert source.parent == target.parent and source.name == f"{target.name}.{os.getpid()}.partial"
        replaced.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    first.write_json("checkpoints/adapt/history.json", [])
    model = inject(Tower(), LoRA(rank=2, targets=("q",)), train=("head",))
    save(model, first.path / "checkpoints/adapt/adapter.safetensors")
    second.adopt_stage("adapt", first.path)
    assert replaced == ["history.json", "adapter.safetensors", "adapter.safetensors", "history.json"]
    load(model, second.path / "checkpoints/adapt/adapter.safetensors")


def test_a_disk_that_is_full_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = inject(Tower(), LoRA(rank=2, targets=("q",)), train=("head",))
    save(model, tmp_path / "adapter.safetensors")
    before = (tmp_path / "adapter.safetensors").read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapters.io.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(model, tmp_path / "adapter.safetensors")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"adapter.safetensors": before}


def test_a_finished_run_keeps_no_optimiser_states(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in ("adapt/checkpoint-3/optimizer.pt", "adapt/history.json", "adapt/adapter.safetensors"):
        run.write_text(f"checkpoints/{name}", "[]")
    run.finish({"test": {}})
    assert run.finished and run.has_trained("adapt")
    kept = sorted(path.name for path in (tmp_path / "checkpoints/adapt").iterdir())
    assert kept == ["adapter.safetensors", "history.json"]


def test_of_several_processes_the_first_counts_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in ("1", "0", "2"):  # as torchrun sets it
        monkeypatch.setenv("RANK", number)
        with clock(RunFolder(tmp_path / number), "train"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    monkeypatch.delenv("RANK")
    with clock(RunFolder(tmp_path / "alone"), "train"):
        pass
    assert RunFolder(tmp_path / "alone").read_json("run.json")["seconds"]["train"] >= 0


def test_an_interrupted_part_keeps_its_seconds(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt), clock(run, "train") as watch:
        time.sleep(0.02)
        watch.tick()  # as after an epoch; a kill later on would lose the rest alone
        ticked = run.read_json("run.json")["seconds"]["train"]
        time.sleep(0.02)
        raise KeyboardInterrupt
    assert 0.02 <= ticked < ticked + 0.01 < run.read_json("run.json")["seconds"]["train"]


def test_another_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, nothing = RunFolder(tmp_path), cast(Any, None)
    run.write_json("run.json", {"processes": 2, "threads": 3, "precision": "float32"})
    with pytest.raises(ValueError, match=r"begun with 2 processes .* with 1, .*torchrun --nproc_per_node 2"):
        hardware_for(run, nothing)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert hardware_for(run, nothing) == Hardware(3, "float32")


def test_several_processes_do_not_time_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.hardware._seconds", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capable, expected in ((True, "bfloat16"), (False, "float32")):  # an A100; a T4, which emulates it
        answer = lambda including_emulation=True, capable=capable: including_emulation or capable  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
        assert choose_hardware() == Hardware(torch.get_num_threads(), expected)


def test_the_device_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert compute_device() == torch.device("cuda:3")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert compute_device() == torch.device("cpu") and device_name() == "cpu"


def test_hardware_is_what_is_asked_for_or_measured() -> None:
    threads = torch.get_num_threads()
    assert choose_hardware(2, "float32") == Hardware(2, "float32")
    measured = choose_hardware()
    assert measured.threads >= 1 and measured.precision in ("float32", "bfloat16")
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="threads is 0"):
        choose_hardware(0)
    with pytest.raises(ValueError, match="precision is 'half'"):
        choose_hardware(precision="half")


def test_bad_recipes_are_refused() -> None:
    stage = Stage(name="a", epochs=1)
    half = Stage(name="a", epochs=cast(int, 1.5))
    for settings in ({"stages": ()}, {"stages": (stage, stage)}, {"stages": (Stage(name="a", epochs=0),)},
                     {"stages": (half,)}):  # fmt: skip
        with pytest.raises(ValueError, match="distinct names"):
            Recipe(**settings)
    with pytest.raises(ValueError, match="batch_size=1"):
        Recipe(stages=(stage,), batch_size=1)
    with pytest.raises(ValueError, match="last, validation"):
        Recipe(stages=(stage,), selection="test")
    with pytest.raises(ValueError, match=r"rates\.head is -1"):
        LearningRates(head=-1.0)
