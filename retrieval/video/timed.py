"""Call a function on many values in worker processes, with a limit on the time of each call.

A decoder that hangs inside C hears no exception and no signal of Python's; what ends it is the end of its process. Only
that call is lost, and a new process takes the next value.
"""

from __future__ import annotations

import math
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any, TypeVar

Value = TypeVar("Value")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """A call without a result, and why: it took too long, its process died, or it raised an error."""

    reason: str


def timed_map(
    function: Callable[[Value], Result], values: Sequence[Value], *, workers: int, seconds: float
) -> Iterator[tuple[int, Result | Failure]]:
    """Yield (position in `values`, result or `Failure`) of every call, in the order in which they end.

    The processes share nothing with this one, so a script that comes here needs its `if __name__ == "__main__":`.

    Args:
        function: a function of a module, or a partial of one: it is pickled, as are values and results.
        values: its arguments.
        workers: processes; 0 calls in this process, without a limit.
        seconds: the longest that one call may take.

    Raises:
        ValueError: `workers` or `seconds` is out of range.
        RuntimeError: a process ended before its first call, so that no other would fare better.
    """
    if workers < 0 or not seconds > 0:
        raise ValueError(f"workers={workers}, seconds={seconds}; expected 0 processes or more, and a positive time")
    if workers == 0:
        yield from ((position, _called(function, value)) for position, value in enumerate(values))
        return
    waiting = deque(enumerate(values))
    team = [_Worker(function) for _ in range(min(workers, len(values)))]
    try:
        while team:
            left = min(worker.deadline for worker in team) - monotonic()
            ready = wait([worker.connection for worker in team], None if left == math.inf else max(left, 0.0))
            for place, worker in reversed(list(enumerate(team))):
                if worker.connection not in ready and monotonic() < worker.deadline:
                    continue
                position, outcome = worker.position, worker.outcome(seconds)
                if not waiting:
                    team.pop(place).end()
                else:
                    if isinstance(outcome, _Gone):
                        worker.end()
                        team[place] = worker = _Worker(function)
                    if worker.ready:
                        worker.give(*waiting.popleft(), seconds)
                if position is not None:
                    yield position, Failure(outcome.reason) if isinstance(outcome, _Gone) else outcome
    finally:
        for worker in team:
            worker.end()


class _Gone(Failure):
    """A failure that leaves no process to go on with."""


class _Worker:
    """A process that calls `function` on what it is sent."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = _context(function)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False  # until it says so: its imports take seconds, and are not the file's fault
        self.position: int | None = None
        self.deadline = math.inf

    def give(self, position: int, value: Any, seconds: float) -> None:
        with suppress(OSError):  # it died just now: `outcome` will find that out
            self.connection.send(value)
        self.position, self.deadline = position, monotonic() + seconds

    def outcome(self, seconds: float) -> Any:
        """What came of the call; the first message says only that the process is ready."""
        position, self.position, self.deadline = self.position, None, math.inf
        if not self.connection.poll():
            return _Gone(f"it took more than {seconds:g} s")
        try:
            received = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(timeout=5)
            if position is None:
                raise RuntimeError(
                    f"a reading process ended at its start (exit code {self.process.exitcode}); "
                    'does the script that runs have its `if __name__ == "__main__":`?'
                ) from error
            return _Gone(f"the process that read it died (exit code {self.process.exitcode})")
        self.ready = True
        return received

    def end(self) -> None:
        self.process.kill()
        self.process.join(timeout=5)  # a process that waits for a dead network drive cannot even be killed
        self.connection.close()


def _context(function: Callable[[Any], Any]) -> Any:
    """How processes are started: not forked from this one, whose other threads may hold locks just then.

    They are forked from a server that has imported the function's module, and torch with it, once for all of them.
    """
    if "forkserver" not in get_all_start_methods():  # Windows
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, getattr(function, "func", function).__module__])  # func: of a partial
    return context


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    connection.send(None)
    try:
        while True:
            connection.send(_called(function, connection.recv()))
    except (EOFError, OSError):
        return  # the parent is gone


def _called(function: Callable[[Value], Result], value: Value) -> Result | Failure:
    try:
        return function(value)
    except Exception as error:  # whatever a decoder raises: one value's failure, told by name
        return Failure(f"{type(error).__name__}: {error}")
