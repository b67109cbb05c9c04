"""The drawings: points where the numbers put them, the same bytes every time, nothing that leaks into the page around them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from invented import MAIN, invented

from stepdistill.bench.axes import bars
from stepdistill.bench.fit import fit_line
from stepdistill.bench.plots import (
    breakdown,
    fit_plot,
    fit_words,
    pareto,
    quality_latency,
    quality_steps,
    series,
    stage_seconds,
)
from stepdistill.bench.rows import TEACHER, Cell, Quality, Results, Speed, Value
from stepdistill.bench.svg import short, spread

INK, FIRST, SECOND = "currentColor", "var(--series-1, #0072b2)", "var(--series-2, #d55e00)"


def small(model: str = "s", fds: dict[int, float] | None = None, **changes: object) -> Results:
    """A student at a few numbers of steps, a second each, and the teacher at 8."""
    fds = {1: 40.0, 2: 20.0, 4: 10.0} if fds is None else fds
    quality = [
        Quality(Cell(model, n, 1.0), 50, float(n), {"fd": Value(fd, (fd * 0.9, fd * 1.2))}) for n, fd in fds.items()
    ]
    speed = [Speed(row.cell, 1, (float(row.cell.steps),), {}, row.evaluations) for row in quality]
    main = Cell(TEACHER, 8, 2.0)
    quality.append(Quality(main, 50, 16.0, {"fd": Value(5.0, (4.0, 6.0))}))
    facts = {"speed": [*speed, Speed(main, 1, (8.0,), {}, 16.0)], "teacher": main}
    return Results(quality, {"real": {"50": {"fd": {"value": 2.5, "interval": [2.4, 2.6]}}}}, **{**facts, **changes})  # type: ignore[arg-type]


def markers(svg: str, colour: str) -> list[tuple[float, float]]:
    """Where markers of a colour stand, from left to right, y upwards; the last is the one beside the label."""
    uses = [element for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}use")]
    styles = (
        f"fill: {colour}; stroke: {colour}",
        f"fill: {colour}; stroke: {colour}; stroke-linejoin: miter",
    )  # no ticks
    own = [use for use in uses if use.attrib["style"] in styles]
    return sorted((float(use.attrib["x"]), -float(use.attrib["y"])) for use in own)


def paths(svg: str, style: str) -> list[list[tuple[float, float]]]:
    """Corners of all paths in a style, y upwards."""
    found = [
        e
        for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")
        if style in e.attrib.get("style", "")
    ]
    return [[(float(x), -float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", e.attrib["d"])] for e in found]


def fillings(svg: str, style: str) -> list[list[tuple[float, float]]]:
    """Corners of all bands in a style: plain shapes, or shapes that are defined once and set in place."""
    root = ElementTree.fromstring(svg)
    shapes = {element.attrib.get("id"): element.attrib.get("d", "") for element in root.iter()}
    found = paths(svg, style)
    for use in (e for e in root.iter("{http://www.w3.org/2000/svg}use") if style in e.attrib["style"]):
        corners = re.findall(r"[ML] (\S+) (\S+)", shapes[use.attrib["href"].removeprefix("#")])
        found.append([(float(x) + float(use.attrib["x"]), -float(y) - float(use.attrib["y"])) for x, y in corners])
    return found


@pytest.fixture(scope="module")
def plots() -> Iterator[list[str]]:
    before, results, fit = dict(matplotlib.rcParams), invented(), fit_line([1, 2, 4], [2.0, 3.0, 5.0])
    assert fit is not None
    drawn = [
        quality_latency(results),
        quality_steps(results),
        quality_steps(results, "accuracy/shape"),
        breakdown(results),
    ]
    yield [*drawn, fit_plot(results, {TEACHER: fit})]
    assert dict(matplotlib.rcParams) == before  # what others draw is not ours to change


def test_pareto_front_is_what_nothing_beats() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (2.0, 3.0), (4.0, 1.0), (2.5, 3.0), (1.0, 6.0)]
    assert pareto(points) == [1, 3, 0]
    assert pareto([(1.0, 1.0)]) == [0] and pareto([]) == [] and len(pareto([(1.0, 1.0), (1.0, 1.0)])) == 1


def test_pareto_front_by_brute_force() -> None:
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, 12, (60, 2)).astype(float).tolist()]
    beaten = [any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points) for p in points]
    assert {points[i] for i in pareto(points)} == {p for p, lost in zip(points, beaten, strict=True) if not lost}


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.52, 0.48], [0.55, 0.45]),  # the order stays
        ([0.0, 0.02], [0.0, 0.1]),
        ([0.99, 1.2, -0.5], [0.9, 1.0, 0.0]),
        ([0.5, 0.5, 0.5, 0.65], [0.3875, 0.4875, 0.5875, 0.6875]),
        ([], []),
    ],
)
def test_labels_keep_their_distance(wanted: list[float], placed: list[float]) -> None:
    assert spread(wanted, 0.1) == pytest.approx(placed)


def test_labels_that_do_not_fit_share_the_room() -> None:
    assert spread([0.5] * 5, 0.4) == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_names_are_made_to_fit() -> None:
    assert short("plain") == "plain" and short("a\n b\t c") == "a b c"
    assert short("a" * 20 + "b" * 20, 9) == "aaaa\N{HORIZONTAL ELLIPSIS}bbbb" and len(short("x" * 99, 10)) == 10
    assert short("a\x01\ud800b") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"


def test_bars_reach_the_ends_of_intervals() -> None:
    down, up = bars([Value(5.0, (4.0, 7.0)), Value(5.0), Value(5.0, (5.5, 6.0)), Value(5.0, (3.0, 4.0))])
    assert down == [1.0, 0.0, 0.0, 2.0] and up == [2.0, 0.0, 1.0, 0.0]  # never negative


def test_points_stand_where_their_numbers_put_them() -> None:
    svg = quality_steps(small())
    first, second, third, label = markers(svg, FIRST)
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.01)  # 1, 2, 4 on a logarithmic axis
    assert first[1] - second[1] == pytest.approx(second[1] - third[1], abs=0.01)  # 40, 20, 10
    assert first[1] > second[1] > third[1]  # larger is higher
    teacher = markers(svg, INK)
    assert teacher[0][0] - third[0] == pytest.approx(third[0] - second[0], abs=0.01)
    assert third[1] - teacher[0][1] == pytest.approx(second[1] - third[1], abs=0.01)
    assert label[0] > teacher[0][0]  # beside the axes


def test_the_band_lies_around_its_line_and_real_images_lie_below() -> None:
    svg = quality_steps(small())
    (band,) = fillings(svg, f"fill: {FIRST}; fill-opacity: 0.2")
    points = markers(svg, FIRST)[:3]
    octave = points[0][1] - points[1][1]
    for x, y in points:
        edges = sorted({round(b, 2) for a, b in band if abs(a - x) < 0.01})
        assert edges == pytest.approx([y + octave * np.log2(0.9), y + octave * np.log2(1.2)], abs=0.02)
    (floor,) = paths(svg, "opacity: 0.13")
    teacher = markers(svg, INK)[0][1]
    assert max(y for _, y in floor) == pytest.approx(teacher + octave * np.log2(2.6 / 5), abs=0.02)
    dashes = [path for path in paths(svg, "stroke-dasharray: 4,3") if path[0][1] == path[-1][1]]
    assert [path[0][1] for path in dashes] == pytest.approx([teacher], abs=0.01)  # the teacher's own row, right across


def test_seconds_and_the_front() -> None:
    results = small(fds={1: 40.0, 2: 50.0, 4: 10.0})
    large = [replace(speed, batch_size=4, seconds=(9.0,)) for speed in results.speed]  # another batch's are not drawn
    svg = quality_latency(replace(results, speed=[*results.speed, *large]))
    points, teacher = markers(svg, FIRST)[:3], markers(svg, INK)[0]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.01)
    (front,) = paths(svg, "var(--front")
    expected = [points[0], points[2], teacher]  # two steps are beaten by one
    assert np.array(front) == pytest.approx(np.array(expected), abs=0.01)
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"1", "2", "4", "8", "s", "teacher"} <= set(texts)
    assert "Pareto front: s, 1 step, guidance 1: 1 s, 40; s, 4 steps" in svg


def test_shares_are_drawn_on_a_straight_axis() -> None:
    rows = [Quality(Cell("s", n, 1.0), 50, 1.0, {"recall": Value(v)}) for n, v in {1: 0.02, 2: 0.42, 4: 0.82}.items()]
    first, second, third, _ = markers(quality_steps(Results(rows, {}), "recall"), FIRST)
    assert second[1] - first[1] == pytest.approx(third[1] - second[1], abs=0.01)


def test_bars_are_as_long_as_their_stages() -> None:
    stages = {"rest": (1.0,), "text": (2.0, 9.0, 4.0), "decode": (6.0,), "denoiser": (10.0,)}
    svg = breakdown(small(speed=[Speed(Cell("s", 4, 1.0), 2, (9.0,), stages, 4.0)]), batch_size=2)
    lengths, starts = {}, []
    for name in ("text", "denoiser", "decode", "rest"):
        (bar,) = [p for p in paths(svg, f"fill: var(--stage-{name}") if len(p) > 3]
        lengths[name] = max(x for x, _ in bar) - min(x for x, _ in bar)
        starts.append(min(x for x, _ in bar))
    unit = lengths["rest"]
    assert lengths == pytest.approx(
        {"text": 4 * unit, "denoiser": 10 * unit, "decode": 6 * unit, "rest": unit}, rel=1e-3
    )
    ends = [start + length for start, length in zip(starts, lengths.values(), strict=True)]
    assert starts[1:] == pytest.approx(ends[:-1], abs=0.01)  # one after the other, in the order of a call
    assert ">10.5 s<" in svg  # the medians, an image


def test_stage_seconds_are_medians_an_image() -> None:
    speed = Speed(Cell("s", 1, 1.0), 4, (1.0,), {"other": (2.0,), "text": (1.0, 9.0, 2.0)}, 1.0)
    assert list(stage_seconds(speed).items()) == [("text", 0.5), ("other", 0.5)]


def test_a_fit_is_drawn_from_no_evaluations_on_through_its_points() -> None:
    results = small()
    fit = fit_line([1, 2, 4], [1.0, 2.0, 4.0])
    assert fit is not None
    svg = fit_plot(results, {"s": fit, "not measured": fit})
    points = markers(svg, FIRST)[:3]
    ends = next(path for path in paths(svg, f"stroke: {FIRST}; stroke-width: 1.2") if len(path) == 2)
    assert ends[1] == pytest.approx(points[2], abs=0.01)
    before = 2 * np.array(points[0]) - np.array(points[1])  # 0 evaluations in 0 seconds
    assert np.array(ends[0]) == pytest.approx(before, abs=0.01)
    assert fit_words(fit) == "t = 0 s + 1 s x NFE (3 points, R\N{SUPERSCRIPT TWO} = 1.0000)"
    assert "R\N{SUPERSCRIPT TWO}" not in fit_words(replace(fit, r2=None))


def test_each_line_has_a_look_of_its_own() -> None:
    rows = [Quality(Cell(f"m{i}", 1, g), 50, 1.0, {"fd": Value(1.0)}) for i in range(12) for g in (1.0, 2.0)]
    looks = [(s.colour, s.marker, str(s.dash)) for s in series(Results(rows, {}))]
    assert len(set(looks)) == 24
    found = series(invented())
    assert [s.label for s in found] == ["teacher, g 2", "teacher, g 1", "lcm", "progressive"]
    assert [row.cell.steps for row in found[0].rows] == [1, 2, 4, 8, 50]


def test_only_the_largest_number_of_images_is_drawn() -> None:
    rows = [Quality(Cell("s", n, 1.0), size, 1.0, {"fd": Value(1.0)}) for n in (1, 2) for size in (10, 50)]
    assert len(markers(quality_steps(Results(rows, {})), FIRST)) == 2 + 1


def test_the_same_results_give_the_same_bytes_whatever_a_user_configured() -> None:
    once = quality_steps(small())
    with matplotlib.rc_context(
        {"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path", "xtick.major.size": 20}
    ):
        assert quality_steps(small()) == once


def test_a_drawing_keeps_to_itself(plots: list[str]) -> None:
    """Ids are unique on the page and all found, no style or prolog reaches beyond the drawing, nothing is loaded."""
    ids = [found for svg in plots for found in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in plots:
        used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
        assert used <= set(ids) and used
        assert svg.startswith("<svg") and not re.search(
            r"<style|<metadata|<!|<\?|xlink|://(?!www\.w3\.org/2000/svg)", svg
        )


def test_colours_are_the_pages(plots: list[str]) -> None:
    """No colour is fixed, so that light and dark pages both can be read; the background is the page's."""
    for svg in plots:
        assert "currentColor" in svg and "<text" in svg
        fixed = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"var\([^)]*\)", "", svg)))
        assert fixed == set()
        assert "font-family" not in svg


