"""Writing into a folder of features: one process at a time, nobody's are replaced, and a text is there as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from retrieval.locking import only_writer


@contextmanager
def only_writer_of(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Make `folder`, and hold the locks of new feature files in it, which an extraction holds too; wait for others.

    Args:
        folder: of the files.
        names: such as "train_ims.npy".

    Raises:
        ValueError: one is there, now or when its lock is free, or an extraction of it has begun.
    """
    names = sorted(names)  # so that two who want several wait for them in one order
    taken = [*names, *(f"{name}.journal" for name in names)]
    refuse_to_replace(folder, taken)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(only_writer(folder / f"{name}.lock"))
        refuse_to_replace(folder, taken)
        yield


def refuse_to_replace(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError if a file is there already: nobody's features are overwritten."""
    if there := [name for name in names if (folder / name).exists()]:
        raise ValueError(f"{folder} already holds {', '.join(there)}; delete them, or choose another --output")


def write_whole(path: Path, text: str) -> None:
    """Write a text file; whoever is killed meanwhile leaves what was there before."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two extractions may end at the same time
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
