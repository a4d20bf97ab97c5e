"""Predict a split and hand the logits to `eval`."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from classification.images import LabelledImages
from classification.tokens import LabelledTokens
from eval import accuracy_metrics

Split = LabelledTokens | LabelledImages
"""Labelled inputs of a model in an order."""


@torch.inference_mode()
def predict(model: nn.Module, split: Split, *, batch_size: int = 128, precision: str = "float32") -> np.ndarray:
    """Logits of every image, float32 (n, C), in the split's order.

    The model is left in the mode (training or evaluation) that it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        logits = [
            model(**{name: tensor.to(device) for name, tensor in batch.items()})["logits"].float().cpu()
            for batch in split.batches(batch_size)
        ]
    model.train(was_training)
    return torch.cat(logits).numpy()


def evaluate(model: nn.Module, split: Split, *, precision: str = "float32") -> dict[str, float]:
    """Accuracy (percent) and cross-entropy (nats) of `model` on a split (see `eval.accuracy_metrics`)."""
    return accuracy_metrics(predict(model, split, precision=precision), split.labels.numpy())
