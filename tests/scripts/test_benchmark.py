"""The benchmark's counts against counts by hand, and a tiny benchmark from options to page. No time is tested."""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters import LoRA, inject
from regularizers import REGULARIZERS, ReSoRA, capture, nonlinear
from regularizers.nonlinear import MARGIN, SPACING

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/benchmark.py`

import benchmark
import benchmarks.regularizers as subject
import benchmarks.training as training_subject
from benchmarks.measure import count, median_interval, paired_ratios, resident_peak, round_ratios
from benchmarks.naive_equations import NAIVE


def nothing(_: Tensor) -> None:
    pass


def test_flops_of_a_product_and_its_two_gradients() -> None:
    left, right = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert count(lambda: left @ right, nothing).flops == 2 * 3 * 5 * 7
    assert count(lambda: (left @ right).sum(), Tensor.backward).flops == 3 * 2 * 3 * 5 * 7


def test_flops_of_products_that_torch_passes_over() -> None:
    branch = count(lambda: torch.zeros(3, 7).addmm_(torch.ones(3, 5), torch.ones(5, 7)), nothing)
    assert branch.flops == 2 * 3 * 5 * 7
    query = torch.randn(2, 3, 11, 8, requires_grad=True)  # 2 images, 3 heads, 11 tokens, 8 wide
    product = 2 * (2 * 3) * 11 * 11 * 8
    assert count(lambda: F.scaled_dot_product_attention(query, query, query), nothing).flops == 2 * product
    both = count(lambda: F.scaled_dot_product_attention(query, query, query).sum(), Tensor.backward)
    assert both.flops == (2 + 5) * product  # backward: the scores again, and the gradients of q, k, v and the scores


def test_flops_of_a_gradient_that_is_computed_in_the_forward_pass() -> None:
    """`nonlinear` computes its gradient at once, in an autograd function of ours."""
    activations = torch.randn(64, 4, requires_grad=True)
    eager = count(lambda: nonlinear(activations), partial(torch.autograd.grad, inputs=activations))
    bumps = _features(activations)
    product = 2 * (4 * bumps) ** 2 * 64  # of the features of all subspaces with each other
    assert eager.flops == 2 * product  # and of the products with the features, for the gradient
    assert eager.kept_bytes < 3 * activations.numel() * 4  # the features are many times as large


def _features(activations: Tensor) -> int:
    """Bumps a subspace: the grid covers the widest one, in bandwidths."""
    widths = []
    for column in activations.detach().T:
        median = torch.pdist(column[:, None]).median()
        widths.append(float((column.max() - column.min()) / median))
    return int((max(widths) + 2 * MARGIN) / SPACING) + 2


def test_bytes_follow_storages() -> None:
    x = torch.randn(1000, requires_grad=True)  # 4,000 bytes
    counts = count(lambda: (x * 2).exp().sum(), Tensor.backward, [x])
    assert counts.kept_bytes == 4000 + 4  # the result of exp, which its gradient needs, and the sum
    assert counts.largest == 1000
    forward = count(lambda: (x.detach() * 2).exp().sum(), nothing, [x])
    assert (forward.kept_bytes, forward.peak_bytes) == (4, 3 * 4000)  # x, 2 x and exp(2 x) at once
    assert forward.elementwise == 2000
    views = count(lambda: x.detach().view(10, 100).T[3:, :5].mul_(2), nothing, [x[:1]])
    assert views.peak_bytes == 4000 and views.kept_bytes == 0 and views.largest == 0


def test_every_repeat_counts_the_same() -> None:
    layer = torch.nn.Linear(20, 30)
    x = torch.randn(5, 20)

    def backward(loss: Tensor) -> None:
        loss.backward()
        layer.zero_grad()

    assert len({count(lambda: layer(x).relu().sum(), backward, [x, *layer.parameters()]) for _ in range(3)}) == 1


def test_resident_peak_sees_a_large_tensor() -> None:
    before = resident_peak()
    torch.ones(before // 4 + 10_000_000)  # larger than anything before
    assert resident_peak() >= before + 30_000_000


def test_flops_of_linear_in_layers_of_vit_b_16() -> None:
    """At most 1.0005 of plain LoRA's: exact, and in two layers of the twelve the share is no smaller than in all."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", depth=2, num_classes=100)
    inject(model, LoRA(targets=("q", "k", "v")), train=("head",))
    images, resora = torch.randn(1, 3, 224, 224), ReSoRA("linear")

    def penalised() -> Tensor:
        with capture(model) as subspaces:
            loss = model(images).square().mean()
        return loss + resora(subspaces)["resora_linear"]

    plain = count(lambda: model(images).square().mean(), Tensor.backward).flops
    with_penalty = count(penalised, Tensor.backward).flops
    # Six layers; the Gram matrix (8, 197) x (197, 8) and the gradients to its two sides.
    assert with_penalty - plain == 6 * 3 * 2 * 8 * 8 * 197
    assert with_penalty / plain <= 1.0005


@pytest.mark.parametrize("measure", NAIVE)
def test_equations_as_printed_are_what_the_closed_forms_compute(measure: str) -> None:
    generator = torch.Generator().manual_seed(1)
    activations = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    basis = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    expected = NAIVE[measure][1](activations, basis)
    torch.testing.assert_close(REGULARIZERS[measure](activations, basis), expected, rtol=1e-5, atol=0)


def test_pairs_alternate_and_warm_up_does_not_count() -> None:
    calls: list[str] = []
    ratios = paired_ratios(lambda: calls.append("plain"), lambda: calls.append("measured"), 3, warm_up=2)
    plain_first, measured_first = ["plain", "measured"], ["measured", "plain"]
    assert calls == plain_first + measured_first + measured_first + plain_first + plain_first
    assert len(ratios) == 3
    assert median_interval([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)
    median, low, high = median_interval([0.9, 1.0, 1.1, 1.2, 5.0])
    assert median == 1.1 and 0.9 <= low < 1.1 < high <= 5.0


def test_a_tiny_benchmark_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Here, not in fresh processes: a minute of imports less. The resident peak then has no meaning.
    monkeypatch.setattr(subject, "in_fresh_process", lambda function, *arguments: (function(*arguments)[0], 1))
    monkeypatch.setattr(subject, "WARM_UP", 0)  # no time is looked at
    options = "--model vit_tiny_patch16_224 --image-size 32 --batch 2 --pairs 2 --measures linear --samples 500 1000"
    command = ["regularizers", *options.split(), "--threads", "1", "--output", str(tmp_path / "made")]
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit, match="2"):
            benchmark.main([*command, "--add"])
        assert "there is no run to add pairs to" in capsys.readouterr().err
        benchmark.main(command)
        once = json.loads((tmp_path / "made" / "regularizers.json").read_text())
        benchmark.main([*command, "--add"])
        with pytest.raises(SystemExit, match="2"):
            benchmark.main([*command, "--batch", "1", "--add"])
        assert "has batch 2, but this run 1: not the same" in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
    twice = json.loads((tmp_path / "made" / "regularizers.json").read_text())
    for first, second in zip(once["rows"], twice["rows"], strict=True):
        lengths = [len(row.pop("time_ratios")) for row in (first, second)]
        assert lengths[0] == (2 if first["penalty"] else 0)
        assert lengths[1] - lengths[0] == (2 if first["label"] == "LoRA + linear" else 0) and first == second
    page = (tmp_path / "made" / "regularizers.md").read_text()
    for line in ("| Full | 2 |", "| LoRA + linear | 2 |", "| LoRA + Eq. 7 as printed | 1 |", "| linear | FLOPs |"):
        assert line in page
    assert "added 2 pairs to LoRA with linear on" in page
    results = once
    found = {(row["label"], row["batch"]): row for row in results["rows"]}
    lora, linear, printed = (found[key] for key in [("LoRA", 2), ("LoRA + linear", 2), ("LoRA + Eq. 7", 1)])
    assert linear["reference"] == lora["counts"]
    added = linear["counts"]["flops"] - lora["counts"]["flops"]
    assert added == 36 * 3 * 2 * 8 * 8 * 2 * 5  # 36 layers, 2 images of 4 + 1 tokens
    assert printed["counts"]["peak_bytes"] > 2 * printed["reference"]["peak_bytes"]
    small, large, kernel = results["growth"]
    assert large["counts"]["peak_bytes"] < 2.5 * small["counts"]["peak_bytes"]
    assert large["counts"]["largest"] < 1000**2 and kernel["counts"]["largest"] >= 500**2


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(["--measures", "lineer"], "linear"), (["--pairs", "0"], "pairs is 0"), (["--samples", "1"], "at least 2")],
)
def test_a_mistake_says_what_is_expected(
    arguments: list[str], hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["regularizers", *arguments, "--output", str(tmp_path)])
    assert stop.value.code == 2 and hint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_timed_in_rounds_comes_first_equally_often() -> None:
    order: list[str] = []
    names = ("plain", "one", "other")
    calls = [partial(order.append, name) for name in names]
    ratios = round_ratios(calls[0], calls[1:], 6, warm_up=0)
    assert [len(each) for each in ratios] == [6, 6]
    rounds = [tuple(order[start : start + 3]) for start in range(0, 18, 3)]
    assert len(set(rounds)) == 6 == len(list(permutations(names))), "each order once"


def test_a_tiny_benchmark_of_the_text_side_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_subject, "WARM_UP", 0)
    threads = torch.get_num_threads()
    try:
        benchmark.main(
            ["training", *["--tiny", "--batch", "8", "--pairs", "1", "--threads", "1"], "--output", str(tmp_path)]
        )
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ["full fine-tuning", "LoRA", "LoRA, 4 buckets", "full fine-tuning, 4 buckets"]
    heads = 768 * 1024 + 1024 + 12_704  # the projection and GPO
    assert rows["LoRA"]["trained"] == rows["LoRA, 4 buckets"]["trained"] == 2 * 2 * 8 * 2 * 768 + heads
    assert len(found["lengths"]) == 8
    flops = {name: row["counts"]["flops"] for name, row in rows.items()}
    assert flops["LoRA, 4 buckets"] < 0.9 * flops["LoRA"] < 0.9 * flops["full fine-tuning"]
    assert len(rows["LoRA, 4 buckets"]["against LoRA"]) == 1
    assert "| LoRA, 4 buckets |" in (tmp_path / "training.md").read_text(encoding="utf-8")
