"""The front of every command: `--help` with examples, and a suggestion, not a stack trace, for a mistyped word."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from mistakes import mistakes_in_one_line, stop
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from sweep import Sweep, check_jobs, jobs_of

CONF = Path(__file__).parent / "conf"


def launch(
    main: Callable[[dict[str, Any]], None],
    name: str,
    help_text: str,
    *,
    choices: Mapping[str, Iterable[str]] | None = None,
    words: Mapping[str, Callable[[dict[str, Any]], None]] | None = None,
    check: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Compose `conf/<name>.yaml` with the command line's overrides and call `main` with the plain nested configuration.

    Commands share the folders of `conf`; `choices` names what fits this one, for each group where not everything does.
    `words` are further things that the command can do, named by a bare word before the overrides ("verify"). `check`
    raises ValueError for a configuration that `main` would refuse; a sweep asks it about every job before the first.

    `--multirun` and every other flag of Hydra work. What a user got wrong (ValueError, a missing file) is printed in
    one line and ends with exit code 2; anything else is a bug and keeps its stack trace. In a sweep a job that fails
    ends no other, and the list of them comes last, with exit code 2.
    """
    main = _take_word(words or {}) or main
    arguments = sys.argv[1:]
    known = groups(name, choices or {})
    if {"-h", "--help"} & set(arguments):
        print(help_text.strip() + "\n\n" + _choices(known))
        return
    given = _parse(arguments)
    if given.multirun and given.cfg:
        stop("error: --cfg prints the configuration of one run: leave --multirun out, and give each setting one value")
    overrides: list[str] = given.overrides
    other_folders = given.config_dir or given.config_path or given.config_name  # which may hold more to choose from
    if not other_folders and (message := _unknown_choice(overrides, known)):
        stop(message)

    # Of several processes each runs the whole sweep: one that went on alone would leave the others waiting for it.
    sweep = Sweep(main) if given.multirun and int(os.environ.get("WORLD_SIZE", "1")) == 1 else None

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def run(config: DictConfig) -> None:
        if sweep:
            sweep.run(plain(config))
            return
        with mistakes_in_one_line():  # here: around `run`, Hydra has printed a stack trace already
            main(plain(config))

    try:
        if overrides == arguments:  # a flag may ask for a sweep, or for something else than a run
            compose(name, overrides)
        if given.multirun and not other_folders:
            replaced = dict(zip(overrides, _for_each_job(overrides, name), strict=True))
            sys.argv = [replaced.get(argument, argument) for argument in sys.argv]
        own_sweeper = any(override.startswith("hydra/sweeper") for override in overrides)
        if given.multirun and not (other_folders or own_sweeper):
            check_jobs(jobs_of(overrides), lambda job: (check or dict)(compose(name, job)))
        run()
        if sweep:
            sweep.finish()
    except (HydraException, OmegaConfBaseException) as error:
        stop(_explain(str(error), overrides, name, known))


def compose(name: str, overrides: list[str]) -> dict[str, Any]:
    """The configuration that a command would get from these overrides."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return plain(hydra.compose(name, overrides))


def plain(config: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def groups(name: str, choices: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """The configuration groups of a command and the choices in each, from its defaults list and those of its groups.

    `choices` narrows a group to the files that are called, or whose `name` is, one of its names.
    """
    found: dict[str, list[str]] = {}
    waiting = _groups_of(CONF / f"{name}.yaml")
    while waiting:
        group = waiting.pop(0)
        fitting = choices.get(group)
        files = sorted((CONF / group).glob("*.yaml"))
        files = [file for file in files if fitting is None or {file.stem, _name(file)} & set(fitting)]
        found[group] = [file.stem for file in files]
        inner = dict.fromkeys(f"{group}/{below}" for file in files for below in _groups_of(file))  # trainer/schedule
        waiting = [*inner, *waiting]
    return found


def _groups_of(file: Path) -> list[str]:
    """The groups in the defaults list of a configuration file that can be chosen from.

    Not those that follow another group's choice, nor choices in groups of other files.
    """
    entries = cast(DictConfig, OmegaConf.load(file)).get("defaults") or []
    used = [str(group) for entry in entries if isinstance(entry, DictConfig) for group in entry]
    return [group for group in used if not group.startswith(("optional ", "override "))]


def _name(file: Path) -> str:
    """The key `name` of a configuration file, or ""."""
    return str(cast(DictConfig, OmegaConf.load(file)).get("name", ""))


def _take_word(words: Mapping[str, Callable[[dict[str, Any]], None]]) -> Callable[[dict[str, Any]], None] | None:
    """What the bare word among the arguments stands for, if there is one; it is taken out, as Hydra knows no words."""
    bare = [argument for argument in _parse(sys.argv[1:]).overrides if re.fullmatch(r"\w+", argument)] if words else []
    for word in bare:
        if word not in words:
            close = difflib.get_close_matches(word, words, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected {' or '.join(words)}, or settings like data=..."
            stop(f"error: unknown word {word!r}; {hint}")
        sys.argv.remove(word)
    return words[bare[-1]] if bare else None


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The flags and the overrides, as Hydra tells them apart: what follows --cfg is no override."""
    return cast(argparse.Namespace, get_args_parser().parse_known_args(arguments)[0])


def _choices(known: dict[str, list[str]]) -> str:
    lines = [f"  {group}={'|'.join(options)}" for group, options in known.items()]
    if lines:
        lines = [
            *("Groups:", *lines, ""),
            "Every key of a group can be set: trainer.batch_size=64 adapter.rank=4 ...",
        ]
    return "\n".join([*lines, "RESORA_TRACEBACK=1 in the environment shows where an error comes from."])


def _unknown_choice(overrides: list[str], known: dict[str, list[str]]) -> str | None:
    """The choice of a group that there is not, or not for this command, and the closest one that there is."""
    for override in overrides:
        group, _, values = override.partition("=")
        for value in values.split(",") if group in known else []:  # commas: a sweep
            if re.fullmatch(r"\w+", value) and value not in known[group]:
                close = difflib.get_close_matches(value, known[group], n=1)
                hint = f"; did you mean {group}={close[0]}?" if close else ";"
                return f"error: unknown {group} {value!r}{hint} choose from {', '.join(known[group])}"
    return None


def _for_each_job(overrides: list[str], name: str) -> list[str]:
    """The overrides of a sweep, in which settings that only some choice has ("data.dataset", by "table2") vary too.

    Hydra sets what is the same in all jobs before it has chosen what differs, where such a setting is not there yet.
    """
    keys = [*_keys(compose(name, [])), *groups(name, {})]
    found: list[str] = []
    for parsed, override in zip(OverridesParser.create().parse_overrides(overrides), overrides, strict=True):
        key, _, value = override.partition("=")
        same = parsed.type == OverrideType.CHANGE and not parsed.is_sweep_override()
        new = same and not parsed.is_hydra_override() and key not in keys
        found.append(f"{key}=choice({value})" if new else override)
    return found


def _explain(message: str, overrides: list[str], name: str, known: dict[str, list[str]]) -> str:
    """The override that does not fit, and the closest one that would."""
    chosen = [override.split(",")[0] for override in overrides if override.partition("=")[0] in known]
    keys = _keys(compose(name, chosen)) + list(known)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}={value}?" if close else "see --help"
            return f"error: there is no setting {key!r}; {hint}"
    return "error: " + re.sub(r"\s+", " ", message)


def _keys(config: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{key}.")
    return keys
