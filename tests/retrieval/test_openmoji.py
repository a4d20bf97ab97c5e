"""Scenes say what they show, splits share no pair, and the features are those of the pictures."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.data import SPLITS
from retrieval.data.emoji_concepts import GROUPS, concepts, is_plural, render, with_article
from retrieval.data.openmoji import OpenMojiScenes
from retrieval.data.scenes import OPPOSITE, SIDES, Scene, describe, draw, sample_scenes
from retrieval.regions.grid_cells import fit_pca, project, region_features
from retrieval.regions.precomputed import write_precomputed
from training.encoders import efficientnet_lite0

TINY = {"scenes": (10, 3, 2), "size": 192, "seed": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    root = tmp_path_factory.mktemp("data")
    OpenMojiScenes.prepare(root, cache, **TINY)
    return root


# ---- concepts


def test_concepts_are_nameable_and_distinct() -> None:
    names = [concept.name for concept in concepts()]
    assert 780 < len(names) == len(set(names)) < 860
    assert all(len(name.split()) <= 3 and "skin tone" not in name for name in names)
    assert {concept.group for concept in concepts()} == set(GROUPS)
    lower = {name.lower() for name in names}
    assert not any(keyword in lower for concept in concepts() for keyword in concept.keywords)


def test_render_is_rgba_with_alpha() -> None:
    owl = next(concept for concept in concepts() if concept.name == "owl")
    picture = render(owl.svg, 40)
    assert picture.shape == (40, 40, 4) and picture.dtype == np.uint8
    assert picture[0, 0, 3] == 0 and picture[20, 20, 3] == 255


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("grapes", "grapes"),
        ("octopus", "an octopus"),
        ("compass", "a compass"),
        ("nest with eggs", "a nest with eggs"),
    ],
)
def test_articles(name: str, phrase: str) -> None:
    assert with_article(name) == phrase
    assert is_plural(name) == (name == phrase)


# ---- scenes


def test_no_pair_occurs_twice() -> None:
    splits = sample_scenes((3000, 500, 500), seed=0)
    assert [len(split) for split in splits] == [3000, 500, 500]
    pairs = [{frozenset(scene.pair) for scene in split} for split in splits]
    assert [len(split) for split in pairs] == [3000, 500, 500]
    assert all(not first & second for first, second in combinations(pairs, 2))
    seen = [set().union(*split) for split in pairs]
    assert seen[0] == set(range(len(concepts()))) and all(len(split) > 600 for split in seen)


def test_a_seed_says_all() -> None:
    assert sample_scenes((20, 5, 5), seed=3) == sample_scenes((20, 5, 5), seed=3) != sample_scenes((20, 5, 5), seed=4)


def test_captions_name_both_emoji() -> None:
    for scene in sample_scenes((200, 1, 1), seed=0)[0]:
        names = [concepts()[index].name for index in scene.pair]
        captions = describe(scene)
        assert len(captions) == 5
        for caption in captions[:3] + captions[4:]:
            assert all(name in caption for name in names), caption
        if scene.keyword is not None:
            assert scene.keyword in captions[3] and names[1 - scene.keyword_for] in captions[3]
            assert scene.keyword in concepts()[scene.pair[scene.keyword_for]].keywords
        assert scene.relation in captions[0] and OPPOSITE[scene.relation] in captions[1]


def place(picture: np.ndarray, index: int, side: int) -> tuple[float, float]:
    """Centre (x, y) of an emoji in a picture: where its drawing, weighted by its alpha, differs least in squares."""
    sprite, image = render(concepts()[index].svg, side) / 255, picture / 255
    colour, mask = sprite[..., :3], sprite[..., 3:]

    def correlate(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        padded = np.fft.rfft2(np.broadcast_to(kernel, (side, side, 3)), s=values.shape[:2], axes=(0, 1))
        full = np.fft.irfft2(np.fft.rfft2(values, axes=(0, 1)) * padded.conj(), s=values.shape[:2], axes=(0, 1))
        return full.sum(-1)[: 1 - side, : 1 - side]

    error = correlate(image**2, mask) - 2 * correlate(image, mask * colour)  # + a constant
    row, column = divmod(int(error.argmin()), error.shape[1])
    alpha = np.argwhere(sprite[..., 3] > 0.5)  # the drawing does not fill its square
    y, x = (alpha.min(0) + alpha.max(0)) / 2
    return column + x, row + y


def test_captions_agree_with_the_pixels() -> None:
    for scene in sample_scenes((60, 1, 1), seed=5)[0]:
        picture = draw(scene, 192)
        sides = [round(SIDES[size] * 192) for size in scene.sizes]
        (x0, y0), (x1, y1) = (place(picture, index, side) for index, side in zip(scene.pair, sides, strict=True))
        shown = {"to the left of": x0 < x1, "to the right of": x0 > x1, "above": y0 < y1, "below": y0 > y1}
        assert shown[scene.relation], describe(scene)[0]


def test_emoji_stay_inside_and_apart() -> None:
    """With the room used up or not at all, the two squares touch at most."""
    for relation in OPPOSITE:
        for slack in ((0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)):
            scene = Scene((0, 1), relation, "white", ("large", "small"), slack, None, 0)
            drawn = draw(scene, 96)
            assert drawn.shape == (96, 96, 3) and (drawn != 255).any()
            alone = [
                render(concepts()[index].svg, round(SIDES[size] * 96)) for index, size in ((0, "large"), (1, "small"))
            ]
            opaque = sum(int((sprite[..., 3] > 250).sum()) for sprite in alone)
            assert (drawn != 255).any(-1).sum() > 0.5 * opaque


# ---- prepared data


@pytest.mark.parametrize(("split", "count"), list(zip(SPLITS, TINY["scenes"], strict=True)))
def test_a_prepared_split(root: Path, split: str, count: int) -> None:
    data = OpenMojiScenes(root, split)
    assert (data.name, data.split, len(data)) == ("openmoji", split, count)
    assert len(data.captions) == 5 * count
    assert data.image_of_caption.dtype == np.int64
    assert data.image_of_caption.tolist() == [image for image in range(count) for _ in range(5)]
    assert data.visual(0).shape == (36, 384) and data.visual(0).dtype == np.float32
    (thumbnail,) = data.thumbnails(count - 1)
    assert thumbnail.size == (192, 192) and thumbnail.mode == "RGB"


def test_prepared_splits_share_no_pair(root: Path) -> None:
    pairs = []
    for split in SPLITS:
        scenes = json.loads((root / "openmoji" / f"{split}_scenes.json").read_text(encoding="utf-8"))
        pairs.append({frozenset(scene["names"]) for scene in scenes})
    assert all(not first & second for first, second in combinations(pairs, 2))


def test_features_are_those_of_the_picture(root: Path, cache: Path) -> None:
    """Oracle: the unfolded network on one PNG file, and the stored PCA. What is stored is rounded to float16."""
    data = OpenMojiScenes(root, "test")
    picture = np.asarray(data.thumbnails(1)[0], dtype=np.float32)
    image = torch.from_numpy((picture / 255 - 0.5) / 0.5).permute(2, 0, 1).unsqueeze(0)
    with torch.inference_mode():
        last_map = efficientnet_lite0(cache).forward_features(image)[0]
    cells = last_map.permute(1, 2, 0).reshape(36, 1280).numpy()
    pca = np.load(root / "openmoji" / "pca.npz")
    expected = (cells - pca["mean"]) @ pca["components"]
    assert np.abs(data.visual(1) - expected).max() < 2e-3 * np.abs(expected).max()


def test_preparing_twice_changes_nothing(root: Path, cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (root / "openmoji").rglob("*")}
    OpenMojiScenes.prepare(root, cache, **TINY)
    assert before == {path: path.stat().st_mtime_ns for path in (root / "openmoji").rglob("*")}
    with pytest.raises(ValueError, match=r"was prepared with .*'seed': 1.*not with .*'seed': 2"):
        OpenMojiScenes.prepare(root, cache, **(TINY | {"seed": 2}))


def test_killed_preparation_is_not_taken_for_finished(tmp_path: Path, cache: Path) -> None:
    (tmp_path / ".unfinished-openmoji" / "pictures").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"python scripts/prepare_data\.py data=openmoji"):
        OpenMojiScenes(tmp_path, "train")
    OpenMojiScenes.prepare(tmp_path, cache, scenes=(2, 1, 1), size=64)
    assert not (tmp_path / ".unfinished-openmoji").exists()
    assert OpenMojiScenes(tmp_path, "train").visual(1).shape == (4, 384)


def test_unknown_split_and_size(root: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'; choose from train, validation, test"):
        OpenMojiScenes(root, "dev")
    with pytest.raises(ValueError, match="size 100 is not a multiple of 32"):
        OpenMojiScenes.prepare(root / "other", cache, size=100)


def test_fingerprint_sees_captions_owners_and_features(root: Path, tmp_path: Path) -> None:
    original = OpenMojiScenes(root, "validation")
    captions = list(original.captions)

    def written(captions: list[str], features: np.ndarray) -> str:
        folder = tmp_path / "openmoji"
        folder.mkdir(exist_ok=True)
        write_precomputed(folder, "validation", features, captions)
        return OpenMojiScenes(tmp_path, "validation").fingerprint

    assert (
        written(captions, original.features) == original.fingerprint == OpenMojiScenes(root, "validation").fingerprint
    )
    changed = np.array(original.features)
    changed[1, 2, 3] += 1
    others = {written(["another", *captions[1:]], original.features), written(captions, changed)}
    assert len(others | {original.fingerprint}) == 3


# ---- regions


def test_pca_is_that_of_numpy() -> None:
    """Oracle: the singular value decomposition of the centred rows."""
    random = np.random.default_rng(0)
    features = (random.random((40, 5, 12)) @ random.random((12, 12))).astype(np.float32)
    pca = fit_pca(features, dimensions=4)
    rows = features.reshape(-1, 12)
    components = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:4].T
    assert np.abs(np.abs((pca.components * components).sum(0)) - 1).max() < 1e-4
    assert (pca.components[np.abs(pca.components).argmax(0), range(4)] > 0).all()
    reduced = project(features, pca)
    assert reduced.shape == (40, 5, 4) and reduced.dtype == np.float16
    assert np.allclose(reduced, (features - rows.mean(0)) @ pca.components, atol=2e-2)


def test_region_features_leave_the_model_and_the_threads_alone(cache: Path) -> None:
    model, threads = efficientnet_lite0(cache), torch.get_num_threads()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pictures = [np.full((64, 64, 3), value, dtype=np.uint8) for value in range(0, 250, 50)]
    found = region_features(model, pictures, label="test")
    assert found.shape == (5, 4, 1280) and found.dtype == np.float16
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    alone = region_features(model, pictures[3:4], label="test")
    assert np.abs(found[3].astype(float) - alone[0]).max() < 1e-2
