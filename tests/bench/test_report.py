"""The page: one file that asks for nothing, says the answer first, shows every image as it is, whatever things are called."""

from __future__ import annotations

import base64
import importlib.resources
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest
from invented import MAIN, N, invented, pictures
from PIL import Image

from stepdistill.bench.features import Images
from stepdistill.bench.fit import Line
from stepdistill.bench.plots import fit_words
from stepdistill.bench.report import page, write_report
from stepdistill.bench.rows import TEACHER, Cell, Results, Value

PROMPTS = ["a red circle above a ring", "two squares"]
FITS = {TEACHER: Line(0.06, 0.021, 0.001, 0.0001, 0.9998, 10)}
EVIL = "<script>alert('1')</script>\"&amp;{{ 7 * 7 }}</title>"
_VOID = {"meta", "link", "img", "br", "path", "use"}


class Tags(HTMLParser):
    """All tags with their attributes, the text, and tags that were left open or closed twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.faults = "", list[str](), list[str]()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID and (not self.open or self.open.pop() != tag):
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def bare(model: str = "s", **changes: object) -> Results:
    """A page that is drawn quickly: two rows and their distance, nothing else."""
    full = invented()
    rows = [full.quality[0], next(r for r in full.quality if r.cell == Cell("lcm", 4, 1.0))]
    rows = [replace(row, values={"fd": row.values["fd"]}) for row in rows]
    rows[1] = replace(rows[1], cell=replace(rows[1].cell, model=model))
    return replace(full, **{"quality": rows, "speed": [], **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def full() -> Tags:
    results = invented()
    return Tags(page(results, pictures(results, 2, 8), PROMPTS, FITS))


def test_the_template_is_part_of_the_package() -> None:
    assert importlib.resources.files("stepdistill.bench").joinpath("report.html.j2").is_file()


def test_the_answer_comes_first_and_the_order_is_kept(full: Tags) -> None:
    said = [
        "How many steps do lcm and progressive need?", "lcm: 4 steps", "4 steps at guidance 1: indistinguishable",
        "progressive: not at 1, 2, 4 or 8 steps", "The floor: 1,200 real images score 2.1", "Quality and speed", "All numbers",
        "Images", "Where the seconds go", "How it was measured", "Protocol", "Notes",
    ]  # fmt: skip
    text = full.text.replace("\N{NO-BREAK SPACE}", " ")
    places = [text.find(words) for words in said]
    assert -1 not in places
    assert places == sorted(places)


def test_the_page_is_well_formed(full: Tags) -> None:
    assert full.faults == [] and full.open == []
    ids = [attributes["id"] for _, attributes in full.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert full.all("html") == [{"lang": "en"}] and {"charset": "utf-8"} in full.all("meta")
    assert any(meta.get("name") == "viewport" for meta in full.all("meta"))
    assert len(full.all("h1")) == 1


def test_it_asks_for_nothing_and_runs_nothing(full: Tags) -> None:
    names = {tag for tag, _ in full.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "base", "video", "audio", "source"}
    for _, attributes in full.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "poster", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
        assert re.findall(r"url\((?!#)", attributes.get("style") or "") == []
    policy = next(meta["content"] for meta in full.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "script" not in policy


def test_everything_seen_can_be_read_out(full: Tags) -> None:
    assert all(image["alt"] for image in full.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in full.all("svg"))
    assert all(th.get("scope") in ("row", "col") for th in full.all("th"))
    scrolls = [div for div in full.all("div") if div.get("class") == "scroll"]
    assert scrolls and all(div.get("tabindex") == "0" and div.get("aria-label") for div in scrolls)  # by keyboard too


def test_all_plots_are_there(full: Tags) -> None:
    labels = [svg["aria-label"] or "" for svg in full.all("svg")]
    starts = [
        "Frechet distance against seconds",
        "Frechet distance against steps",
        "all right against steps",
        "recall against",
    ]
    for start in [*starts, "Seconds an image by part", "Seconds an image against network evaluations"]:
        assert sum(label.startswith(start) for label in labels) == 1, start
    assert fit_words(FITS[TEACHER]) in full.text


def test_tables_have_every_row(full: Tags) -> None:
    rows = len(invented().quality)
    assert (
        full.text.count("indistinguishable\n") >= 0
        and len([r for r in full.all("tr") if r.get("class") == "main"]) == 1
    )
    heads = [th for th in full.all("th") if th.get("scope") == "row"]
    assert len(heads) >= rows + 2 * rows + len(PROMPTS)  # quality, two batch sizes, prompts
    for words in (
        "3.6 [3.37, 3.83]",
        "features › hash",
        "6a1f00c2",
        "real › 1200 › fd",
        "2.1 [1.865, 2.335]",
        "threads",
        invented().fingerprint,
    ):
        assert words in full.text


def decoded(tag: dict[str, str | None]) -> np.ndarray:
    head, _, data = (tag["src"] or "").partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_every_image_is_where_it_belongs_pixel_by_pixel() -> None:
    results = bare()
    draws = np.random.default_rng(0)
    grid = {row.cell: draws.integers(0, 256, (2, 8, 12, 3), dtype=np.uint8) for row in results.quality}
    tags = Tags(page(results, grid, PROMPTS)).all("img")
    expected = [(grid[cell][i], f"{cell}: {prompt}") for i, prompt in enumerate(PROMPTS) for cell in grid]
    assert [tag["alt"] for tag in tags] == [alt for _, alt in expected]
    for tag, (pixels, _) in zip(tags, expected, strict=True):
        np.testing.assert_array_equal(decoded(tag), pixels)
        assert (tag["width"], tag["height"], tag.get("class")) == ("96", "64", "small")  # 8 times, without smoothing


@pytest.mark.parametrize(
    ("size", "shown", "stored", "small"), [(64, 128, 64, True), (96, 96, 96, False), (512, 256, 256, False)]
)
def test_sizes_of_tiles(size: int, shown: int, stored: int, small: bool) -> None:
    images = np.full((1, size, size, 3), 77, dtype=np.uint8)
    (tag,) = Tags(page(bare(), {MAIN: images}, ["x"])).all("img")
    assert (tag["width"], tag["height"], "class" in tag) == (str(shown), str(shown), small)
    assert decoded(tag).shape == (stored, stored, 3) and (decoded(tag) == 77).all()


def test_names_prompts_and_notes_are_text() -> None:
    results = bare(EVIL, notes=[EVIL], environment={EVIL: EVIL})
    results = replace(results, protocol={**results.protocol, "prompts": {"source": EVIL}, "list": [EVIL, 2]})
    grid: dict[Cell, Images] = {row.cell: np.full((1, 8, 8, 3), 9, dtype=np.uint8) for row in results.quality}
    text = page(results, grid, [EVIL], {EVIL: FITS[TEACHER]})
    assert "<script" not in text and text.count("</title>") == 1
    found = Tags(text)
    assert found.faults == [] and found.open == []
    assert found.text.count(EVIL) >= 8 and "49" not in re.findall(r"\{\{ .*? \}\}|49 \}\}", found.text)
    assert f"{results.quality[1].cell}: {EVIL}" in [image["alt"] for image in found.all("img")]
    hostile = replace(results, quality=[replace(r, cell=replace(r.cell, model="\ud800\x02")) for r in results.quality])
    assert "\N{REPLACEMENT CHARACTER}" in page(hostile, None, [])


def test_nothing_is_claimed_without_a_teacher() -> None:
    text = page(bare(teacher=None), None, [])
    assert "No student was held against its teacher" in text and "enough: the table" in text
    assert "Images</h2>" not in text and "seconds go" not in text
    empty = Tags(page(Results([], {"features": {"name": "f", "hash": "h"}}, environment={}), None, []))
    assert "No student was measured" in empty.text and empty.all("svg") == [] and empty.faults == []


def test_no_floor_is_said() -> None:
    results = bare()
    results = replace(results, protocol={**results.protocol, "real": {}})
    assert f"No floor was measured at N = {N:,}" in page(results, None, [])


def test_too_few_images_are_said() -> None:
    results = bare()
    wide = replace(results.quality[1], against=Value(0.05, (-5.0, 5.1)))
    text = Tags(page(replace(results, quality=[results.quality[0], wide]), None, [])).text
    assert "s: too few images to say" in text and "? too few images" in text and "≈ indistinguishable" not in text


def test_images_must_match_their_prompts() -> None:
    images = np.full((2, 8, 8, 3), 9, dtype=np.uint8)
    with pytest.raises(ValueError, match="expected an image a prompt, got 2"):
        page(bare(), {MAIN: images}, ["one"])
    with pytest.raises(ValueError, match="uint8"):
        page(bare(), {MAIN: images.astype(np.float32)}, PROMPTS)


def test_the_file_is_written_whole_and_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, bare("é\udcff"), None, [])
    first = path.read_bytes()
    assert first.decode("utf-8").startswith("<!DOCTYPE html>") and "é?" in first.decode("utf-8")
    write_report(path, bare("é\udcff"), None, [])
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


SEEN = """
(() => {
  document.querySelectorAll('details').forEach(d => { d.open = true; });
  const box = e => e.getBoundingClientRect();
  const inside = [...document.querySelectorAll('figure svg')];
  return {
    images: [...document.images].map(i => [i.complete, i.naturalWidth, box(i).width, getComputedStyle(i).imageRendering]),
    plots: inside.map(s => [box(s).width, box(s).height, s.checkVisibility()]),
    letters: inside.flatMap(s => [...s.querySelectorAll('text')]).map(t => box(t).height),
    ink: [...new Set(inside.flatMap(s => [...s.querySelectorAll('text')]).map(t => getComputedStyle(t).fill))],
    page: getComputedStyle(document.body).backgroundColor,
    wide: document.documentElement.scrollWidth - innerWidth,
  };
})()
"""

needs_browser = pytest.mark.skipif(browser.found() is None, reason="no Chromium: apt-get install chromium")


@pytest.mark.slow
@needs_browser
def test_in_a_browser(tmp_path: Path) -> None:
    """At both widths and in both colours: nothing asked for, no complaint, all images and plots there to be seen."""
    results = invented()
    write_report(tmp_path / "report.html", results, pictures(results, 2, 32), PROMPTS, FITS)
    with browser.browser() as tab:
        for width, dark in ((1280, False), (390, False), (390, True)):
            tab.look(width, dark=dark)
            tab.open(tmp_path / "report.html")
            seen = tab.run(SEEN)
            assert len(seen["images"]) == 2 * len(results.quality)
            assert {tuple(image) for image in seen["images"]} == {(True, 32, 96, "pixelated")}
            assert len(seen["plots"]) >= 6 and all(w > 300 and h > 150 and shown for w, h, shown in seen["plots"])
            assert min(seen["letters"]) > 8  # pixels: readable on the phone too
            assert (seen["ink"], seen["page"]) == (
                (["rgb(227, 231, 236)"], "rgb(20, 23, 28)") if dark else (["rgb(28, 33, 40)"], "rgb(255, 255, 255)")
            )
            assert seen["wide"] <= 0  # tables scroll, the page doesn't
        assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data"}
        assert tab.problems == []


@pytest.mark.slow
@needs_browser
def test_the_browser_would_have_told(tmp_path: Path) -> None:
    """The checks above can fail: a broken image, a request, a message and an exception are all seen."""
    body = "<img src='data:image/png;base64,AAAA'><img src='http://localhost:9/x.png'><script>console.error('no'); f()</script>"
    (tmp_path / "bad.html").write_text(f"<!DOCTYPE html><title>x</title>{body}")
    with browser.browser() as tab:
        tab.look(390)
        tab.open(tmp_path / "bad.html")
        assert [image[1] for image in tab.run(SEEN)["images"]] == [0, 0]
        assert "http://localhost:9/x.png" in tab.requests
        assert any("no" in problem for problem in tab.problems) and any(
            "f is not defined" in problem for problem in tab.problems
        )
