"""The front of every command: `--help` with examples, and a suggestion, not a stack trace, for a mistyped word."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parent / "conf"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its load report names BERT's unused pooler as a problem
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here asks a hub; without it transformers would try


def launch(main: Callable[[dict[str, Any]], None], name: str, help_text: str) -> None:
    """Compose `conf/<name>.yaml` with the command line's overrides and call `main` with the plain nested configuration.

    `--multirun` and every other flag of Hydra work. What a user got wrong (ValueError, a missing file) is printed in
    one line and ends with exit code 2; anything else is a bug and keeps its stack trace.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(help_text.strip() + "\n\n" + _choices(name))
        return
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    sweep = {"-m", "--multirun"} & set(arguments)

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def run(config: DictConfig) -> None:
        try:
            main(plain(config))
        except (ValueError, FileNotFoundError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)  # here: around `run`, Hydra has printed a stack trace already

    try:
        if not sweep:
            with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
                plain(hydra.compose(name, overrides))
        run()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(_explain(str(error), overrides, name))


def plain(config: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def groups(name: str) -> dict[str, list[str]]:
    """The configuration groups of a command and the choices in each, from its defaults list."""
    defaults = cast(DictConfig, OmegaConf.load(CONF / f"{name}.yaml")).defaults
    used = [str(group) for entry in defaults if isinstance(entry, DictConfig) for group in entry]
    return {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in used}


def _choices(name: str) -> str:
    lines = [f"  {group}={'|'.join(options)}" for group, options in groups(name).items()]
    return (
        "Groups:\n" + "\n".join(lines) + "\n\nEvery key of a group can be set: trainer.batch_size=64 adapter.rank=4 ..."
    )


def _explain(message: str, overrides: list[str], name: str) -> str:
    """The override that does not fit, and the closest one that would."""
    known = groups(name)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        keys = _keys(plain(hydra.compose(name))) + list(known)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in known and value not in known[key]:
            close = difflib.get_close_matches(value, known[key], n=1)
            hint = f"; did you mean {key}={close[0]}?" if close else ";"
            return f"error: unknown {key} {value!r}{hint} choose from {', '.join(known[key])}"
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
