"""Region features of pictures with a random detector: against its own parts, and across kills and broken files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from adapters.torchvision_cpu import use_cpu_kernels
from retrieval.regions.detector import BoxChoice, best_first, faster_rcnn, read_weights, region_features
from retrieval.regions.extraction import extract
from retrieval.regions.karpathy import Described
from retrieval.regions.precomputed import read_precomputed

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import extract_regions

SIZE = 64  # pixels; the published detectors take 800


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    torch.manual_seed(0)
    return faster_rcnn(None, size=SIZE)


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_regions_are_the_detectors_own(detector: nn.Module) -> None:
    """With one class per score and no suppression in the way, the best boxes are those that the detector reports."""
    found = region_features(detector, picture(0), BoxChoice(fewest=5, most=5))
    assert found.shape == (5, 1024) and found.dtype == np.float32 and (found >= 0).all() and found.any(axis=1).all()
    caught: list[torch.Tensor] = []
    hook = detector.roi_heads.box_head.register_forward_hook(lambda module, inputs, output: caught.append(output))
    detector.roi_heads.score_thresh = 0.0
    pixels = torch.from_numpy(np.array(picture(0))).permute(2, 0, 1).float() / 255
    with torch.inference_mode():
        reported = detector([pixels])[0]
        fc7 = caught[0]
        logits, _ = detector.roi_heads.box_predictor(fc7)
    hook.remove()
    best = logits.softmax(-1)[:, 1:].amax(1)
    mine = torch.stack([fc7[(fc7 - torch.from_numpy(row)).abs().amax(1).argmin()] for row in found])
    torch.testing.assert_close(mine, torch.from_numpy(found), atol=1e-5, rtol=1e-4)
    scores = torch.stack([best[(fc7 - row).abs().amax(1).argmin()] for row in mine])
    assert scores[0] == pytest.approx(float(reported["scores"].max()), rel=1e-4)
    assert (scores.diff() <= 1e-6).all(), "best first"


def test_ranking_puts_what_suppression_drops_last() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 9.5]])
    ranking = best_first(boxes, torch.tensor([0.5, 0.9, 0.3, 0.4]), torch.tensor([1, 1, 1, 2]), (40, 40), 0.5)
    assert ranking.kept.tolist() == [1, 3, 2] and ranking.dropped.tolist() == [0]


class Known(nn.Module):
    """A detector of which proposals, logits and deltas are known; a region's first feature is its proposal's number."""

    def __init__(self, proposals: torch.Tensor, logits: torch.Tensor, deltas: torch.Tensor) -> None:
        use_cpu_kernels()
        from torchvision.models.detection.image_list import ImageList
        from torchvision.models.detection.roi_heads import RoIHeads

        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.transform = lambda pixels: (ImageList(pixels[0][None], [tuple(pixels[0].shape[1:])]), None)
        self.backbone = lambda images: images
        self.rpn = lambda images, maps: ([proposals], {})
        features = torch.arange(len(proposals))[:, None].expand(-1, 1024).float()
        self.roi_heads = RoIHeads(None, None, None, 0.5, 0.5, 1, 0.5, None, 0.0, 1.0, 10**6)
        self.roi_heads.box_roi_pool = lambda maps, boxes, sizes: features
        self.roi_heads.box_head = lambda pooled: pooled
        self.roi_heads.box_predictor = lambda found: (logits, deltas)


def test_a_box_is_the_one_regressed_for_its_class() -> None:
    """Against the boxes, scores and labels that torchvision makes of the same logits and deltas."""
    torch.manual_seed(0)
    count, classes, size = 40, 5, (100, 120)
    corner = torch.rand(count, 2) * 60
    proposals = torch.cat([corner, corner + 20 + 20 * torch.rand(count, 2)], dim=1)
    logits, deltas = 3 * torch.randn(count, classes), 5 * torch.randn(count, 4 * classes)
    model = Known(proposals, logits, deltas)
    (boxes,), (scores,), (labels,) = model.roi_heads.postprocess_detections(logits, deltas, [proposals], [size])
    best_scores, best = logits.softmax(1)[:, 1:].max(1)
    rows = [int(((scores == s) & (labels == c)).nonzero()) for s, c in zip(best_scores, best + 1, strict=True)]
    expected = best_first(boxes[rows], best_scores, best, size, overlap=0.1)
    assert 5 < len(expected.dropped) < 35
    model.roi_heads.nms_thresh = 0.1
    found = region_features(model, picture(0, size[1], size[0]), BoxChoice(fewest=count, most=count))
    assert found[:, 0].tolist() == [*expected.kept.tolist(), *expected.dropped.tolist()]


def test_a_score_decides_between_the_fewest_and_the_most() -> None:
    scores = torch.tensor([0.1, 0.8, 0.3, 0.5])
    left = torch.arange(4)[:, None] * 20.0
    proposals = torch.cat([left, left, left + 10, left + 10], dim=1)  # apart from one another
    model = Known(proposals, torch.stack([1 - scores, scores], dim=1).log(), torch.zeros(4, 8))
    for score, fewest, most, expected in ((0.4, 1, 4, [1, 3]), (0.2, 1, 4, [1, 3, 2]), (0.4, 3, 4, [1, 3, 2]),
                                          (0.0, 1, 3, [1, 3, 2]), (0.9, 1, 4, [1])):  # fmt: skip
        found = region_features(model, picture(0), BoxChoice(fewest=fewest, most=most, score=score))
        assert found[:, 0].tolist() == expected


def test_pictures_go_where_the_weights_are() -> None:
    model = Known(torch.zeros(1, 4), torch.zeros(1, 2), torch.zeros(1, 8)).to("meta")

    def transform(pixels: list[torch.Tensor]) -> None:
        raise InterruptedError(pixels[0].device)

    model.transform = transform
    with pytest.raises(InterruptedError, match="meta"):
        region_features(model, picture(0), BoxChoice())


def test_number_of_regions(detector: nn.Module) -> None:
    assert region_features(detector, picture(1), BoxChoice()).shape == (36, 1024)
    assert len(region_features(detector, picture(1), BoxChoice(fewest=3, most=7, score=0.0))) == 7
    assert len(region_features(detector, picture(1), BoxChoice(fewest=3, most=7, score=0.999))) == 3
    assert region_features(detector, picture(2, 3, 2), BoxChoice(fewest=4, most=4)).shape == (4, 1024)
    with pytest.raises(ValueError, match="fewest <= most"):
        BoxChoice(fewest=10, most=3)


def test_weights_come_from_either_kind_of_file(detector: nn.Module, tmp_path: Path) -> None:
    state = detector.state_dict()
    torch.save(state, tmp_path / "a.pth")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        loaded = faster_rcnn(tmp_path / name, size=SIZE)
        assert np.array_equal(
            region_features(loaded, picture(3), BoxChoice(fewest=2, most=2)),
            region_features(detector, picture(3), BoxChoice(fewest=2, most=2)),
        )
    (tmp_path / "bad.pth").write_bytes(b"no state dict")
    with pytest.raises(ValueError, match=r"bad\.pth cannot be read as a state dict"):
        read_weights(tmp_path / "bad.pth")
    torch.save({"model": state, "epoch": 3}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match="holds dict, expected a state dict: names and tensors alone"):
        read_weights(tmp_path / "nested.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit torchvision's fasterrcnn_resnet50_fpn"):
        faster_rcnn(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        faster_rcnn(tmp_path / "nowhere.pth")


# ---- many pictures


def described(count: int, first: int = 0) -> list[Described]:
    captions = [tuple(f"caption {n} of {number}" for n in range(5)) for number in range(first, first + count)]
    return [Described(50 + first + n, f"{first + n}.png", captions[n]) for n in range(count)]


def mean_colours(image: Image.Image) -> np.ndarray:
    """Stands in for a detector: as many regions as the picture is wide / 10, of three numbers."""
    return np.tile(np.asarray(image, dtype=np.float32).mean((0, 1)), (image.width // 10, 1))


def run_extraction(
    folder: Path, features_of: object = mean_colours, source: str = "test", first: int = 0, **options: bool
) -> list:
    settings = {"fixed": False, "half": False} | options
    images = described(6, first)
    return extract("dev", images, folder, folder, features_of, width=3, source=source, **settings)  # type: ignore[arg-type]


def interrupted(folder: Path, after: int) -> list[int]:
    """An extraction that is ended after so many pictures -> the widths of those that it had."""
    seen: list[int] = []

    def dying(image: Image.Image) -> np.ndarray:
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(image.width)
        return mean_colours(image)

    with pytest.raises(KeyboardInterrupt):
        run_extraction(folder, dying)
    return seen


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(6):
        picture(number, width=20 + 10 * number).save(tmp_path / f"{number}.png")
    return tmp_path


def test_a_killed_extraction_goes_on_and_gives_the_same_file(pictures: Path) -> None:
    seen = interrupted(pictures, after=3)
    assert not (pictures / "dev_ims.npy").exists()
    journal = pictures / "dev_ims.npy.journal"
    journal.write_text(journal.read_text() + '{"number": 53, "bo')  # killed in the middle of a line
    with pytest.raises(ValueError, match=r"was begun with .*'source': 'test'.* not with .*'source': 'other'"):
        run_extraction(pictures, source="other")
    later: list[int] = []
    run_extraction(pictures, lambda image: (later.append(image.width), mean_colours(image))[1])
    assert seen + later == [20, 30, 40, 50, 60, 70], "no picture twice"
    read = read_precomputed(pictures, "dev")
    assert read.ids.tolist() == [50, 51, 52, 53, 54, 55] and not journal.exists()
    for number, features in enumerate(read.features):
        with Image.open(pictures / f"{number}.png") as image:
            assert np.array_equal(features, mean_colours(image))
    assert run_extraction(pictures, lambda _: pytest.fail("extracted again")) == [], "what is finished is left alone"


def test_regions_that_never_reached_the_disk_are_extracted_again(pictures: Path) -> None:
    interrupted(pictures, after=4)
    partial = pictures / "dev_ims.npy.partial"
    partial.write_bytes(partial.read_bytes()[:-8])
    run_extraction(pictures)
    with Image.open(pictures / "3.png") as image:
        assert np.array_equal(read_precomputed(pictures, "dev").features[3], mean_colours(image))


def test_another_list_of_pictures_is_refused(pictures: Path) -> None:
    """Of equal length: the first regions would become those of other pictures."""
    for number in (6, 7):
        picture(number).save(pictures / f"{number}.png")

    interrupted(pictures, after=3)
    with pytest.raises(ValueError, match=r"was begun with .*'pictures'.*give the split file .* or delete it"):
        run_extraction(pictures, first=2)
    run_extraction(pictures)
    with pytest.raises(ValueError, match=r"holds other pictures than the 6 .* dev_ids\.txt .* give the split file"):
        run_extraction(pictures, first=2)
    assert read_precomputed(pictures, "dev").ids.tolist() == list(range(50, 56))


@pytest.mark.parametrize("half", [False, True])
def test_a_finished_split_keeps_its_precision(pictures: Path, half: bool) -> None:
    run_extraction(pictures, half=half)
    mine, other = ("float16", "float32") if half else ("float32", "float16")
    with pytest.raises(ValueError, match=f"holds {mine}, but {other} is asked for; ask for {mine} .*--float16"):
        run_extraction(pictures, half=not half)
    assert run_extraction(pictures, half=half) == []


def test_unreadable_pictures_are_left_out_and_listed(pictures: Path) -> None:
    (pictures / "1.png").write_bytes(b"not a picture")
    (pictures / "4.png").unlink()
    whole = (pictures / "5.png").read_bytes()
    (pictures / "5.png").write_bytes(whole[: len(whole) // 2])
    unreadable = run_extraction(pictures, lambda image: mean_colours(image)[:1], fixed=True, half=True)
    assert [item.file for item in unreadable] == ["1.png", "4.png", "5.png"]
    assert "UnidentifiedImageError" in unreadable[0].reason and "FileNotFoundError" in unreadable[1].reason
    listed = (pictures / "dev_unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["1.png", "4.png", "5.png"]
    read = read_precomputed(pictures, "dev")
    assert read.features.shape == (3, 1, 3) and read.features.dtype == np.float16
    assert read.ids.tolist() == [50, 52, 53] and read.captions[5] == "caption 0 of 2"
    assert run_extraction(pictures, fixed=True, half=True) == unreadable


# ---- the command


def write_split_file(path: Path) -> Path:
    splits = ["train", "train", "val", "test"]
    images = [
        {"imgid": n, "filename": f"{n}.png", "split": split, "sentences": [{"raw": f"{n} {m}"} for m in range(5)]}
        for n, split in enumerate(splits)
    ]
    path.write_text(json.dumps({"dataset": "flickr30k", "images": images}))
    return path


@pytest.mark.parametrize("given", [None, "cpu"])
def test_the_device(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    moved: list[torch.device] = []

    class Model(nn.Module):
        def to(self, device: torch.device) -> Model:
            moved.append(device)
            return self

    monkeypatch.setattr(extract_regions, "faster_rcnn", lambda weights, size: Model())
    monkeypatch.setattr(extract_regions, "region_features", lambda *_: np.ones((36, 1024), np.float32))
    files = {"images": pictures, "karpathy": write_split_file(tmp_path / "split.json"), "output": tmp_path / "out"}
    arguments = ["--random-weights", *(part for name, path in files.items() for part in (f"--{name}", str(path)))]
    extract_regions.main([*arguments, *([] if given is None else ["--device", given])])
    assert moved == [torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))]


def test_devices_that_are_not_there(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    common = ["--images", "a", "--karpathy", "b", "--output", "c", "--random-weights"]
    for name, message in (("gpu", "'gpu' is no device of torch"), ("cuda", "torch sees no CUDA device")):
        with pytest.raises(SystemExit, match="2"):
            extract_regions.main([*common, "--device", name])
        assert message in capsys.readouterr().err


def test_the_command(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    split_file = write_split_file(tmp_path / "split.json")
    output = tmp_path / "out"

    def run(*arguments: object, images: Path = pictures, size: int = SIZE) -> None:
        common = ("--images", images, "--karpathy", split_file, "--output", output, "--size", size, "--boxes", 4)
        extract_regions.main([*map(str, common), *map(str, arguments)])

    run("--random-weights")
    assert read_precomputed(output, "train").features.shape == (2, 4, 1024)
    assert "train: 2 images, 0 unreadable" in capsys.readouterr().out
    assert "fc7 of the 4 best boxes, 64 px, random weights" in (output / "source.txt").read_text()
    for arguments, changed, message in (
        ((), {}, "give the detector's --weights FILE, or --random-weights"),
        (("--random-weights",), {"images": output}, "none of 4 pictures is in --images"),
        (("--random-weights",), {"size": 2 * SIZE}, "holds features from torchvision Faster R-CNN"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*arguments, **changed)
        printed = capsys.readouterr().err
        assert message in printed and len(printed.strip().splitlines()) == 1
    assert extract_regions.parser().format_help().count("python scripts/extract_regions.py ") >= 2
