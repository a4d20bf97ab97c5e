"""Region features of one picture with a random detector, against its own parts and torchvision's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture
from safetensors.torch import save_file
from torch import nn

from adapters.torchvision_cpu import use_cpu_kernels
from retrieval.regions.detector import BoxChoice, best_first, faster_rcnn, read_weights, region_features

SIZE = 64  # pixels; the published detectors take 800


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    torch.manual_seed(0)
    return faster_rcnn(None, size=SIZE)


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
