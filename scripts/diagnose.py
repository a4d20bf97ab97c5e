"""How redundant the subspaces of a trained adapter are: a table by layer, and the heat maps of the paper's Figure 1a.

    python scripts/diagnose.py runs/retrieval/openmoji/vse_infty/lora/linear/seed0
    python scripts/diagnose.py lora.safetensors resora.safetensors --layer "layer\\.5\\." --output compared.png
    python scripts/diagnose.py RUN --layer "value\\.v$"      # heat maps of the value of every layer

PATH is one of three: an adapter file of this suite (.safetensors) or a folder that Hugging Face PEFT saved, which are
measured on weights, the identity in place of data; or a run's folder, which is measured on the features of validation
data and drawn after its first stage and at its end. Two are drawn side by side, on features if both are runs.

Drawn is the last query, as in the paper's Figure 1a, or the last layer where no query is adapted; --layer draws others.
The paper prints no formula for that figure: |cos| of two subspaces' activations, the square root of the term that Eq. 7
sums, is our reading.

The table: the mean of |cos| between two subspaces (0: nothing in common, 1: alike), the effective rank (how many
dimensions the update uses) and the dead components (at most 1 % of the layer's largest).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import yaml
from mistakes import mistakes_in_one_line

from adapters import stored_subspaces
from adapters.peft_folder import PEFT_CONFIG
from adapters.stored import StoredSubspaces
from eval.diagnosis import csv_of, diagnose, render_diagnosis
from eval.figures import LIGHT, Matrix, redundancy_figure, to_png
from eval.redundancy import common_prefix
from regularizers import Subspaces, redundancy
from regularizers.diagnostics import mean_off_diagonal
from training.run import WEIGHTS as ADAPTER
from training.run import Unrestorable

WEIGHTS = "weights"
COLUMNS = 3  # of heat maps of one adapter
QUERY = re.compile(r"(^|[._])q(uery)?(_proj)?$")  # our role; the layers that PEFT adapts
EXPECTED = (
    f"expected an adapter file of this suite (.safetensors), a folder that PEFT saved ({PEFT_CONFIG} and "
    f"adapter_model.safetensors) or the folder of a finished run (config.yaml, run.json, {ADAPTER})"
)


class Measured(NamedTuple):
    """The subspaces of each layer, and on what they were measured."""

    on: str
    layers: dict[str, Subspaces]


def main(arguments: argparse.Namespace) -> None:
    paths: list[Path] = arguments.paths
    output = arguments.output or (paths[0] if len(paths) == 1 and is_run(paths[0]) else Path()) / "redundancy.png"
    check_target(output, ".png", "--output")
    if arguments.csv:
        check_target(arguments.csv, ".csv", "--csv")
    stored = one_naming([finite(path, stored_subspaces(adapter_of(path))) for path in paths])
    drawn = layers_to_draw(stored, paths, arguments.layer)

    measured = measure(paths, stored)
    diagnoses = [(str(path), one.on, diagnose(one.layers)) for path, one in zip(paths, measured, strict=True)]
    for (source, on, layers), file in zip(diagnoses, stored, strict=True):
        print(f"{source}, on {on}\n{render_diagnosis(layers)}")
        if file.rest:
            few = ", ".join(file.rest[:3]) + (", ..." if len(file.rest) > 3 else "")
            print(f"not in the table: {len(file.rest)} tensors that are no low-rank part of a linear layer: {few}")
        print()
    if arguments.csv:
        arguments.csv.write_text(csv_of(diagnoses), encoding="utf-8")
        print(f"table      {arguments.csv}")
    if not drawn:
        print("no heat map: no layer has a pair of subspaces" + (" in both" if len(paths) > 1 else ""))
        return
    on, maps = heat_maps(paths, measured, drawn)
    output.write_bytes(to_png(redundancy_figure(*panels(on, maps, drawn), LIGHT)))
    print(f"heat maps  {output} ({len(drawn)} of {len(measured[0].layers)} layers, on {on})")


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def adapter_of(path: Path) -> Path:
    """The file or PEFT folder that holds a path's adapter; raises an error that says what came if it is none."""
    if is_run(path):
        if not (path / ADAPTER).is_file():
            raise FileNotFoundError(
                f"{path} is a run that has not finished: it holds no {ADAPTER}. Launch its command again, or name the "
                f"{ADAPTER} of one of its checkpoints"
            )
        return path / ADAPTER
    if path.is_dir() and not (path / PEFT_CONFIG).is_file():
        names = sorted(entry.name for entry in path.iterdir())
        held = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
        hint = f"name {path / ADAPTER}, or else " if ADAPTER in names else ""
        raise ValueError(f"{path} is a folder that holds {held}; {hint}{EXPECTED}")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; {EXPECTED}")
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(f"{path} is a file that does not end in .safetensors; {EXPECTED}")
    return path


