"""What the demo world draws: from (seed, index) alone, uniform, independent, whole, and the same for ever."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.demo.world import (
    ASIDE,
    ATTRIBUTES,
    COLOURS,
    CONTRAST,
    DISTANCE,
    MARGIN,
    PERIODS,
    RADIUS,
    REFERENCE_SEED,
    SHADE,
    SWAY,
    TEST_SEED,
    TILT,
    TINT,
    TRAIN_SEED,
    TURNS,
    Scene,
    Thing,
    World,
    caption,
    labels,
    render,
    scene,
    values,
    variant,
)

COUNT = 4000
SCENES = [scene(TEST_SEED, i) for i in range(COUNT)]


def test_everything_is_a_function_of_seed_and_index():
    s = scene(TRAIN_SEED, 7)
    assert s == scene(TRAIN_SEED, 7) == scene(np.int64(TRAIN_SEED), torch.tensor(7))
    assert np.array_equal(render(s), render(scene(TRAIN_SEED, 7)))
    assert caption(s, 1, 2) == caption(s, 1, 2)
    assert variant(s, 1, 2, 3) == variant(s, np.int64(1), torch.tensor(2), np.int64(3))
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    World(3).captions([1, 2])
    World(3).pixels([1, 2])
    World(3).variants([1, 2], 2)
    assert np.array_equal(state, np.random.get_state()[1])  # the global generator is left alone


# Teachers and published numbers depend on these draws; change them only together with a new seed constant.


def test_the_scenes_are_frozen():
    s = scene(TRAIN_SEED, 0)
    assert values(s) == ("stacked", "ring", "blue", "triangle", "green", "cream", "dots")
    assert labels(s) == (1, 5, 5, 2, 3, 5, 3)
    first, second = s.first, s.second
    places = (first.cx, first.cy, first.radius, first.angle, second.cx, second.cy, second.radius, second.angle)
    assert places == pytest.approx(
        (15.257423490581864, 19.314303563435878, 10.06064203405733, 0.0,
         19.857960850239937, 47.05308247983235, 10.878962878251862, 4.486957420874706)
    )  # fmt: skip
    assert first.tint == pytest.approx((1.8356237863201343, -4.899801622344362, -0.94556566629619))
    assert second.tint == pytest.approx((8.253309839945622, 6.793958673853204, 8.01486486504374))
    assert (s.shade, s.period, s.turn) == pytest.approx((0.8030321433334642, 11.453879584108616, 4.428449167625457))
    assert s.phase == pytest.approx((0.19119756043435454, 0.5435824490451648))
    other = variant(s, TRAIN_SEED, 0, 1)
    assert (other.first.cx, other.second.cy, other.turn) == pytest.approx(
        (43.993398778802984, 47.971516982320395, -7.752591788964594)
    )


def test_the_captions_are_frozen():
    assert World(TRAIN_SEED).captions(range(4)) == [
        "there is a green triangle below a blue ring, on cream dots",
        "a purple ring on top of a cyan star on plain beige",
        "there is a blue cross right of a orange circle, on plain navy",
        "pink triangle under yellow star, navy stripes",
    ]


def test_the_pictures_are_frozen():
    image = render(scene(TRAIN_SEED, 0)).astype(int)
    pinned = {
        (6, 0): (199, 177, 125), (9, 0): (251, 229, 177), (3, 3): (210, 188, 136),  # dark, bright, between
        (12, 12): (42, 87, 235), (21, 12): (251, 229, 177), (15, 6): (104, 122, 192),  # ring, hole, edge
        (48, 21): (48, 175, 70), (54, 18): (160, 176, 111),  # triangle, edge
    }  # fmt: skip
    for (y, x), colour in pinned.items():
        assert np.abs(image[y, x] - colour).max() <= 1, (y, x)  # a level, should another machine round otherwise
    assert image.mean(axis=(0, 1)) == pytest.approx((198.74023438, 186.68676758, 142.46582031), abs=0.01)


def test_seeds_and_indices_give_different_scenes():
    assert len({TRAIN_SEED, REFERENCE_SEED, TEST_SEED}) == 3
    every = [scene(seed, i) for seed in (TRAIN_SEED, REFERENCE_SEED, TEST_SEED) for i in range(200)]
    assert len({(s.first.cx, s.first.cy, s.first.radius) for s in every}) == len(every)
    assert len({render(s).tobytes() for s in every}) == len(every)
    s = every[0]
    assert len({caption(s, TRAIN_SEED, i) for i in range(100)}) > 10
    assert len({caption(s, seed, 0) for seed in range(100)}) > 10


def test_variants_share_the_attributes_and_nothing_else():
    s = SCENES[0]
    others = [variant(s, *key) for key in itertools.product((1, 2), (0, 1), (0, 1, 2))]
    assert {values(other) for other in others} == {values(s)}
    assert len({render(other).tobytes() for other in (s, *others)}) == 1 + len(others)
    assert len({(o.first.cx, o.second.radius, o.turn, o.shade) for o in (s, *others)}) == 1 + len(others)
    assert variant(SCENES[1], 1, 0, 0) != others[0]


def test_attributes_are_uniform_and_independent():
    table = World(TEST_SEED).labels(range(COUNT)).numpy()
    sizes = [len(options) for options in ATTRIBUTES.values()]
    assert sizes == [2, 6, 8, 6, 8, 6, 4]

    def check(cells: np.ndarray, number: int) -> None:
        observed, expected, freedom = np.bincount(cells, minlength=number), COUNT / number, number - 1
        assert len(observed) == number
        assert np.sum((observed - expected) ** 2 / expected) < freedom + 6 * math.sqrt(2 * freedom)

    for column, number in enumerate(sizes):
        check(table[:, column], number)
    for a, b in itertools.combinations(range(len(sizes)), 2):
        check(table[:, a] * sizes[b] + table[:, b], sizes[a] * sizes[b])


def share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low)


def placed(first: float, distance: float, r1: float, r2: float) -> float:
    """Where a centre is in the range, 0 to 1, that keeps both objects' radii MARGIN away from the picture's sides."""
    return share(first, max(r1, r2 - distance) + MARGIN, 64 - MARGIN - max(r1, distance + r2))


def left_open(s: Scene) -> dict[str, float]:
    """All that captions leave open, each as a share of its range."""
    one, two = s.first, s.second
    dx, dy = two.cx - one.cx, two.cy - one.cy
    gap, aside = (dx, dy) if s.layout == "beside" else (dy, dx)
    found = {
        "radius 1": share(one.radius, *RADIUS), "radius 2": share(two.radius, *RADIUS),
        "distance": share(gap, *DISTANCE), "aside": share(aside, -ASIDE, ASIDE),
        "x": placed(one.cx, dx, one.radius, two.radius), "y": placed(one.cy, dy, one.radius, two.radius),
        "shade": share(s.shade, -SHADE, SHADE), "turn": share(s.turn - TURNS[s.texture], -SWAY, SWAY),
        "phase 1": s.phase[0], "phase 2": s.phase[1],
    }  # fmt: skip
    for i, thing in enumerate((one, two), 1):
        found |= {f"tint {i} {channel}": share(thing.tint[channel], -TINT, TINT) for channel in range(3)}
        found[f"tilt {i}"] = math.nan if thing.shape in ("circle", "ring") else share(thing.angle, -TILT, TILT)
    return found | {t: share(s.period, *PERIODS[t]) if s.texture == t else math.nan for t in PERIODS if t != "plain"}


def test_what_captions_leave_open_is_uniform_to_the_ends_of_its_range_and_independent():
    rows = [left_open(s) for s in SCENES]
    table = np.array([list(row.values()) for row in rows])
    for name, column in zip(rows[0], table.T, strict=True):
        drawn = np.sort(column[~np.isnan(column)])
        assert len(drawn) > 900, name
        assert -1e-9 <= drawn[0] < 0.01 and 0.99 < drawn[-1] <= 1 + 1e-9, name
        steps = np.arange(len(drawn) + 1) / len(drawn)
        distance = max((steps[1:] - drawn).max(), (drawn - steps[:-1]).max())
        assert distance < 2 / math.sqrt(len(drawn)), (
            name
        )  # Kolmogorov-Smirnov: passed by all but 1 of 1500 uniform draws
    full = table[:, ~np.isnan(table).any(axis=0)]
    correlations = np.corrcoef(full, rowvar=False)[np.triu_indices(full.shape[1], 1)]
    assert full.shape[1] == 16 and np.abs(correlations).max() < 5 / math.sqrt(COUNT)
    assert all(t.angle == 0 for s in SCENES for t in (s.first, s.second) if t.shape in ("circle", "ring"))


# --- whole, and apart from each other; corners in units of the radius, y down

CORNERS = {
    "square": [(0.82, 0.82), (-0.82, 0.82), (-0.82, -0.82), (0.82, -0.82)],
    "triangle": [(0, -1), (0.91, 0.67), (-0.91, 0.67)],
    "star": [(math.sin(0.4 * math.pi * i), -math.cos(0.4 * math.pi * i)) for i in range(5)],
    "cross": [(x, y) for a, b in ((0.3, 0.95), (0.95, 0.3)) for x in (-a, a) for y in (-b, b)],
}
DISCS = {"circle": 0.92, "ring": 0.96}


def box(thing: Thing) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of an object, in closed form."""
    if thing.shape in DISCS:
        reach = DISCS[thing.shape] * thing.radius
        return thing.cx - reach, thing.cy - reach, thing.cx + reach, thing.cy + reach
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    xs = [thing.cx + thing.radius * (cos * x - sin * y) for x, y in CORNERS[thing.shape]]
    ys = [thing.cy + thing.radius * (sin * x + cos * y) for x, y in CORNERS[thing.shape]]
    return min(xs), min(ys), max(xs), max(ys)


