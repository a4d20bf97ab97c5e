"""Accuracy and cross-entropy against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import accuracy_score, log_loss

from eval import accuracy_metrics, chance_accuracy, render_accuracy


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_metrics_are_those_of_scikit_learn(scale: float) -> None:
    generator = np.random.default_rng(0)
    logits, labels = scale * generator.standard_normal((50, 7)), generator.integers(0, 7, 50)
    metrics = accuracy_metrics(logits, labels)
    assert metrics["accuracy"] == pytest.approx(100 * accuracy_score(labels, logits.argmax(1)))
    expected = log_loss(labels, softmax(logits, axis=1), labels=range(7))
    assert metrics["cross_entropy"] == pytest.approx(expected, rel=1e-6)


def test_a_constant_output_is_at_chance() -> None:
    assert accuracy_metrics(np.full((6, 4), 5.0), np.array([0, 0, 1, 2, 3, 3])) == pytest.approx(chance_accuracy(4))


def test_large_logits_do_not_overflow() -> None:
    metrics = accuracy_metrics(np.array([[1e5, 0.0], [1e5, 0.0]]), np.array([0, 1]))
    assert metrics == {"accuracy": 50.0, "cross_entropy": 5e4}


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), r"received \(3, 2\) and \(2,\)"),
        (np.zeros((0, 2)), np.zeros(0, int), r"received \(0, 2\)"),
        (np.zeros((2, 2)), np.array([0, 2]), "integers in 0..1"),
        (np.zeros((2, 2)), np.array([0.0, 1.0]), "integers in 0..1"),
        (np.array([[np.nan, 0.0]]), np.array([0]), "not finite"),
    ],
)
def test_bad_input_is_refused(logits: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy_metrics(logits, labels)


def test_the_table_shows_each_split_and_its_chance() -> None:
    chance = chance_accuracy(10)
    table = render_accuracy(
        {"test": {"accuracy": 97.04, "cross_entropy": 0.1234}, "chance": {"test": chance}, "redundancy": {}}
    )
    assert [line.split() for line in table.splitlines()] == [
        ["accuracy", "cross-entropy"], ["test", "97.0", "0.123"], ["chance", "10.0", "2.303"]
    ]  # fmt: skip
