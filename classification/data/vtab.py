"""VTAB-1K (Zhai et al., 2019): 19 data sets with 1,000 training images each, in the list files of prior code.

The layout is that of github.com/ZhangYuanhan-AI/NOAH, whose script `data/vtab-source/get_vtab1k.py` writes it; FacT,
SSF and DTL read the same. The training images are the first 800 of each set's training split and the first 200 of its
validation split, not stratified: a class can be absent from them. That script stores JPEG, also of images that were
not, and this costs accuracy on the small ones (about ten points on cifar): numbers on its files are not to be compared
with VPT's, which come from the source's pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from classification.data.folder import ListedFolder
from classification.data.listed import ListedImages
from classification.data.pixels import Preprocessing
from training import check_name

FOLDER = "vtab-1k"


class Published(NamedTuple):
    """What is published about a data set: its group, its classes, and the images of its test split."""

    group: str
    classes: int
    test: int


VTAB_1K = {
    "cifar": Published("natural", 100, 10_000),
    "caltech101": Published("natural", 102, 6_084),
    "dtd": Published("natural", 47, 1_880),
    "oxford_flowers102": Published("natural", 102, 6_149),
    "oxford_iiit_pet": Published("natural", 37, 3_669),
    "svhn": Published("natural", 10, 26_032),
    "sun397": Published("natural", 397, 21_750),
    "patch_camelyon": Published("specialized", 2, 32_768),
    "eurosat": Published("specialized", 10, 5_400),
    "resisc45": Published("specialized", 45, 6_300),
    "diabetic_retinopathy": Published("specialized", 5, 42_670),
    "clevr_count": Published("structured", 8, 15_000),
    "clevr_dist": Published("structured", 6, 15_000),
    "dmlab": Published("structured", 6, 22_735),
    "kitti": Published("structured", 4, 711),
    "dsprites_loc": Published("structured", 16, 73_728),
    "dsprites_ori": Published("structured", 16, 73_728),
    "smallnorb_azi": Published("structured", 18, 12_150),
    "smallnorb_ele": Published("structured", 9, 12_150),
}
"""In the order of the papers' tables."""

GROUPS = {
    group: tuple(name for name, published in VTAB_1K.items() if published.group == group)
    for group in ("natural", "specialized", "structured")
}
"""Group -> its data sets, 7, 4 and 8. Papers average each group, and the three averages."""

LISTS = {"train800": 800, "val200": 200, "train800val200": 1_000}  # and test
PROTOCOLS = {
    "train800val200": {"train": "train800val200", "test": "test"},
    "train800": {"train": "train800", "validation": "val200", "test": "test"},
}
"""`train` -> which list each split is; the published numbers are trained on all 1,000, and no validation is left."""

SOURCES = """Expected in {folder}, for each of {names}:
  train800.txt val200.txt train800val200.txt test.txt  lines like "images/test/000000.jpg 7"
  images/<list>/NNNNNN.jpg                             the files that the lists name
Ways to get them:
  1. run data/vtab-source/get_vtab1k.py of github.com/ZhangYuanhan-AI/NOAH, which makes all of them with TensorFlow
     Datasets and github.com/google-research/task_adaptation, and move its vtab-1k to {folder}
  2. an archive of the same layout, as the READMEs of github.com/dongzelian/SSF or github.com/heekhero/DTL name
Then check them: python scripts/prepare_data.py verify data=vtab"""


class Vtab(ListedImages):
    """One data set of VTAB-1K from ``<root>/vtab-1k/<dataset>``; see `ListedImages`.

    Args:
        root: folder of all data sets.
        dataset: a key of `VTAB_1K`.
        train: "train800val200": train on all 1,000 images, as published; the validation split is empty. "train800":
            on 800, and validate on the other 200, to choose settings.
        validation: None, what `train` holds out; "test", the test split, on which FacT and NOAH choose the epoch. They
            train on all 1,000.
        size: side in pixels.
        normalization: a key of `NORMALIZATIONS`.
        check_counts: refuse other numbers of images and classes than the published ones.

    Raises:
        FileNotFoundError: files are not there; the message says what to get.
        ValueError: for an unknown name or value, or files that are not as they should be.
    """

    name = "vtab"
    folder_name = FOLDER
    published: ClassVar[Mapping[str, Published]] = VTAB_1K

    def __init__(
        self,
        *,
        root: str | Path,
        dataset: str,
        train: str = "train800val200",
        validation: str | None = None,
        size: int = 224,
        normalization: str = "half",
        check_counts: bool = True,
    ) -> None:
        self.check({"dataset": dataset, "train": train, "validation": validation})
        lists = PROTOCOLS[train] | ({} if validation is None else {"validation": validation})
        preprocessing = Preprocessing(size=size, normalization=normalization)
        self.dataset = dataset
        super().__init__(
            vtab_folder(Path(root), dataset), lists, preprocessing=preprocessing, check_counts=check_counts
        )

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """As `ListedImages.check`."""
        super().check(options)
        train, validation = options["train"], options.get("validation")
        if train not in PROTOCOLS:
            raise ValueError(f"data.train is {train!r}; choose from {', '.join(PROTOCOLS)}")
        if validation not in (None, "test"):
            raise ValueError(f"data.validation is {validation!r}; expected null or test, as prior work has it")
        if validation and "validation" in PROTOCOLS[train]:
            raise ValueError(
                f"data.train={train} holds images out to validate on, and data.validation=test validates on others: "
                "prior work trains on all 1,000, data.train=train800val200"
            )

    @classmethod
    def locate(cls, root: Path, dataset: str) -> ListedFolder:
        """See `vtab_folder`."""
        return vtab_folder(root, dataset)


def vtab_folder(root: Path, dataset: str) -> ListedFolder:
    """Where a data set of VTAB-1K is; raises ValueError for an unknown name."""
    check_name("data.dataset", dataset, VTAB_1K)
    folder, published = root / FOLDER / dataset, VTAB_1K[dataset]
    lines = LISTS | {"test": published.test}
    return ListedFolder(
        dataset=dataset,
        group=published.group,
        images=folder,
        lists={name: folder / f"{name}.txt" for name in lines},
        lines=lines,
        classes=published.classes,
        sources=SOURCES.format(folder=root / FOLDER, names=", ".join(VTAB_1K)),
    )
