from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from retrieval.video.timed import Failure, timed_map


def act(value: str) -> str:
    if value == "hang":
        time.sleep(600)
    if value == "die":
        os._exit(3)
    if value == "fail":
        raise KeyError(value)
    return value.upper()


def test_one_bad_value_costs_its_own_result_only() -> None:
    values = ["a", "hang", "b", "die", "fail", "c"]
    started = time.monotonic()
    outcomes = dict(timed_map(act, values, workers=1, seconds=1.0))
    assert time.monotonic() - started < 60
    assert [outcomes[position] for position in (0, 2, 5)] == ["A", "B", "C"]
    reasons = [outcomes[position].reason for position in (1, 3, 4)]
    assert reasons[0] == "it took more than 1 s"
    assert "died (exit code 3)" in reasons[1]
    assert reasons[2] == "KeyError: 'fail'"


def test_in_this_process() -> None:
    assert list(timed_map(act, ["a", "fail"], workers=0, seconds=1.0)) == [(0, "A"), (1, Failure("KeyError: 'fail'"))]


@pytest.mark.parametrize(("workers", "seconds"), [(-1, 1.0), (1, 0.0)])
def test_refused(workers: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        list(timed_map(act, ["a"], workers=workers, seconds=seconds))


def test_no_process_is_left(tmp_path: Path) -> None:
    from multiprocessing import active_children

    calls = timed_map(act, ["a", "b", "c"], workers=1, seconds=5.0)
    next(calls)
    assert active_children()
    calls.close()
    assert not active_children()