def alone(s: Scene, which: str) -> np.ndarray:
    """[64, 64] pixels that change when an object is taken away."""
    away = {which: replace(vars(s)[which], cx=-500.0)}
    return (render(s) != render(replace(s, **away))).any(axis=2)


def test_boxes_are_where_the_pixels_are():
    for s in SCENES[:200]:
        for which in ("first", "second"):
            thing, mask = vars(s)[which], alone(s, which)
            (top, bottom), (left, right) = (np.nonzero(mask.any(axis=k))[0][[0, -1]] + (0, 1) for k in (1, 0))
            assert (left, top, right, bottom) == pytest.approx(box(thing), abs=1.1), thing


def test_objects_are_whole_and_apart():
    for seed in (TEST_SEED, TRAIN_SEED):
        for s in SCENES if seed == TEST_SEED else (scene(seed, i) for i in range(COUNT)):
            one, two = box(s.first), box(s.second)
            assert min(*one, *two) > 0 and max(*one, *two) < 64, s
            assert (one[2] < two[0]) if s.layout == "beside" else (one[3] < two[1]), s


def test_no_draw_could_cut_or_overlap():
    """The largest objects, tilted as far as they go, at the smallest distance: only two triangles' tips may meet."""
    turned = {
        shape: [box(Thing(shape, "red", 0, 0, RADIUS[1], angle)) for angle in (-TILT, 0.0, TILT)]
        for shape in ATTRIBUTES["first shape"]
    }
    assert max(abs(side) for boxes in turned.values() for sides in boxes for side in sides) < RADIUS[1] + MARGIN
    close = {}
    for (a, ones), (b, others) in itertools.product(turned.items(), repeat=2):
        for layout, low, high in (("beside", 0, 2), ("stacked", 1, 3)):
            reach = max(sides[high] for sides in ones) - min(sides[low] for sides in others)
            if reach >= DISTANCE[0]:
                close[layout, a, b] = reach
    assert set(close) == {("beside", "triangle", "triangle")}
    assert max(close.values()) < DISTANCE[0] + 0.4