def check_target(path: Path, suffix: str, option: str) -> None:
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"{option} is {path}; expected the name of a {suffix} file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} is {path}, but there is no folder {path.parent}; make it first")


def finite(path: Path, stored: StoredSubspaces) -> StoredSubspaces:
    for name, pair in stored.items():
        if not all(bool(tensor.isfinite().all()) for tensor in pair):
            raise ValueError(f"{path} holds values of {name} that are not finite: its training diverged")
    return stored


def one_naming(stored: Sequence[StoredSubspaces]) -> list[StoredSubspaces]:
    """Layers under one name where only our role sets a file of this suite, "query.q", apart from PEFT's, "query"."""
    names = set.intersection(*map(set, stored))
    plain = [[name.rpartition(".")[0] for name in file] for file in stored]
    if names:
        return list(stored)
    for ours, short in zip(stored, plain, strict=True):
        if len(set(short)) == len(short) and any(set(short) & set(file) for file in stored if file is not ours):
            renamed = StoredSubspaces(dict(zip(short, ours.values(), strict=True)), ours.rest)
            return [renamed if file is ours else file for file in stored]
    return list(stored)


def layers_to_draw(stored: Sequence[StoredSubspaces], paths: Sequence[Path], pattern: str | None) -> list[str]:
    """The layers of two subspaces or more that all adapters share and the pattern is found in.

    Without a pattern the last query, which the paper draws, or else the last layer.

    Raises:
        ValueError: if there is none that is shared, or the pattern is in none.
    """
    shared = [name for name in stored[0] if all(name in file for file in stored)]
    if not shared:
        each = "; ".join(
            f"{path} has {', '.join(list(file)[:2])}, ..." for path, file in zip(paths, stored, strict=True)
        )
        raise ValueError(f"the two share no layer, so there is nothing to compare: {each}. Diagnose each on its own")
    names = [name for name in shared if all(len(file[name][1]) > 1 for file in stored)]
    if pattern is None or not names:
        return ([name for name in names if QUERY.search(name)] or names)[-1:]
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"--layer is {pattern!r}, which is no regular expression: {error}") from None
    if not found:
        raise ValueError(f"--layer {pattern!r} is found in no layer to draw; they are {', '.join(names[:4])}, ...")
    return found


def measure(paths: Sequence[Path], stored: Sequence[StoredSubspaces]) -> list[Measured]:
    """On features if every path is a run whose data are here, and else on weights; both alike, so that they compare."""
    runs = [path for path in paths if is_run(path)]
    if len(runs) == len(paths):
        try:
            return [on_features(path, list(file)) for path, file in zip(paths, stored, strict=True)]
        except (FileNotFoundError, ConnectionError, ImportError, Unrestorable) as error:
            print(f"note: on weights, because the run cannot be put together again here ({error})")
            for path in runs:
                print_recorded(path)
            print()
    elif runs:
        print(f"note: on weights, because of the two only {runs[0]} is a run, which has data\n")
    return [Measured(WEIGHTS, {name: Subspaces(*pair) for name, pair in file.items()}) for file in stored]


