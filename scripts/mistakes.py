"""What a command prints besides its results: a user's mistake in one line, and nothing of what libraries have to say.

A mistake ends with exit code 2; anything else is a bug and keeps its stack trace.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its load report names BERT's unused pooler as a problem
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here asks a hub; without it transformers would try

MISTAKES = (ValueError, FileNotFoundError, FloatingPointError)


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Print what a user got wrong (`MISTAKES`) in one line and end with exit code 2.

    With RESORA_TRACEBACK=1 in the environment, the stack trace stays: for a mistake that is ours.
    """
    try:
        yield
    except MISTAKES as error:
        if os.environ.get("RESORA_TRACEBACK"):
            raise
        stop(f"error: {error}")


def stop(message: str) -> NoReturn:
    """Print what a user got wrong and end with exit code 2."""
    print(message, file=sys.stderr)
    sys.exit(2)