# --- the palette and the data set


def test_the_palette_is_well_separated():
    objects, grounds = ATTRIBUTES["first colour"], ATTRIBUTES["ground"]
    assert set(COLOURS) == {*objects, *grounds} and not set(objects) & set(grounds)
    for name in objects:
        assert min(math.dist(COLOURS[name], c) for other, c in COLOURS.items() if other != name) >= 90
        for ground, offset in itertools.product(grounds, np.arange(-CONTRAST - SHADE, CONTRAST + SHADE + 1)):
            assert math.dist(COLOURS[name], np.clip(np.add(COLOURS[ground], offset), 0, 255)) >= 90, (name, ground)
    assert min(math.dist(COLOURS[a], COLOURS[b]) for a, b in itertools.combinations(grounds, 2)) >= 74


def test_world_batches():
    world = World(TEST_SEED, resolution=32)
    pixels = world.pixels([5, 0, 5])
    assert pixels.shape == (3, 3, 32, 32) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert torch.equal(pixels[0], pixels[2])
    back = ((pixels[1].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    assert np.array_equal(back, render(scene(TEST_SEED, 0), 32))
    assert world.captions([5, 0]) == [caption(scene(TEST_SEED, i), TEST_SEED, i) for i in (5, 0)]
    found = world.labels(torch.tensor([5, 0]))
    assert found.dtype == torch.int64 and found.tolist() == [list(labels(scene(TEST_SEED, i))) for i in (5, 0)]


def test_world_variants_come_caption_by_caption():
    world = World(TEST_SEED, resolution=32)
    pixels = world.variants([5, 0], 3)
    assert pixels.shape == (6, 3, 32, 32) and pixels.dtype == torch.float32
    expected = [render(variant(scene(TEST_SEED, i), TEST_SEED, i, k), 32) for i in (5, 0) for k in range(3)]
    back = pixels.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back, np.stack(expected))


def test_write_folder(tmp_path):
    world = World(TEST_SEED)
    world.write_folder(tmp_path / "images", 3)
    lines = (tmp_path / "images" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["text"] for row in rows] == world.captions(range(3))
    assert len({row["file_name"] for row in rows}) == 3
    for i, row in enumerate(rows):
        with Image.open(tmp_path / "images" / row["file_name"]) as image:
            assert np.array_equal(np.asarray(image), render(scene(TEST_SEED, i)))
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        world.write_folder(tmp_path / "images", 3)
