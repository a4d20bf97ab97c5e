"""Tokens of frozen blocks: computed once for their images and weights, and kept on the disk, not in memory."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from vtab_folder import write_vtab

from classification.data import Vtab
from classification.data.verification import spaced
from classification.tokens import LabelledTokens, cached_tokens, compute_tokens


class Pictures:
    """`count` random pictures of two classes."""

    name = "pictures"
    fingerprint = "pictures"

    def __init__(self, count: int = 150) -> None:
        self.labels = np.arange(count) % 2

    def images(self, indices: np.ndarray) -> Tensor:
        return torch.stack(
            [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(int(index))) for index in indices]
        )


class Frozen(nn.Module):
    """So many tokens of three numbers: the channels' means, times one to so many and a weight.

    Args:
        tokens: of an image.
        last: of so many batches; the next one fails.
    """

    def __init__(self, tokens: int = 5, last: int = 10) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.tokens, self.last = tokens, last
        self.seen: list[tuple[str, str]] = []

    def forward_features(self, images: Tensor) -> Tensor:
        if len(self.seen) == self.last:
            raise RuntimeError("no more")
        self.seen.append((images.device.type, self.weight.device.type))
        factors = self.weight * torch.arange(1.0, self.tokens + 1)
        return images.mean(dim=(2, 3))[:, None] * factors[:, None]


def test_a_split_reads_its_own_images_to_the_same_bits(tmp_path: Path) -> None:
    """Oracle: the same batches of 64, joined in memory. A split that another process gets takes no tokens along."""
    data, frozen = Pictures(), Frozen()
    with torch.inference_mode():
        tokens = torch.cat([frozen.forward_features(data.images(part)) for part in np.split(np.arange(150), [64, 128])])
    file = cached_tokens(data, frozen, tmp_path)
    assert file.parent == tmp_path / "pictures"
    indices = np.array([3, 64, 65, 149])
    split = LabelledTokens(file, data.labels, indices)
    for copy in (split, pickle.loads(pickle.dumps(split))):
        assert len(copy) == 4 and copy.labels.tolist() == [1, 0, 1, 1]
        items = [copy[item] for item in range(4)]
        assert torch.equal(torch.stack([item["tokens"] for item in items]), tokens[indices])
        assert [int(item["labels"]) for item in items] == [1, 0, 1, 1]
        assert [len(batch["tokens"]) for batch in copy.batches(3)] == [3, 1]
        assert torch.equal(torch.cat([batch["tokens"] for batch in copy.batches(2, first=3)]), tokens[indices[:3]])
    assert len(pickle.dumps(split)) < 150 * 5 * 3 * 4


def test_tokens_belong_to_their_data_and_weights(tmp_path: Path) -> None:
    data, other, first, second = Pictures(), Pictures(), Frozen(), Frozen()
    other.fingerprint = "other"
    with torch.no_grad():
        second.weight += 1
    files = [cached_tokens(*of, tmp_path) for of in ((data, first), (data, second), (other, first))]
    assert len(set(files)) == 3 == len(list(tmp_path.rglob("tokens-*.npy")))
    assert np.array_equal(2 * np.load(files[0]), np.load(files[1]))
    computed = len(first.seen)
    assert cached_tokens(data, first, tmp_path) == files[0] and len(first.seen) == computed


def test_an_image_that_was_replaced_has_new_tokens(tmp_path: Path) -> None:
    """Also one that the fingerprint of the data, a sample of their files, does not see."""
    lines = {"train800": 4, "val200": 4, "train800val200": 8, "test": 130}
    folder = write_vtab(tmp_path, lines=lines, kinds=1)

    def data() -> Vtab:
        return Vtab(root=tmp_path, dataset="cifar", size=32, check_counts=False)

    before, frozen = data(), Frozen()
    unseen = min(set(before.splits["test"].tolist()) - set(spaced(before.splits["test"], 64)))
    file = cached_tokens(before, frozen, tmp_path)
    picture = folder / before.files[unseen]
    picture.unlink()  # the others are links to it
    Image.new("RGB", (24, 24), "white").save(picture)
    after = data()
    assert after.fingerprint == before.fingerprint
    renewed = cached_tokens(after, frozen, tmp_path)
    assert renewed != file
    old, new = np.load(file), np.load(renewed)
    assert np.flatnonzero((old != new).any(axis=(1, 2))).tolist() == [unseen]


def test_what_the_disk_cannot_hold_is_refused_after_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 74,728 images x 257 tokens x 3 numbers x 4 bytes are 230.5 MB."""
    monkeypatch.setattr("classification.tokens.shutil.disk_usage", lambda folder: SimpleNamespace(free=10**8))
    frozen = Frozen(tokens=257, last=1)
    with pytest.raises(ValueError, match=r"74,728 images .*257 tokens of 3 .* 0\.2 GB, .* 0\.1 GB; .*model=vit_b16"):
        cached_tokens(Pictures(74_728), frozen, tmp_path)
    assert len(frozen.seen) == 1 and not [path for path in tmp_path.rglob("tokens-*") if path.suffix != ".lock"]
    monkeypatch.setattr("classification.tokens.shutil.disk_usage", lambda folder: SimpleNamespace(free=150 * 60))
    cached_tokens(Pictures(), Frozen(), tmp_path)  # just fits


def test_what_is_cut_off_is_computed_again_or_told(tmp_path: Path) -> None:
    data = Pictures()
    with pytest.raises(RuntimeError, match="no more"):
        cached_tokens(data, Frozen(last=2), tmp_path)
    assert [path.suffix for path in tmp_path.rglob("tokens-*")] == [".lock"], "it would take room"
    (lock,) = tmp_path.rglob("tokens-*")
    lock.with_suffix(".partial").write_bytes(b"of a process that was killed")
    file = cached_tokens(data, Frozen(), tmp_path)
    assert np.load(file).shape == (150, 5, 3) and not list(tmp_path.rglob("*.partial"))
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:64], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file.name} cannot be read .*delete it, and it is computed again"):
            cached_tokens(data, Frozen(), tmp_path)


def test_frozen_blocks_run_where_the_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU; what is kept is on the CPU."""

    class OnMeta(Frozen):
        def forward_features(self, images: Tensor) -> Tensor:
            self.seen.append((images.device.type, self.weight.device.type))
            return torch.zeros(len(images), 5, 3)

    frozen = OnMeta()
    monkeypatch.setattr("classification.tokens.compute_device", lambda: torch.device("meta"))
    batches = compute_tokens(Pictures(9), frozen, batch_size=4)
    assert [tokens.shape for tokens in batches] == [(4, 5, 3), (4, 5, 3), (1, 5, 3)]
    assert frozen.seen == [("meta", "meta")] * 3
