"""VSE-infinity's region encoder against numpy, under both protocols, and its published sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from retrieval.vse_infty import RegionEncoder, VSEInfinity, VSEInfinityConfig

D_REGION, HIDDEN, WIDTH = 7, 5, 6


def encoder(padding_in_statistics: bool) -> RegionEncoder:
    torch.manual_seed(0)
    made = RegionEncoder(
        D_REGION, VSEInfinityConfig(embed_dim=WIDTH, hidden_dim=HIDDEN, padding_in_statistics=padding_in_statistics)
    )
    with torch.no_grad():  # a fresh norm is the identity: let its parameters and running statistics matter
        for tensor in (made.mlp[1].weight, made.mlp[1].bias, made.mlp[1].running_mean):
            tensor.copy_(torch.randn(HIDDEN))
        made.mlp[1].running_var.copy_(torch.rand(HIDDEN) + 0.5)
    made.double().pool.float()  # GPO's weights are float32 always
    return made


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class ByHand:
    """The published equations in numpy, one image and one region at a time."""

    def __init__(self, module: RegionEncoder) -> None:
        self.p = {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def gru(self, x: np.ndarray, suffix: str) -> np.ndarray:
        """Hidden states (K, 32); the equations of torch.nn.GRU's documentation."""
        w_i, w_h, b_i, b_h = (
            self.p[f"pool.gru.{n}_l0{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        state, states = np.zeros(w_h.shape[1]), []
        for step in x:
            (i_r, i_z, i_n), (h_r, h_z, h_n) = np.split(w_i @ step + b_i, 3), np.split(w_h @ state + b_h, 3)
            reset, update = sigmoid(i_r + h_r), sigmoid(i_z + h_z)
            state = (1 - update) * np.tanh(i_n + reset * h_n) + update * state
            states.append(state)
        return np.stack(states)

    def pool(self, features: np.ndarray) -> np.ndarray:
        count = len(features)
        position = np.array(
            [[(math.sin, math.cos)[j % 2](k / 10000 ** (2 * (j // 2) / 32)) for j in range(32)] for k in range(count)]
        )
        hidden = (self.gru(position, "") + self.gru(position[::-1], "_reverse")[::-1]) / 2
        scores = hidden @ self.p["pool.score.weight"][0] / 0.1
        weights = np.exp(scores - scores.max())
        return weights / weights.sum() @ -np.sort(-features, axis=0)

    def __call__(self, images: list[np.ndarray], *, train: bool, count_padding: bool) -> np.ndarray:
        longest = max(map(len, images))
        hidden = [self.linear("mlp.0", image) for image in images]
        if train:
            rows = np.concatenate(hidden)
            if count_padding:  # a zero region comes out of the first layer as its bias
                blank = longest * len(images) - len(rows)
                rows = np.concatenate([rows, np.tile(self.p["mlp.0.bias"], (blank, 1))])
            mean, variance = rows.mean(0), rows.var(0)
            for key, value in (("mean", mean), ("var", rows.var(0, ddof=1))):
                self.p[f"mlp.1.running_{key}"] = 0.9 * self.p[f"mlp.1.running_{key}"] + 0.1 * value
        else:
            mean, variance = self.p["mlp.1.running_mean"], self.p["mlp.1.running_var"]
        out = []
        for image, before in zip(images, hidden, strict=True):
            normed = (before - mean) / np.sqrt(variance + 1e-5) * self.p["mlp.1.weight"] + self.p["mlp.1.bias"]
            pooled = self.pool(self.linear("mlp.3", np.maximum(normed, 0)) + self.linear("fc", image))
            out.append(pooled / np.linalg.norm(pooled))
        return np.stack(out)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("as_published", [False, True])
def test_equals_numpy(as_published: bool, train: bool) -> None:
    module = encoder(as_published).train(train)
    by_hand = ByHand(module)
    random = np.random.default_rng(1)
    images = [random.standard_normal((count, D_REGION)) for count in (4, 1, 6)]
    padded = torch.zeros(3, 6, D_REGION, dtype=torch.float64)
    for row, image in zip(padded, images, strict=True):
        row[: len(image)] = torch.from_numpy(image)
    found = module(padded, torch.tensor([4, 1, 6])).detach().numpy()
    np.testing.assert_allclose(found, by_hand(images, train=train, count_padding=as_published), atol=1e-6)
    for key in ("running_mean", "running_var"):
        np.testing.assert_allclose(getattr(module.mlp[1], key).numpy(), by_hand.p[f"mlp.1.{key}"], atol=1e-9)


def test_the_protocols_differ_where_images_are_padded_and_nowhere_else() -> None:
    regions = torch.randn(3, 6, D_REGION, dtype=torch.float64)
    for lengths, same in (([6, 6, 6], True), ([4, 1, 6], False)):
        blanked = regions * (torch.arange(6)[None, :, None] < torch.tensor(lengths)[:, None, None])
        found = [encoder(option).train()(blanked, torch.tensor(lengths)) for option in (False, True)]
        assert torch.allclose(*found) == same
        found = [encoder(option).eval()(blanked, torch.tensor(lengths)) for option in (False, True)]
        assert torch.allclose(*found)


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = VSEInfinity(BertModel(BertConfig(), add_pooling_layer=False), d_region=2048)

    def size(path: str) -> int:
        return sum(parameter.numel() for parameter in model.get_submodule(path).parameters())

    assert size("image") == 3_688_352 - 2_048  # published with a batch norm that is built and never used
    assert size("image.fc") == 2_098_176 and size("image.mlp") == 1_577_472 - 2_048
    assert size("image.pool") == size("text.pool") == 12_704
    assert size("text.linear") == 787_456 and size("text.bert") == 108_891_648
