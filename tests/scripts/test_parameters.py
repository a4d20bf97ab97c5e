"""The published parameter counts, as integers, on backbones of full size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/benchmark.py`

from benchmarks.parameters import ROWS, Row, count

# Worked out by hand from the widths and depths of the backbones; None where the paper's number has no known setting
# and ours is only shown.
EXPECTED: dict[tuple[str, str, str], int] = {
    ("ViT-B/16", "full", "85.8"): 85_798_656,
    ("ViT-B/16", "bitfit", "0.10"): 102_912,
    ("ViT-B/16", "vpt", "0.56"): 9_216 * 61,
    ("ViT-B/16", "lst", "2.38"): 2_376_288 + 12,  # the published sum leaves out the gates, one a block
    ("ViT-B/16", "adalora", "0.44"): 442_656,
    ("ViT-B/16", "adaptformer", "0.16"): 156_768,
    ("ViT-B/16", "ssf", "0.21"): 205_824,
    ("ViT-B/16", "fact_tk", "0.07"): 86_528,
    ("ViT-B/16", "fact_tt", "0.04"): 61_440,
    ("ViT-B/16", "lora", "0.44"): 442_368,
    ("ViT-B/16", "lora", "0.22"): 221_184,
    ("ViT-B/16", "lora", "0.11"): 110_592,
    ("ViT-B/16", "moslora", "0.40"): 444_672,
    ("ViT-B/16", "dtl", "0.04"): 36_864,
    ("ViT-B/16", "dtl_plus", "0.04"): 43_776,
    ("Swin-B", "full", "86.7"): 86_743_224,
    ("Swin-B", "bitfit", "0.20"): 200_760,
    ("Swin-B", "vpt", "0.16"): 156_416,
    ("Swin-B", "fact_tk", "0.14"): 82_432,
    ("Swin-B", "dtl_plus", "0.09"): 90_112 + 25 * (512 + 1024),
    ("Swin-B", "dtl", "0.09"): 90_112,
    ("Swin-B", "lora", "-"): 577_536,
    ("ConvNeXt-B", "full", "-"): 87_566_464,
    ("ConvNeXt-B", "lora", "0.58"): 8 * 180_480,
    ("BERT", "full", "109.5"): 109_482_240,
    ("BERT", "partial", "0.8"): 787_456,
    ("BERT", "houlsby", "2.6"): 2_576_512,
    ("BERT", "bitfit", "0.9"): 890_368,
    ("BERT", "prefix", "10.7"): 10_659_840,
    ("BERT", "ssf", "0.2"): 204_288,
    ("BERT", "fact_tt", "0.6"): 610_560,
    ("BERT, no pooler", "lst", "7.5"): 7_455_424 + 12,
    ("BERT, no pooler", "unipt", "5.9"): 5_921_281,
    ("BERT", "adalora", "1.0"): 1_008_784,
    ("BERT", "lora", "1.1"): 1_082_368,
    ("CLIP ViT-B/32", "full", "151.3"): 151_277_313,
    ("CLIP ViT-B/32", "partial", "0.7"): 655_360,
    ("CLIP ViT-B/32", "houlsby", "5.2"): 5_146_368,
    ("CLIP ViT-B/32", "bitfit", "0.1"): 138_240,
    ("CLIP ViT-B/32", "vpt", "0.2"): 153_600,
    ("CLIP ViT-B/32", "ssf", "0.5"): 343_552,
    ("CLIP ViT-B/32", "fact_tt", "0.8"): 786_432,
    ("CLIP ViT-B/32", "lst", "11.2"): 10_655_552 + 24,
    ("CLIP ViT-B/32", "unipt", "9.6"): 9_584_642,
    ("CLIP ViT-B/32", "adalora", "1.2"): 1_208_752,
    ("CLIP ViT-B/32", "lora", "1.3"): 1_300_480,
}


PAGE = (Path(__file__).parents[2] / "docs" / "benchmarks" / "parameters.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.backbone}-{row.method}-{row.paper}")
def test_count(row: Row) -> None:
    counted = count(row)
    chosen = ", ".join(f"{name} {value}" for name, value in row.settings.items())
    start = f"| {row.backbone} | `{row.method}` | {chosen} |"
    (line,) = [line for line in PAGE if line.startswith(start) and line.split(" | ")[4] == row.paper]
    assert line.removeprefix(start).startswith(f" {counted:,} |"), (
        "docs/benchmarks/parameters.md is made of these counts"
    )
    if (key := (row.backbone, row.method, row.paper)) in EXPECTED:
        assert counted == EXPECTED[key]
    elif row.why == "":  # nothing explains a difference, so there is none
        assert round(counted / 1e6, len(row.paper.partition(".")[2])) == float(row.paper)


def test_every_expected_count_is_in_the_table() -> None:
    assert EXPECTED.keys() <= {(row.backbone, row.method, row.paper) for row in ROWS}
