"""The figure of docs/regularizers.md: python docs/regularizers_figure.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from regularizers import REGULARIZERS


def main() -> None:
    """Each measure for two subspaces, over the correlation of their activations and the cosine of their basis."""
    draws = np.random.default_rng(0).standard_normal((400, 2))
    first, second = np.linalg.qr(draws - draws.mean(axis=0))[0].T * 20  # centred, orthogonal, standard deviation 1
    correlations = np.linspace(-1, 1, 41)
    with matplotlib.rc_context({"svg.hashsalt": "resora", "font.size": 8}):
        figure = Figure(figsize=(9.5, 2.5), layout="constrained")
        axes = figure.subplots(1, len(REGULARIZERS), sharex=True, sharey=True)
        for axis, (name, measure) in zip(axes, REGULARIZERS.items(), strict=True):
            values = np.zeros((len(correlations), len(correlations)))
            for column, correlation in enumerate(correlations):
                mixed = correlation * first + np.sqrt(1 - correlation**2) * second
                activations = torch.tensor(np.stack([first, mixed], axis=1))
                for row, cosine in enumerate(correlations):
                    basis = torch.tensor([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]], dtype=torch.float64)
                    values[row, column] = measure(activations, basis)
            image = axis.imshow(values, origin="lower", extent=(-1, 1, -1, 1), vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set(title=name, xlabel="correlation of s_i and s_j", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        axes[0].set_ylabel("cosine of b_i and b_j")
        figure.colorbar(image, ax=axes, label="value of the pair", shrink=0.8)
        figure.savefig(Path(__file__).with_name("regularizers.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
