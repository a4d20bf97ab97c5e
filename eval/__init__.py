"""Embeddings in, trustworthy numbers out: exact search, ranks, retrieval metrics, chance, a run's report.

The way of the data, one idea a file:

    inputs       what comes in, checked: unit rows, and which image each caption belongs to
    index        exact inner products, streamed (the only module that imports faiss)
    ranks        scores -> where each query's best right answer stands, ties in a random order
    metrics      standings -> R@1, R@5, R@10, MedR, MeanR in both directions and Rsum
    chance       the same keys for a random ranking, in closed form
    folds        their means over folds of a split (COCO's 1K numbers)
    accuracy     logits -> accuracy and cross-entropy, their chance and table (classification)
    vtab         accuracies of VTAB-1K's data sets -> the averages that its tables print
    tables       metrics -> plain text
    diagnosis    subspaces of each layer -> redundancy, effective rank, dead components, as a table
    report       a run folder -> one HTML page, from run_folder, history, figures, redundancy and pictures

Nothing here knows of models or training. `from eval.report import write_report` is kept apart because it imports
matplotlib and jinja2, which an evaluation inside a training loop does not need.
"""

from __future__ import annotations

from eval.accuracy import accuracy_metrics, chance_accuracy, render_accuracy
from eval.chance import chance_level
from eval.index import top_k, top_k_of_scores
from eval.metrics import retrieval_metrics, score_metrics
from eval.tables import render_table

__all__ = [
    "accuracy_metrics",
    "chance_accuracy",
    "chance_level",
    "render_accuracy",
    "render_table",
    "retrieval_metrics",
    "score_metrics",
    "top_k",
    "top_k_of_scores",
]