def test_alternative_texts_say_what_is_drawn(plots: list[str]) -> None:
    labels = [ElementTree.fromstring(svg).attrib["aria-label"] for svg in plots]
    assert all(ElementTree.fromstring(svg).attrib["role"] == "img" for svg in plots)
    assert "progressive, 12.5 at 1 to 3.9 at 8" in labels[1] and "shape against steps" in labels[2]
    assert "lcm, 8 steps, guidance 1: text 0.00" in labels[3] and "t = 1 s + 1 s x NFE" in labels[4]


@pytest.mark.parametrize(
    "model", ["_hidden", "$a^b$", '<script>&"', "\N{CJK UNIFIED IDEOGRAPH-6F22}", "a\x02b", "n" * 90]
)
def test_a_name_is_a_name(model: str) -> None:
    for svg in (quality_steps(small(model)), quality_latency(small(model))):
        texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert short(model) in texts
        assert "<script" not in svg


def test_what_was_not_measured_is_not_drawn() -> None:
    nothing = Results([], {})
    assert quality_latency(nothing) == quality_steps(nothing) == breakdown(nothing) == fit_plot(nothing, {}) == ""
    untimed = small(speed=[])
    assert quality_latency(untimed) == breakdown(untimed) == "" and quality_steps(untimed, "kid") == ""
    alone = Results(small().quality[:1], {})  # one point, no teacher, no real images
    assert len(markers(quality_steps(alone), FIRST)) == 2


def test_intervals_below_zero_don_t_break_a_logarithmic_axis() -> None:
    wide = [Quality(Cell("s", n, 1.0), 9, 1.0, {"fd": Value(fd, (-5.0, 99.0))}) for n, fd in {1: 90.0, 2: 1.0}.items()]
    first, second, _ = markers(quality_steps(Results(wide, {})), FIRST)
    (band,) = fillings(quality_steps(Results(wide, {})), f"fill: {FIRST}; fill-opacity: 0.2")
    assert first[1] - second[1] > 100 and len(band) > 3
    negative = [replace(row, values={"kid": Value(-0.001, (-0.01, 0.01))}) for row in wide]
    assert markers(quality_steps(Results(negative, {}), "kid"), FIRST)
    exact = [replace(row, values={"fd": Value(float(i))}) for i, row in enumerate(wide)]
    assert len(markers(quality_steps(Results(exact, {})), FIRST)) == 3  # a distance of 0 has no logarithm


def test_the_teacher_is_the_reference() -> None:
    assert f"teacher at {MAIN.steps}<" in quality_steps(invented())
    assert "teacher at" not in quality_steps(replace(small(), teacher=None))
