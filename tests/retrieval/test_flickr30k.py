"""Flickr30K and COCO in the published files: counts, splits, pictures, what a worker gets, and what `verify` finds."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from region_folders import captions_of, features_of, write_folder, write_split

from retrieval.data import COCO, DATASETS, Flickr30K
from retrieval.models import build_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_folder(tmp_path / "flickr30k")
    return tmp_path


def open_split(root: Path, split: str, **options: object) -> Flickr30K:
    return Flickr30K(root, split, counts="any", **options)


def test_a_split(root: Path) -> None:
    data = open_split(root, "validation")
    assert (data.name, data.split, len(data), len(data.captions)) == ("flickr30k", "validation", 8, 40)
    assert data.captions == captions_of(8, seed=1000) and data.ids.tolist() == list(range(1000, 1008))
    assert data.image_of_caption.dtype == np.int64 and data.image_of_caption.tolist() == [i // 5 for i in range(40)]
    assert data.visual(3).dtype == np.float32 and np.array_equal(data.visual(3), features_of(8, seed=1)[3])
    assert data.preprocessing == "precomputed region features, 36 boxes an image, 12 numbers, float32"
    assert len(open_split(root, "train")) == 24 and len(open_split(root, "test")) == 6
    assert DATASETS["flickr30k"] is Flickr30K and DATASETS["coco"] is COCO


def test_features_of_different_numbers_of_boxes_in_float16(root: Path) -> None:
    sets = [features_of(1, regions=count)[0].astype(np.float16) for count in (10, 100, 17)]
    write_split(root / "flickr30k", "test", sets)
    (root / "flickr30k" / "source.txt").write_text("from a test\n")
    data = open_split(root, "test")
    assert [data.visual(i).shape for i in range(3)] == [(10, 12), (100, 12), (17, 12)]
    assert data.visual(1).dtype == np.float32 and np.array_equal(data.visual(1), sets[1].astype(np.float32))
    assert data.preprocessing.endswith("10 to 100 boxes an image, 12 numbers, float16; from a test")


def test_dev_can_be_cut_as_in_prior_work(root: Path) -> None:
    data = open_split(root, "validation", dev_images=5)
    whole = open_split(root, "validation")
    assert len(data) == 5 and data.captions == whole.captions[:25] and data.image_of_caption.tolist()[-1] == 4
    assert data.fingerprint != whole.fingerprint
    assert len(open_split(root, "train", dev_images=5)) == 24
    with pytest.raises(ValueError, match=r"data\.dev_images is 1000, but dev has 8 images"):
        open_split(root, "validation", dev_images=1000)


def test_published_counts(root: Path) -> None:
    """Of the papers: 29,000 / 1,014 / 1,000 and 113,287 / 5,000 / 5,000 images with five captions each."""
    with pytest.raises(ValueError, match=r"dev_\* hold 8 images with 40 captions, published are 1014 with 5070;.*=any"):
        Flickr30K(root, "validation")
    images = [Flickr30K.published[Flickr30K.files[split]] for split in ("train", "validation", "test")]
    assert images == [(29_000, 145_000), (1_014, 5_070), (1_000, 5_000)]
    write_split(root / "flickr30k", "test", features_of(1000, regions=2, width=3))
    assert len(Flickr30K(root, "test")) == 1000
    write_split(root / "coco", "testall", features_of(5000, regions=1, width=2))
    assert len(COCO(root, "test")) == 5000 and COCO.published["train"] == (113_287, 5 * 113_287)


def test_options_are_checked(root: Path) -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'; choose from train, validation, test"):
        open_split(root, "dev")
    with pytest.raises(ValueError, match=r"data\.counts is 'all'; choose from published, any"):
        Flickr30K(root, "train", counts="all")
    with pytest.raises(FileNotFoundError, match=r"data\.pictures=nowhere is no folder"):
        open_split(root, "train", pictures="nowhere")


def test_missing_files_come_with_where_to_get_them(tmp_path: Path) -> None:
    for call in (
        lambda: COCO.prepare(tmp_path, tmp_path),
        lambda: COCO(tmp_path, "train"),
        lambda: COCO.verify(tmp_path),
    ):
        with pytest.raises(FileNotFoundError) as error:
            call()
        for part in (
            "{train,dev,testall}_ims.npy",
            "coco_precomp",
            "convert_regions.py",
            "extract_regions.py",
            "verify",
        ):
            assert part in str(error.value)


def test_a_worker_process_gets_the_files_not_their_content(root: Path) -> None:
    data = open_split(root, "validation", dev_images=5)
    sent = pickle.dumps(data)
    assert len(sent) < 1000 < data.visual(0).nbytes
    again = pickle.loads(sent)
    assert isinstance(again.features, np.memmap) and len(again) == 5 and np.array_equal(again.visual(4), data.visual(4))


def test_fingerprint_sees_captions_numbers_and_sampled_features(root: Path) -> None:
    folder, whole = root / "flickr30k", features_of(8, seed=1)
    seen = {open_split(root, "validation").fingerprint}

    def written(features: np.ndarray, captions: list[str], first_id: int = 1000) -> str:
        write_split(folder, "dev", features, captions, first_id=first_id)
        return open_split(root, "validation").fingerprint

    assert written(whole, captions_of(8, seed=1000)) in seen
    changed = whole.copy()
    changed[4, 35, 11] += 1
    seen |= {written(changed, captions_of(8, seed=1000)), written(whole, captions_of(8, seed=1000), 7)}
    seen |= {
        written(whole, ["another", *captions_of(8, seed=1000)[1:]]),
        written(whole[:, :35], captions_of(8, seed=1000)),
    }
    assert len(seen) == 5
    write_split(folder, "train", features_of(1000, regions=2, width=3), first_id=5000)
    before = open_split(root, "train").fingerprint
    stored = np.load(folder / "train_ims.npy", mmap_mode="r+")
    stored[1] += 1  # between two of the 64 that are sampled: as the docstring says, not seen
    stored.flush()
    assert open_split(root, "train").fingerprint == before


def test_thumbnails_are_the_pictures_or_say_which_is_missing(root: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (20, 10), (200, 0, 0)).save(pictures / "named.png")
    Image.new("L", (30, 10), 9).save(pictures / "1001.png")
    (root / "flickr30k" / "id_mapping.json").write_text(json.dumps({"1000": "named.png", "2000": "../../secret.png"}))
    data = open_split(root, "validation", pictures=pictures)
    assert data.thumbnails(0)[0].size == (20, 10) and data.thumbnails(0)[0].getpixel((0, 0)) == (200, 0, 0)
    assert data.thumbnails(1)[0].size == (30, 10) and data.thumbnails(1)[0].mode == "RGB"
    (without,) = data.thumbnails(2)
    assert without.size == (96, 96) and len(set(without.get_flattened_data())) > 1, "a grey square with a number"
    assert open_split(root, "validation").thumbnails(2)[0].tobytes() == without.tobytes()
    with pytest.raises(ValueError, match=r"'\.\./\.\./secret\.png' leads out of"):
        open_split(root, "test", pictures=pictures)  # not in the report, after a training


# ---- verify


def test_verify_finds_nothing_in_a_whole_folder(root: Path) -> None:
    found = Flickr30K.verify(root, counts="any")
    assert list(found.problems) == []
    assert [(s.split, s.items, s.captions) for s in found.splits] == [
        ("train", 24, 120),
        ("dev", 8, 40),
        ("test", 6, 30),
    ]
    assert "nothing is wrong" in found.text()
    small = Flickr30K.verify(root, dev_images=1000)
    assert "train has 24 images with 120 captions, published are 29000 with 145000" in small.problems
    assert small.splits[0].published == (29_000, 145_000)


def test_verify_names_what_is_wrong(root: Path, tmp_path: Path) -> None:
    folder = root / "flickr30k"
    bad = features_of(24)
    bad[3, 0, 0], bad[5, 7], bad[6, 0, 1] = np.nan, 0.0, np.inf
    captions = captions_of(24)
    captions[17] = "  "
    write_split(folder, "train", bad, captions)
    write_split(folder, "dev", features_of(8), first_id=20)
    (folder / "test_ims.npy").unlink()
    (tmp_path / "pictures").mkdir()
    found = Flickr30K.verify(root, counts="any", pictures=tmp_path / "pictures")
    text = "\n".join(found.problems)
    for part in (
        "train_caps.txt has 1 empty captions: line 18",
        "train_ims.npy: 2 of 24 images that were looked at hold NaN or infinite numbers: row 3, 6",
        "train_ims.npy: 1 of 24 images that were looked at have a region of zeros only: row 5",
        "dev shares 4 images with train: 20, 21, 22, ...",
        "test_ims.npy does not exist",
        "train: 24 pictures are not in",
    ):
        assert part in text, text
    assert [split.unreadable for split in found.splits] == [3, 0, 0]
    many = features_of(1000, regions=2, width=3)
    many[1] = np.inf  # between two of the 256 that are looked at
    write_split(folder, "train", many, first_id=5000)
    assert Flickr30K.verify(root, counts="any").splits[0].unreadable == 0
    assert Flickr30K.verify(root, counts="any", decode=True).splits[0].unreadable == 1
    (folder / "dev_ids.txt").unlink()
    assert any("dev_ids.txt is missing" in problem for problem in Flickr30K.verify(root, counts="any").problems)


def test_verify_says_whether_the_pretrained_weights_are_there(root: Path) -> None:
    folder = root / "bert-base-uncased"
    folder.mkdir()
    (folder / "config.json").touch()
    missing = Flickr30K.verify(root, counts="any")
    assert f" is not there yet: {folder / 'model.safetensors'}\n" in missing.text() and not missing.problems
    (folder / "model.safetensors").touch()
    assert f" is there: {folder / 'model.safetensors'}\n" in Flickr30K.verify(root, counts="any").text()
    with pytest.raises(FileNotFoundError, match=f"bert-base-uncased's config.json, .* in {root / 'x' / folder.name}"):
        Flickr30K.verify(root / "x")


@pytest.mark.parametrize(("data", "model"), [("flickr30k", "clip4clip"), ("msrvtt", "vse_infty")])
def test_a_model_that_does_not_fit_is_told_both_that_do(data: str, model: str) -> None:
    shape = (2, 3) if data == "flickr30k" else (2, 8, 8, 3)
    held = SimpleNamespace(name=data, visual=lambda index: np.zeros(shape))
    with pytest.raises(ValueError, match=f"{model!r} takes .*but data {data!r} holds") as told:
        build_model({"name": model}, held, Path())
    known = {path.stem for path in (Path(__file__).parents[2] / "scripts" / "conf" / "model").glob("*.yaml")}
    fitting = set(re.findall(r"model=(\w+)", str(told.value)))
    assert len(fitting) == 2 and fitting < known
