"""Stages: what each trains, logs and leaves, and what is refused before it begins."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from tiny import lines
from torch import nn

from training import Recipe, RunFolder, Stage
from training.hardware import check_devices
from training.optimizers import build_optimizer
from training.stages import check_items


def test_two_processes_have_one_optimiser_one_score_and_one_best_epoch(tmp_path: Path) -> None:
    """The first process alone writes, and is late: the other has to wait. It alone evaluates, too."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [tiny.__file__, str(tmp_path), "0", "lora", "False"]
    done = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"process{rank}.pt", weights_only=True) for rank in (0, 1))
    of_first, of_second = first["parameters"], second["parameters"]
    assert of_first.keys() == of_second.keys() and len(of_first) > 4
    for name, parameter in of_first.items():
        assert torch.equal(of_second[name], parameter), name
    assert [line["epoch"] for line in lines(tmp_path) if "validation" in line] == [1, 2, 1, 2, 3]
    for each in (first, second):  # two batches of 5 an epoch, epochs counted over both stages
        assert [epoch for epoch, _ in each["items"]] == [epoch for epoch in range(5) for _ in range(10)]
    assert len({*first["items"], *second["items"]}) == 5 * 20, "no item in both"

    first, second = (torch.load(tmp_path / f"apart{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["reported"] == second["reported"]
    assert [metrics["eval_rsum"] for metrics in first["reported"]] == [5, 1, 2, 4, 3], "what the first one found"
    logged = [line["validation"] for line in lines(tmp_path / "apart") if "validation" in line]
    assert [score["mean"] for score in logged] == [metrics["eval_mean"] for metrics in first["reported"]]
    kept = load_file(tmp_path / "apart/checkpoints/regularize/adapter.safetensors")
    assert float(kept["head.1.running_mean"].sum()) == first["reported"][3]["eval_mean"], "the best epoch"
    for name, tensor in kept.items():  # with the statistics of the batch norm
        assert torch.equal(first["weights"][name], tensor) and torch.equal(second["weights"][name], tensor), name


def test_stages_train_with_and_without_the_penalty_and_are_logged(tmp_path: Path) -> None:
    model = tiny.train(tmp_path)
    log = lines(tmp_path)
    parts = {stage: {part for line in log if line["stage"] == stage for part in line.get("parts", {})} for stage in
             ("adapt", "regularize")}  # fmt: skip
    assert parts == {"adapt": {"squares"}, "regularize": {"squares", "resora_linear"}}
    for line in log:
        if "parts" in line:
            assert line["loss"] == pytest.approx(sum(line["parts"].values()), rel=1e-4)
    assert [line["epoch"] for line in log if "validation" in line] == [1, 2, 1, 2, 3]
    saved = load_file(tmp_path / "checkpoints/regularize/adapter.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())
    weights = [path.name for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pkl")]
    assert not weights, "a checkpoint holds nothing to unpickle but torch's own optimiser state"


def test_the_penalty_changes_what_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_penalty = tiny.train(tmp_path / "a")
    monkeypatch.setattr(tiny, "ReSoRA", lambda *_, **__: None)
    without = tiny.train(tmp_path / "b")
    a = "mlp.fc1.branches.fc1.A"
    assert not torch.equal(with_penalty.state_dict()[a], without.state_dict()[a])


def test_an_objective_is_told_the_epochs_since_the_first_stage_began(tmp_path: Path) -> None:
    """So a warm-up of one epoch is over with the first step of the second one, and does not come back."""
    epochs: list[float] = []

    def objective(output: torch.Tensor, epoch: float) -> dict[str, torch.Tensor]:
        epochs.append(epoch)
        return {"squares": output.square().mean()}

    tiny.train(tmp_path, objective=objective)
    assert epochs == pytest.approx([step / 4 for step in range(4 * 5)])  # 22 items make 4 batches of 5


def test_gradients_reach_the_optimizer_with_the_norm_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []

    def observed(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*arguments)
        groups = optimizer.param_groups
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(float(nn.utils.get_total_norm([p.grad for g in groups for p in g["params"]])))
        )
        return optimizer

    monkeypatch.setattr("training.stages.build_optimizer", observed)
    tiny.train(tmp_path, max_grad_norm=0.01)
    assert norms == pytest.approx([0.01] * 20, rel=1e-3)


def test_a_model_keeps_its_parameters_in_range_after_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 0.05 and a limit of 0.125: without it, the weights are beyond it in the third step."""
    begun, stepped = list[float](), list[float]()

    class Bounded(tiny.Model):
        def largest(self) -> float:
            return float(self.head[2].weight.detach().abs().max())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            begun.append(self.largest())
            return super().forward(x)

        def after_step(self) -> None:
            stepped.append(self.largest())
            with torch.no_grad():
                self.head[2].weight.clamp_(-0.125, 0.125)

    monkeypatch.setattr(tiny, "Model", Bounded)
    model = tiny.train(tmp_path)
    assert isinstance(model, Bounded)
    assert len(begun) == len(stepped) == 20, "once a step"
    assert max(stepped[1:]) > 0.125 >= max(*begun[1:], model.largest())


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_size: int | None
) -> None:
    """In step 6 of 4 an epoch, before the backward pass, whose gradients DistributedDataParallel would hand round."""
    monkeypatch.setattr("training.trainer.check_chunkable", lambda model: None)  # it has a batch norm
    models, backward = list[nn.Module](), list[int]()

    def evaluator(model: nn.Module) -> dict[str, float]:
        models.append(model)
        return {"rsum": 1.0}

    def objective(output: torch.Tensor, epoch: float) -> dict[str, torch.Tensor]:
        output.register_hook(lambda gradient: backward.append(len(gradient)))
        factor = float("nan") if epoch == 5 / 4 else 1.0
        return {"squares": output.square().mean() * factor, "other": output.new_ones(())}

    with pytest.raises(FloatingPointError, match=r"step 5 is not finite: squares nan, other 1\.0; lower the learning"):
        tiny.train(tmp_path, objective=objective, evaluator=evaluator, chunk_size=chunk_size)
    assert backward == [5] * 5
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())
    assert [path.name for path in tmp_path.glob("checkpoints/*/checkpoint-*")] == ["checkpoint-4"]


def test_too_little_data_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.Items, "__len__", lambda self: 4)
    with pytest.raises(ValueError, match="4 training items make no batch of 5"):
        tiny.train(tmp_path)
    assert not list(tmp_path.iterdir())


def test_items_are_counted_against_the_batches_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_items(16, 16)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    check_items(32, 16)
    with pytest.raises(ValueError, match="31 training items make no batch of 16 for each of 2 processes, 32 in all"):
        check_items(31, 16)


def test_several_gpus_in_one_process_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"4 GPUs .*CUDA_VISIBLE_DEVICES=0.*torchrun --nproc_per_node 4"):
        tiny.train(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("LOCAL_RANK", "3")  # as torchrun sets it
    check_devices()


def test_bfloat16_trains_without_an_accelerator(tmp_path: Path) -> None:
    rounded, exact = tiny.train(tmp_path / "a", precision="bfloat16"), tiny.train(tmp_path / "b")
    a = "mlp.fc1.branches.fc1.A"
    assert rounded.state_dict()[a].dtype == torch.float32
    assert not torch.equal(rounded.state_dict()[a], exact.state_dict()[a])  # autocast did round
    torch.testing.assert_close(rounded.state_dict()[a], exact.state_dict()[a], rtol=0.5, atol=0.3)


def test_without_restart_one_schedule_and_one_optimizer_span_the_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rates are those of a single stage of as many epochs; the second one begins with the moments of the first."""
    begun = list[list[dict[int, dict[str, torch.Tensor]]]]()

    def observed(*arguments: Any) -> torch.optim.Optimizer:
        optimizer, states = build_optimizer(*arguments), list[dict[int, dict[str, torch.Tensor]]]()
        begun.append(states)

        def before_a_step(*_: Any) -> None:
            if not states:
                states.append(copy.deepcopy(optimizer.state_dict()["state"]))

        optimizer.register_step_pre_hook(before_a_step)
        return optimizer

    monkeypatch.setattr("training.stages.build_optimizer", observed)
    whole = (Stage(name="all", epochs=5, regularize=True),)
    halves = (Stage(name="adapt", epochs=2), Stage(name="regularize", epochs=3, regularize=True))
    rates = [
        [line["learning_rate"] for line in lines(tmp_path / name) if "learning_rate" in line and line["step"] % 4 == 0]
        for name, stages, restart in (("whole", whole, True), ("halves", halves, False), ("restarted", halves, True))
        if tiny.train(tmp_path / name, stages=stages, restart=restart)
    ]
    assert rates[1] == pytest.approx(rates[0]) and rates[2] != pytest.approx(rates[0])
    whole_state, first_state, last_state = (
        torch.load(tmp_path / path / "optimizer.pt", weights_only=True)["state"]
        for path in (
            "whole/checkpoints/all/checkpoint-20",
            "halves/checkpoints/adapt/checkpoint-8",
            "halves/checkpoints/regularize/checkpoint-12",
        )
    )
    assert whole_state[0]["step"] == last_state[0]["step"] == 20
    (_, (at_first,), (at_second,), _, (at_restart,)) = begun
    assert at_first == at_restart == {} and at_second.keys() == first_state.keys()
    for number, saved in first_state.items():
        assert saved["step"] == 8 and saved["exp_avg"].any() and saved["exp_avg_sq"].any()
        assert at_second[number].keys() == saved.keys()
        for name, moment in saved.items():
            assert torch.equal(at_second[number][name], moment), (number, name)
    with pytest.raises(ValueError, match="selection=last"):
        Recipe(stages=halves, restart=False, selection="validation")


def test_a_stage_of_another_run_is_taken_over(tmp_path: Path) -> None:
    config = {
        "seed": 3, "regularizer": {"name": "none"}, "runs": "a", "start_from": None,
        "trainer": {"stages": {"adapt": {"epochs": 2, "regularize": False}, "regularize": {"epochs": 3}}},
    }  # fmt: skip
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    first.begin(config)
    with pytest.raises(FileNotFoundError, match="has finished its stage 'adapt'"):
        second.check_source("adapt", first.path, config)
    tiny.train(first.path)
    other = config | {"regularizer": {"name": "linear", "weight": 0.1}, "start_from": str(first.path)}
    with pytest.raises(ValueError, match="seed: 3 there, 4 here"):
        second.check_source("adapt", first.path, other | {"seed": 4})
    first.write_json("run.json", {"processes": 2})
    with pytest.raises(ValueError, match=r"was trained by 2 processes.* than the 1 here .*--nproc_per_node 2"):
        second.check_source("adapt", first.path, other)
    first.write_json("run.json", {"processes": 1})
    second.check_source("adapt", first.path, other)
    assert not second.path.exists(), "a check writes nothing"
    second.adopt_stage("adapt", first.path)
    second.check_source("adapt", tmp_path / "deleted", other)  # once it is here, the other folder is not asked for
    continued, whole = tiny.train(second.path), tiny.train(tmp_path / "whole")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], tensor), name
    assert not list((second.path / "checkpoints/adapt").glob("checkpoint-*")), "the first stage was not trained again"
