"""OpenMoji scenes: 4,000 pictures of two emoji with five captions each, for image-text retrieval.

A caption names both emoji and where they stand ("a fuel pump to the left of a microscope on a green background"), so
a model must know things, colours, sizes and places to find the right picture. Emoji occur in every split, pairs of them
in one only. Chance is a Rsum of about 6 of 600 on the test split. Artwork and names are made by people, composition
and sentences are synthetic.

Prepared folder ``<root>/openmoji/``: region features and captions in the format of `retrieval.regions.precomputed`,
``pictures/{split}/*.png``, ``{split}_scenes.json`` (what was drawn), ``pca.npz`` and ``manifest.json``.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from retrieval.data.dataset import SPLITS, check_prepared, fingerprint, make_once
from retrieval.data.embedded_verify import verify_embedded
from retrieval.data.emoji_concepts import concepts
from retrieval.data.scenes import Scene, describe, draw, sample_scenes
from retrieval.data.verification import Verification
from retrieval.regions.grid_cells import fit_pca, project, region_features
from retrieval.regions.precomputed import CAPTIONS_PER_IMAGE, read_precomputed, write_precomputed
from training.encoders import efficientnet_lite0

ARTWORK = "OpenMoji, CC BY-SA 4.0; so are these pictures. See ATTRIBUTION.md of resora"
DIMENSIONS = 384  # of the region features; EfficientNet-Lite0's own 1,280 make training two to three times slower


class OpenMojiScenes:
    """One split of the scenes; a `RetrievalDataset` of region features.

    Args:
        root: folder of all data sets.
        split: "train", "validation" or "test".

    Raises:
        FileNotFoundError: the data are not prepared; the message says how to.
        ValueError: unknown split.
    """

    name = "openmoji"

    def __init__(self, root: Path, split: str) -> None:
        self.folder = Path(root) / self.name
        self.split = split
        check_prepared(self.folder, self.name, split)
        self.features, self.captions, self.image_of_caption, _ = read_precomputed(self.folder, split)

    def __len__(self) -> int:
        return len(self.features)

    def visual(self, index: int) -> np.ndarray:
        """``(36, 384)`` float32 at the default size of 192 px."""
        return self.features[index].astype(np.float32)

    def thumbnails(self, index: int) -> list[Image.Image]:
        """The picture itself."""
        with Image.open(_picture(self.folder, self.split, range(len(self))[index])) as picture:
            return [picture.convert("RGB")]

    @property
    def preprocessing(self) -> str:
        """How pictures became features; part of what a result depends on."""
        manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        size, width = manifest["options"]["size"], manifest["options"]["dimensions"]
        return f"{size} px, mean = std = 0.5, EfficientNet-Lite0 cells, PCA to {width} fitted on train"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over captions, owners and region features; 0.3 s for the training split."""
        return fingerprint(self.captions, self.image_of_caption, self.features)

    @classmethod
    def prepare(
        cls,
        root: Path,
        cache: Path,
        *,
        scenes: tuple[int, int, int] = (3000, 500, 500),
        size: int = 192,
        seed: int = 0,
    ) -> None:
        """Draw the scenes and extract their region features; a minute or two on two cores, and only once.

        The folder appears when it is complete, so a killed call leaves nothing that looks finished.

        Args:
            root: folder of all data sets.
            cache: folder of the pretrained encoders.
            scenes: number of scenes in the train, validation and test split.
            size: side of the pictures in pixels, a multiple of 32; each 32 x 32 pixels make one region.
            seed: of the composition.

        Raises:
            ValueError: ``size`` does not fit, or the folder was prepared with other arguments.
        """
        if size < 64 or size % 32:
            raise ValueError(f"size {size} is not a multiple of 32 pixels from 64 on; the default is 192")
        options = {"scenes": list(scenes), "size": size, "seed": seed, "dimensions": DIMENSIONS}
        make_once(Path(root) / cls.name, options, ARTWORK, lambda folder: _build(folder, Path(cache), options))

    @classmethod
    def verify(cls, root: Path, *, decode: bool = False) -> Verification:
        """Counts against those that were asked for, and whether each picture opens and its features are finite.

        Args:
            root: folder of all data sets.
            decode: for videos; pictures are opened in any case.
        """
        return verify_embedded(
            Path(root) / cls.name,
            lambda split: cls(root, split),
            _problem,
            sizes="scenes",
            captions_per_item=CAPTIONS_PER_IMAGE,
        )


def _problem(data: OpenMojiScenes, index: int) -> str:
    """What is wrong with one scene, "" if nothing is."""
    if not np.isfinite(data.features[index]).all():
        return f"scene {index}: its region features are not finite"
    try:
        with Image.open(_picture(data.folder, data.split, index)) as picture:
            picture.verify()
    except (OSError, SyntaxError) as error:  # Pillow raises the second for a broken PNG
        return f"scene {index}: {error}"
    return ""


def _build(folder: Path, cache: Path, options: dict[str, Any]) -> None:
    pca = None
    model = efficientnet_lite0(cache)
    for split, scenes in zip(SPLITS, sample_scenes(options["scenes"], options["seed"]), strict=True):
        pictures = [draw(scene, options["size"]) for scene in tqdm(scenes, desc=f"drawing {split}", unit="scene")]
        _save_pictures(folder, split, pictures)
        regions = region_features(model, pictures, label=f"regions of {split}")
        if pca is None:  # fitted on the training split, which comes first, and on nothing else
            pca = fit_pca(regions, options["dimensions"])
            np.savez(folder / "pca.npz", **pca._asdict())
        captions = [caption for scene in scenes for caption in describe(scene)]
        write_precomputed(folder, split, project(regions, pca), captions)
        _write_json(folder / f"{split}_scenes.json", [_record(scene) for scene in scenes])


def _picture(folder: Path, split: str, index: int) -> Path:
    return folder / "pictures" / split / f"{index:05d}.png"


def _save_pictures(folder: Path, split: str, pictures: list[np.ndarray]) -> None:
    _picture(folder, split, 0).parent.mkdir(parents=True)

    def save(index: int) -> None:
        Image.fromarray(pictures[index]).save(_picture(folder, split, index), compress_level=1)

    with ThreadPoolExecutor(2) as pool:  # Pillow compresses outside Python's lock
        list(pool.map(save, range(len(pictures))))


def _record(scene: Scene) -> dict[str, object]:
    return asdict(scene) | {"names": [concepts()[index].name for index in scene.pair]}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
