"""VTAB-1K is read as published, pixels are those of torchvision's transforms, and nothing is dropped in silence."""

from __future__ import annotations

import pickle
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from vtab_folder import write_vtab

from classification.data import DATASETS, SPLITS, Vtab
from classification.data.lists import read_list
from classification.data.vtab import GROUPS, VTAB_1K

TINY = {"dataset": "cifar", "size": 20, "check_counts": False}
PUBLISHED = {  # classes and test images, as in VTAB's paper and VPT's appendix; typed again, not read from the code
    "cifar": (100, 10000), "caltech101": (102, 6084), "dtd": (47, 1880), "oxford_flowers102": (102, 6149),
    "oxford_iiit_pet": (37, 3669), "svhn": (10, 26032), "sun397": (397, 21750), "patch_camelyon": (2, 32768),
    "eurosat": (10, 5400), "resisc45": (45, 6300), "diabetic_retinopathy": (5, 42670), "clevr_count": (8, 15000),
    "clevr_dist": (6, 15000), "dmlab": (6, 22735), "kitti": (4, 711), "dsprites_loc": (16, 73728),
    "dsprites_ori": (16, 73728), "smallnorb_azi": (18, 12150), "smallnorb_ele": (9, 12150),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_vtab(path)
    return path


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder that a test may change; the data set's own."""
    return write_vtab(tmp_path)


def test_the_published_counts() -> None:
    assert {name: each[1:] for name, each in VTAB_1K.items()} == PUBLISHED
    assert [len(names) for names in GROUPS.values()] == [7, 4, 8] and list(GROUPS) == [
        "natural", "specialized", "structured"
    ]  # fmt: skip
    assert sum(GROUPS.values(), ()) == tuple(PUBLISHED)


def test_a_folder_of_the_published_size(tmp_path: Path) -> None:
    sizes = {"train800": 800, "val200": 200, "train800val200": 1000, "test": 711}
    folder = write_vtab(tmp_path, "kitti", classes=4, lines=sizes, side=8, kinds=2)
    data, held_out = (Vtab(root=tmp_path, dataset="kitti", train=t) for t in ("train800val200", "train800"))
    assert [len(data.splits[split]) for split in SPLITS] == [1000, 0, 711]
    assert [len(held_out.splits[split]) for split in SPLITS] == [800, 200, 711]
    assert data.classes == held_out.classes == ("0", "1", "2", "3")
    Vtab.prepare(tmp_path, tmp_path, datasets=["kitti"])
    assert not Vtab.verify(tmp_path, datasets=["kitti"]).problems

    lines = (folder / "test.txt").read_text().splitlines()
    (folder / "test.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"test\.txt has 710 lines, published are 711; .*data\.check_counts=false"):
        Vtab(root=tmp_path, dataset="kitti")
    assert len(Vtab(root=tmp_path, dataset="kitti", check_counts=False).splits["test"]) == 710


def test_the_splits(root: Path) -> None:
    assert DATASETS["vtab"] is Vtab
    whole, part = (Vtab(root=root, train=train, **TINY) for train in ("train800val200", "train800"))
    for data, sizes in ((whole, (24, 0, 12)), (part, (16, 8, 12))):
        assert tuple(data.splits) == SPLITS and tuple(len(each) for each in data.splits.values()) == sizes
        assert all(not np.intersect1d(a, b).size for a, b in combinations(data.splits.values(), 2))
        assert np.array_equal(np.concatenate(list(data.splits.values())), np.arange(len(data.labels)))
        assert data.labels.dtype == np.int64 and data.classes == ("0", "1", "2", "3")
    for split, name in (("train", "train800"), ("validation", "val200"), ("test", "test")):
        written = np.loadtxt(root / "vtab-1k" / "cifar" / f"{name}.txt", dtype=str)
        assert [part.files[index] for index in part.splits[split]] == written[:, 0].tolist()
        assert part.labels[part.splits[split]].tolist() == written[:, 1].astype(int).tolist()


@pytest.mark.parametrize(
    ("normalization", "theirs"),
    [
        ("half", transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
        ("imagenet", transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("none", transforms.Lambda(lambda pixels: pixels)),
    ],
)
def test_images_are_those_of_torchvision(root: Path, normalization: str, theirs: object) -> None:
    """Oracle: the transforms that FacT and DTL compose, on the files themselves."""
    data = Vtab(root=root, normalization=normalization, **TINY)
    oracle = transforms.Compose(
        [transforms.Resize((20, 20), interpolation=transforms.InterpolationMode.BICUBIC), transforms.ToTensor(), theirs]
    )
    indices = [0, 5, int(data.splits["test"][-1])]
    names = ["train800val200/000000", "train800val200/000005", "test/000011"]
    expected = [
        oracle(Image.open(root / "vtab-1k" / "cifar" / "images" / f"{name}.jpg").convert("RGB")) for name in names
    ]
    images = data.images(indices)
    assert images.dtype == torch.float32 and images.shape == (3, 3, 20, 20)
    torch.testing.assert_close(images, torch.stack(expected), rtol=0, atol=1e-6)
    assert data.images(data.splits["validation"]).shape == (0, 3, 20, 20)
    assert data.augmentation == "none" and torch.equal(data.augmented(5, 7), images[1])
    assert "20 x 20 px" in data.preprocessing and "jpg files" in data.preprocessing
    assert normalization == "none" or normalization in data.preprocessing


def test_other_modes_become_rgb(mine: Path) -> None:
    """Grey, with a palette and with an alpha channel, as in caltech101 and others."""
    files = [mine / "images" / "test" / f"{index:06d}.jpg" for index in range(3)]
    for path, mode in zip(files, ("L", "P", "RGBA"), strict=True):
        Image.open(path).convert(mode).save(path, format="PNG")
    images = Vtab(root=mine.parents[1], **TINY).images([24, 25, 26])
    assert images.shape == (3, 3, 20, 20) and torch.equal(images[0, 0], images[0, 2])


def test_the_fingerprint(root: Path, mine: Path) -> None:
    def fingerprint(where: Path = mine.parents[1], **settings: object) -> str:
        return Vtab(root=where, **TINY | settings).fingerprint

    first = fingerprint()
    assert first == fingerprint() == fingerprint(root), "the place does not matter"
    assert len({first, fingerprint(size=21), fingerprint(normalization="none"), fingerprint(train="train800")}) == 4
    labels = (mine / "test.txt").read_text()
    (mine / "test.txt").write_text(labels.replace("000000.jpg 0", "000000.jpg 1"))
    assert fingerprint() != first
    (mine / "test.txt").write_text(labels)
    Image.new("RGB", (9, 9)).save(mine / "images" / "test" / "000003.jpg")
    assert fingerprint() != first


def test_files_are_read_when_asked_for(mine: Path) -> None:
    (mine / "images" / "test" / "000001.jpg").write_bytes(b"no picture")
    whole = (mine / "images" / "test" / "000002.jpg").read_bytes()
    (mine / "images" / "test" / "000002.jpg").write_bytes(whole[: len(whole) // 2])
    data = pickle.loads(pickle.dumps(Vtab(root=mine.parents[1], **TINY)))
    data.images(data.splits["train"])
    for name in ("000001", "000002"):
        with pytest.raises(ValueError, match=rf"test/{name}\.jpg cannot be read as an image"):
            data.images([24 + int(name)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "images/test/000000.jpg",
            r"test\.txt, line 13 is 'images/test/000000\.jpg'; expected an image's path, a space",
        ),
        ("images/test/000000.jpg seven", "line 13 is .* and an integer label"),
        ("images/test/000000.jpg -1", "line 13 is"),
        ("images/test/000000.jpg 1.0", "line 13 is"),
        ("7", "line 13 is '7'"),
        ("../dtd/images/test/000000.jpg 1", "leads out of the folder"),
        ("images/../../x.jpg 1", "leads out of the folder"),
        ("/etc/passwd 1", "leads out of the folder"),
        ("C:/x.jpg 1", "leads out of the folder"),
        (r"images\test\000000.jpg 1", "backslash"),
        ("images/test/000002.jpg 3", "000002.jpg has label 3 here and 2 in line 3"),
        ("images/train800val200/000000.jpg 0", "1 images are in .*train800val200.txt as well as in .*test.txt"),
    ],
)
def test_a_bad_line_is_named(mine: Path, line: str, message: str) -> None:
    with (mine / "test.txt").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=message):
        Vtab(root=mine.parents[1], **TINY)


def test_a_label_out_of_range(mine: Path) -> None:
    with pytest.raises(ValueError, match=r"test\.txt, line 4: label 3 is out of range; expected a label from 0 to 2"):
        read_list(mine / "test.txt", 3)
    assert len(read_list(mine / "test.txt", 4).names) == 12


def test_what_is_no_list(mine: Path) -> None:
    for content, message in ((b"", "names no image"), (b"\xff\xfe\x00", "is no text in UTF-8")):
        (mine / "test.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Vtab(root=mine.parents[1], **TINY)
    (mine / "test.txt").write_bytes("\ufeffimages/test/000000.jpg 1\r\n\r\n./images//test/000001.jpg 2".encode())
    read = read_list(mine / "test.txt")
    assert read.names == ("images/test/000000.jpg", "images/test/000001.jpg") and read.labels.tolist() == [1, 2]


def test_a_repeated_line_is_told(mine: Path) -> None:
    with (mine / "test.txt").open("a") as file:
        file.write("images/test/000002.jpg 2\n")
    with pytest.warns(
        UserWarning, match=r"test\.txt: 1 of 13 lines repeat an earlier one; each of the 12 images counts"
    ):
        data = Vtab(root=mine.parents[1], **TINY)
    assert len(data.splits["test"]) == 12


def test_prior_works_validation_is_the_test_split(root: Path) -> None:
    data = Vtab(root=root, validation="test", **TINY)
    validation, test = (data.splits[name] for name in ("validation", "test"))
    assert [data.files[index] for index in validation] == [data.files[index] for index in test] and len(test) == 12
    assert (data.labels[validation] == data.labels[test]).all() and len(data.splits["train"]) == 24


def test_what_is_missing_is_told(mine: Path, tmp_path: Path) -> None:
    (mine / "images" / "test" / "000003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 12 images in .*test\.txt are not in .*000003\.jpg"):
        Vtab(root=tmp_path, **TINY)
    (mine / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*test\.txt") as missing:
        Vtab(root=tmp_path, **TINY)
    for part in ("github.com/ZhangYuanhan-AI/NOAH", "get_vtab1k.py", str(tmp_path / "vtab-1k"), "train800val200.txt"):
        assert part in str(missing.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "cifar100"}, "unknown data.dataset 'cifar100'; did you mean 'cifar'?"),
        ({"train": "all"}, "data.train is 'all'; choose from train800val200, train800"),
        ({"validation": "val200"}, "data.validation is 'val200'; expected null or test, as prior work has it"),
        ({"train": "train800", "validation": "test"}, "prior work trains on all 1,000, data.train=train800val200"),
        ({"size": 0}, "data.size is 0"),
        ({"normalization": "clip"}, "data.normalization is 'clip'; choose from half, imagenet, none"),
        (
            {"check_counts": True},
            r"train800val200\.txt has 24 lines, published are 1000; .*4 classes, published are 100",
        ),
    ],
)
def test_what_cannot_be_is_refused(root: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vtab(root=root, **TINY | settings)
