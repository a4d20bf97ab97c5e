"""The report of a small made-up run, read back with the standard library's HTML parser."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.pictures import retrieved_cards, thumbnail_uris
from eval.report import format_duration, write_report


class _Page(HTMLParser):
    """What a browser would see: text, tags, addresses, and pictures by their alternative text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.addresses, self.alts, self.classes = "", [], [], [], []
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += " " if tag in ("p", "th", "td", "dt", "dd", "br") else ""
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.addresses.append(value or "")
            if name == "alt" and value:
                self.alts.append(value)
            if name == "class":
                self.classes += (value or "").split()

    def handle_data(self, data: str) -> None:
        self.text += data


def _read(folder: Path) -> _Page:
    report = write_report(folder)
    assert report == folder / "report.html" and not list(folder.glob("*.tmp"))
    return _Page(report.read_text(encoding="utf-8"))


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(scope="module")
def page(finished_run: Path) -> _Page:
    """The page of the unchanged run, written once for the tests that only read it."""
    return _read(finished_run)


def test_the_page_shows_the_numbers_of_the_run(page: _Page) -> None:
    assert "vse_infty on openmoji" in page.text
    assert "147,456 of 22,713,216 parameters (0.65 %) were trained in 2 stages (adapt, then regularize)" in page.text
    assert "validation 32.3 36.3 41.3 4.5 32.3 36.3 41.3 4.5 219.8" in page.text
    assert "test 29.2 33.2 38.2 4.5 29.2 33.2 38.2 4.5 201.2" in page.text
    assert "chance 5.0 23.0 41.6 13.0 5.0 25.0 50.0 10.5 149.7" in page.text
    assert "0.432 at the end of the first stage, 0.088 at the end of the run" in page.text
    for definition in ("hit rate", "ties stand in a random order", "Model selected by: last epoch", "support no claim"):
        assert definition in page.text
    assert "adapt 3 min 05 s 64 %" in page.text
    assert "not run from a git checkout" in page.text
    assert "seed: 0 adapter: rank: 8" in page.text


def test_the_page_stands_alone(page: _Page) -> None:
    assert page.addresses and all(address.startswith("data:image/") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
    assert "url(" not in page.text and "@import" not in page.text  # the text includes the style sheet


def test_text_from_files_is_escaped(run_folder: Path) -> None:
    _change(run_folder / "run.json", command='train "><img src=x onerror=alert(1)>', model="<b>bold</b>")
    page = _read(run_folder)
    assert "two <script>alert('cats')</script> & a dog" in page.text and "script" not in page.tags
    assert "<b>bold</b> on openmoji" in page.text and "b" not in page.tags
    assert all(address.startswith("data:") for address in page.addresses)


def test_right_answers_are_marked_by_more_than_colour(page: _Page) -> None:
    assert page.alts.count("Rank 2, item 3, right answer") == 1
    assert page.text.count("✓ right") == 1 and page.classes.count("right") == 1
    assert "found at rank 2" in page.text and "not among the first 5" in page.text
    assert page.alts.count("Rank 3, item 5, wrong") == 2 and page.classes.count("clip") == 2  # four frames, one text
    assert page.text.count("item 9 no picture") == 2


def test_the_heat_map_is_of_the_most_redundant_layer(page: _Page) -> None:
    assert "encoder.layer.0.attention.value against each other" in page.text
    assert "Of the 3 layers this one was chosen because its mean was the highest before" in page.text
    assert "Names without their common encoder.layer." in page.text
    assert any(alt.startswith("Heat maps") and "encoder.layer.0.attention.value" in alt for alt in page.alts)


def test_a_missing_section_says_so(run_folder: Path) -> None:
    optional = ("redundancy.json", "retrieved.json", "log.jsonl", "config.yaml")
    for name in optional:
        (run_folder / name).unlink()
    page = _read(run_folder)
    for name in optional:
        assert f"this run's folder has no {name}" in page.text


def test_data_without_validation(run_folder: Path) -> None:
    metrics = json.loads((run_folder / "metrics.json").read_text())
    del metrics["validation"], metrics["chance"]["validation"], metrics["redundancy"]
    (run_folder / "metrics.json").write_text(json.dumps(metrics))
    page = _read(run_folder)
    assert "Rsum test 29.2" in page.text and "at the end of the first stage" not in page.text


@pytest.mark.parametrize("name", ["run.json", "metrics.json"])
def test_an_unfinished_run_is_refused(run_folder: Path, name: str) -> None:
    (run_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}.*finished run"):
        write_report(run_folder)


def test_malformed_files_are_named(run_folder: Path) -> None:
    _change(run_folder / "metrics.json", test={"rsum": 1.0})
    with pytest.raises(ValueError, match=r"metrics\.json, test lacks i2t_R@1"):
        write_report(run_folder)
    (run_folder / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is not valid JSON"):
        write_report(run_folder)


def test_a_line_of_the_log_that_was_cut_off_is_named(run_folder: Path) -> None:
    with (run_folder / "log.jsonl").open("a") as log:
        log.write('{"stage": "regu')
    with pytest.raises(ValueError, match=r"log.jsonl, line \d+: not JSON"):
        write_report(run_folder)


@pytest.mark.parametrize("item", ["../../secret", 1.0, True, None])
def test_thumbnails_are_named_by_integers_only(tmp_path: Path, item: object) -> None:
    with pytest.raises(ValueError, match="expected an integer for item"):
        thumbnail_uris(tmp_path, item)


def test_only_pictures_can_be_shown(tmp_path: Path) -> None:
    queries = [{"direction": "i2t", "query": "q", "results": []}]
    with pytest.raises(ValueError, match="expected direction 't2i'"):
        retrieved_cards({"k": 5, "queries": queries}, tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185.2, "3 min 05 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("device", "processes", "shown"),
    [("NVIDIA A100", 2, "2 x NVIDIA A100"), ("cpu", 1, "CPU thread"), (None, None, "CPU thread")],
)
def test_the_device_is_named(run_folder: Path, device: str | None, processes: int | None, shown: str) -> None:
    """Runs of before did not note it."""
    path = run_folder / "run.json"
    if device is not None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"device": device, "processes": processes}))
    assert shown in write_report(run_folder).read_text(encoding="utf-8")
