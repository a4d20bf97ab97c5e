"""Run folders -> what each run scored on test, and everything that two runs must share to be averaged."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from eval.metrics import RECALL_KEYS
from training.configuration import FREE, at_root, flatten
from training.run import CONFIG, FINISHED

SEEDS = ("seed", "data.subset_seed")  # repetitions: a row is a mean over these
COLUMNS = ("data.name", "data.dataset", "data.shots")  # they choose a table, or a column of one
ELSEWHERE = ("root", "data.root", "trainer.threads")  # threads move last digits only
BY_DATASET = "by_dataset"  # a recipe's settings of each data set
RATES = ("trainer.rates.adapter", "trainer.rates.head")  # both are the recipe's `rate`
NOT_SETTINGS = (*FREE, *SEEDS, *COLUMNS, *ELSEWHERE)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run, or its first stages, scored.

    Attributes:
        path: the run's folder.
        table: "retrieval openmoji", "classification vtab", "classification few_shot oxford-pets".
        seed: the seed, and that of the training subset where there is one.
        settings: {dotted key: value} of the configuration, without seeds, paths, how data are loaded, and the data set;
            precision and batch size are those of run.json, of all processes. "after" is a stage, where the score is
            that of its end.
        scores: {column: percent}, for retrieval also "rsum".
        fingerprint: of the data.
        selection: which weights were taken, in words.
    """

    path: Path
    table: str
    seed: tuple[int, ...]
    settings: dict[str, Any]
    scores: dict[str, float]
    fingerprint: str
    selection: str


def read_results(places: Iterable[Path]) -> tuple[list[Result], dict[Path, str]]:
    """Every run in or below some folders.

    Returns:
        The results, and why other runs are not among them: {folder: reason}.

    Raises:
        FileNotFoundError: for a place that is no folder, or no run in all of them.
    """
    places, results, left_out = list(places), list[Result](), dict[Path, str]()
    for place in places:
        if not place.is_dir():
            raise FileNotFoundError(f"{place} is no folder; expected the folder of a run, or one that holds some")
    folders = {path.parent.resolve(): path.parent for place in places for path in sorted(place.rglob(CONFIG))}
    if not folders:
        raise FileNotFoundError(f"{', '.join(map(str, places))}: no folder of a run (with {CONFIG}) there")
    for folder in folders.values():
        if not (folder / FINISHED).is_file():
            left_out[folder] = "not finished"
            continue
        try:
            results += read_run(folder)
        except KeyError as error:
            left_out[folder] = f"cannot be read: it lacks {error}"
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            left_out[folder] = f"cannot be read: {' '.join(str(error).split())}"
    return _with_differing_data(results), left_out


def read_run(folder: Path) -> list[Result]:
    """The results of a finished run: of its end, and of the ends of earlier stages where metrics.json has them."""
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    metrics, described = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (FINISHED, "run.json"))
    for content, name in ((config, CONFIG), (metrics, FINISHED), (described, "run.json")):
        if not isinstance(content, Mapping):
            raise ValueError(f"{name} holds no settings by name")
    flat = flatten(at_root(config, "${root}"))
    task = "retrieval" if "rsum" in metrics["test"] else "classification"
    parts = [str(flat["data.name"])]
    if "data.shots" in flat:
        parts.append(str(flat["data.dataset"]))
    flat = _by_dataset(config, flat)
    settings = {
        key: value
        for key, value in flat.items()
        # What is null is as good as absent: an earlier version may not have had the setting.
        if value is not None and not f"{key}.".startswith(_below(NOT_SETTINGS))
    }
    settings["trainer.precision"] = described["precision"]
    settings["trainer.batch_size"] = described.get("batch_size", flat["trainer.batch_size"])
    result = Result(
        path=folder,
        table=" ".join([task, *parts]),
        seed=tuple(int(flat[key]) for key in SEEDS if key in flat),
        settings=settings,
        scores=_scores(metrics["test"], flat),
        fingerprint=described["data"]["fingerprint"],
        selection=described["selection"],
    )
    for key in ("model.name", "adapter.name", "regularizer.name"):
        settings[key]  # a KeyError says what the configuration lacks
    return [result, *_after_stages(result, config["trainer"]["stages"], metrics.get("after", {}), flat)]


def _by_dataset(config: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """The flat configuration, where what a recipe chooses for each data set is one setting of all of them.

    A row of Table 2 has its ranks, say, in `by_dataset`, and the run of a data set the one that belongs to it. A rate
    may be one for each number of shots.
    """
    if BY_DATASET not in config:
        return dict(flat)
    chosen = config[BY_DATASET]
    table = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
    own = dict(chosen.get(flat["data.dataset"], {}))
    rate = own.pop("rate", None)
    if isinstance(rate, Mapping):
        rate = rate[str(flat["data.shots"])]
    found = {}
    for key, value in flat.items():
        name = key.rpartition(".")[2]
        is_own = (name in own and own[name] == value) or (key in RATES and value == rate)
        if not key.startswith(f"{BY_DATASET}."):
            found[key] = f"by data set ({table})" if is_own else value
    return found


def _scores(test: Mapping[str, float], flat: Mapping[str, Any]) -> dict[str, float]:
    if "rsum" in test:
        return {key: float(test[key]) for key in (*RECALL_KEYS, "rsum")}
    column = flat.get("data.shots", flat.get("data.dataset", "accuracy"))
    return {str(column): float(test["accuracy"])}


def _after_stages(
    result: Result, stages: Mapping[str, Mapping[str, Any]], after: Mapping[str, Any], flat: Mapping[str, Any]
) -> list[Result]:
    """What a run had scored when an earlier stage ended; what only later stages use is none of its settings."""
    found = []
    names = list(stages)
    for stage, metrics in after.items():
        passed, later = names[: names.index(stage) + 1], names[names.index(stage) + 1 :]
        unused = _below(f"trainer.stages.{name}" for name in later)
        settings = {key: value for key, value in result.settings.items() if not key.startswith(unused)}
        if not any(stages[name]["regularize"] for name in passed):
            settings = {k: v for k, v in settings.items() if not k.startswith("regularizer.")}
            settings["regularizer.name"] = "none"
        scores = _scores(metrics["test"], flat)
        found.append(replace(result, settings=settings | {"after": stage}, scores=scores))
    return found


def _with_differing_data(results: list[Result]) -> list[Result]:
    """The same results; where one description of data stands for several fingerprints, they are settings as well."""
    found: dict[str, set[str]] = defaultdict(set)
    for result in results:
        found[_data(result)].add(result.fingerprint)
    return [
        replace(result, settings=result.settings | {"data.fingerprint": result.fingerprint[:12]})
        if len(found[_data(result)]) > 1
        else result
        for result in results
    ]


def _data(result: Result) -> str:
    data = {key: value for key, value in result.settings.items() if key.startswith("data.")}
    return json.dumps([result.table, result.seed[1:], sorted(result.scores), data], sort_keys=True, default=str)


def _below(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{key}." for key in keys)
