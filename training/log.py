"""What a training says while it runs: the lines of log.jsonl, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from training.run import RunFolder


def metric_name(key: str) -> str:
    """A metric as people write it."""
    return "Rsum" if key == "rsum" else key


def log_records(stage: str, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Trainer's log history as the lines of log.jsonl."""
    records: list[dict[str, Any]] = []
    for entry in history:
        record: dict[str, Any] = {"stage": stage, "epoch": entry.get("epoch"), "step": entry["step"]}
        if validation := {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}:
            records.append(record | {"validation": validation})
        elif "loss" in entry:
            parts = {key.removeprefix("part_"): value for key, value in entry.items() if key.startswith("part_")}
            record |= {key: entry[key] for key in ("loss", "learning_rate", "grad_norm") if key in entry}
            records.append(record | {"parts": parts})
    return records


class WriteLog(TrainerCallback):
    """Keep log.jsonl up to date after each epoch; after a resume it continues from the checkpoint's own history."""

    def __init__(
        self, run: RunFolder, earlier: list[dict[str, Any]], stage: str, after_epoch: Callable[[], None]
    ) -> None:
        self.run, self.earlier, self.stage, self.after_epoch = run, earlier, stage, after_epoch

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.run.write_lines("log.jsonl", self.earlier + log_records(self.stage, state.log_history))
        self.after_epoch()


class Progress(TrainerCallback):
    """One bar a stage, with the loss beside it and a line for each validation."""

    def __init__(self, stage: str, metric: str) -> None:
        self.stage, self.metric = stage, metric
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=f"stage {self.stage}", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is None:
            return
        logs: dict[str, float] = kwargs["logs"]
        if (score := logs.get(f"eval_{self.metric}")) is not None:
            shown = f"validation {metric_name(self.metric)} {score:.1f}"
            self.bar.write(f"stage {self.stage}, epoch {state.epoch:.0f}: {shown}")
        elif parts := {key.removeprefix("part_"): value for key, value in logs.items() if key.startswith("part_")}:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in parts.items()}, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