def on_features(run: Path, layers: Sequence[str]) -> Measured:
    """The subspaces of `layers` on the validation data that the run itself was probed with, from its adapter file.

    Raises:
        FileNotFoundError, ConnectionError, ImportError: if data or encoders are not here.
        Unrestorable: if another version wrote its configuration, or the data are others.
        ValueError: for data that no task knows.
    """
    # Imported where a run is named: the tasks take ten seconds that a table on weights does not need.
    from classification.assemble import restore as restore_classifier
    from classification.data import DATASETS as CLASSIFICATION
    from classification.train import probe as probe_images
    from retrieval.assemble import restore
    from retrieval.data import DATASETS as RETRIEVAL
    from retrieval.train import probe

    config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if threads := (read_json(run / "run.json") or {}).get("threads"):
        torch.set_num_threads(threads)
    name = (config.get("data") or {}).get("name") if isinstance(config, dict) else None
    if name not in {**RETRIEVAL, **CLASSIFICATION}:
        raise ValueError(f"{run} has data={name}, which no task here knows; for weights, name {run / ADAPTER}")
    if name in RETRIEVAL:
        splits, model, captions = restore(run)
        held_out = "validation" if len(splits["validation"]) else "train"
        on = "validation pairs" if held_out == "validation" else "training pairs"
        captured = probe(model, splits[held_out], captions[held_out])
    else:
        _, images, classifier = restore_classifier(run)
        on = f"{'validation' if len(images['validation']) else 'training'} images"
        captured = probe_images(classifier, images)
    return Measured(f"features ({on})", {layer: captured[layer] for layer in layers})


def read_json(path: Path) -> Any:
    """The content of a file, or None where it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def print_recorded(run: Path) -> None:
    if recorded := read_json(run / "redundancy.json"):
        before, after = (np.mean([mean_off_diagonal(m) for m in recorded[w].values()]) for w in ("before", "after"))
        print(f"on features, as {run} recorded it: {before:.3f} after the first stage, {after:.3f} at the end")


def heat_maps(
    paths: Sequence[Path], measured: Sequence[Measured], layers: Sequence[str]
) -> tuple[str, list[tuple[str, Mapping[str, Matrix]]]]:
    """On what, and one or two columns: a title, and the matrix of each layer."""
    if len(paths) == 1 and is_run(paths[0]) and (recorded := read_json(paths[0] / "redundancy.json")):
        before, after = recorded["before"], recorded["after"]
        if all(name in before and name in after for name in layers):
            on = "features" if measured[0].on == WEIGHTS else measured[0].on
            if before == after:  # one stage
                return on, [("at the end", after)]
            return on, [("after the first stage", before), ("at the end", after)]
    titles = distinct(paths) if len(paths) > 1 else [""]
    maps = [{name: redundancy(one.layers[name]).tolist() for name in layers} for one in measured]
    return measured[0].on, list(zip(titles, maps, strict=True))


def distinct(paths: Sequence[Path]) -> list[str]:
    """What tells two paths apart: "none" and "linear" of lora/none/seed0 and lora/linear/seed0."""
    parts = [list(path.parts) for path in paths]
    while min(map(len, parts)) > 1 and parts[0][0] == parts[1][0]:
        parts = [part[1:] for part in parts]
    while min(map(len, parts)) > 1 and parts[0][-1] == parts[1][-1]:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]


def panels(
    on: str, maps: Sequence[tuple[str, Mapping[str, Matrix]]], layers: Sequence[str]
) -> tuple[str, list[list[tuple[str, Matrix]]]]:
    """Heading and rows of the figure: a row for each layer of two adapters, a grid for one."""
    several = len(layers) > 1
    prefix = common_prefix(layers) if several else ""
    heading = f"Redundancy on {on}: " + (f"{prefix}*" if several else layers[0])
    rows = [
        [("\n".join(filter(None, (title, name.removeprefix(prefix) if several else ""))), by_layer[name])
         for title, by_layer in maps]
        for name in layers
    ]  # fmt: skip
    if len(maps) == 1:
        row = [panel for only in rows for panel in only]
        rows = [row[start : start + COLUMNS] for start in range(0, len(row), COLUMNS)]
    return heading, rows


class Parser(argparse.ArgumentParser):
    """Errors in one line, as those of the other commands."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="one, or two to compare")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help="heat maps; default: redundancy.png, in the folder of the run "
        "that is named alone, or else here"
    )  # fmt: skip
    parser.add_argument(
        "--layer", metavar="PATTERN", help="regular expression of the layers to draw; default: the last query"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="write the table here too, unrounded")
    arguments = parser.parse_args(words)
    if len(arguments.paths) > 2:
        parser.error(f"{len(arguments.paths)} paths; expected one, or two to compare")
    return arguments


if __name__ == "__main__":
    arguments = parse()
    with mistakes_in_one_line():
        main(arguments)
