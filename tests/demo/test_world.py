import colorsys
import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.demo.world import (
    ATTRIBUTES,
    COLOURS,
    DIRECTIONS,
    OFFSETS,
    PHRASES,
    RADII,
    REFERENCE_SEED,
    SHIFT,
    TEST_SEED,
    TILT,
    TRAIN_SEED,
    Scene,
    World,
    caption,
    labels,
    render,
    scene,
    tokens,
    vocabulary,
)

SCENES = [scene(TRAIN_SEED, i) for i in range(300)]


def coverage(s: Scene, resolution: int = 64) -> np.ndarray:
    """[H, W], read back from the image alone: how far each pixel went from the corner's colour to the object's."""
    image = render(s, resolution).astype(np.float64)
    back = image[0, 0]
    front = np.clip(np.add(COLOURS[s.colour], s.tint), 0, 255)
    return (image - back) @ (front - back) / np.sum((front - back) ** 2)


def posed(shape: str, size: str = "large", position: str = "centre", **changes) -> Scene:
    dx, dy = DIRECTIONS[position]
    plain = Scene(shape, "yellow", "black", size, position, 32 + OFFSETS[size] * dx, 32 + OFFSETS[size] * dy, 20.0)
    return replace(plain, **changes)


def nearest(colour: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(np.subtract(COLOURS[name], colour))))


def test_everything_is_a_function_of_seed_and_index():
    s = scene(TRAIN_SEED, 7)
    assert s == scene(TRAIN_SEED, 7) == scene(np.int64(TRAIN_SEED), torch.tensor(7))
    assert np.array_equal(render(s), render(scene(TRAIN_SEED, 7)))
    assert caption(s, 1, 2) == caption(s, 1, 2)
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    World(3).captions([1, 2])
    World(3).pixels([1, 2])
    assert np.array_equal(state, np.random.get_state()[1])  # the global generator is left alone


def test_the_world_is_frozen():
    # teachers and published numbers depend on these draws; change them only together with a new seed constant
    s = scene(TRAIN_SEED, 0)
    assert (s.shape, s.colour, s.background, s.size, s.position) == ("diamond", "pink", "brown", "medium", "top")
    assert caption(s, TRAIN_SEED, 0) == "a medium pink rhombus on a brown background, at the top"


def test_seeds_and_indices_give_different_scenes():
    assert len({TRAIN_SEED, REFERENCE_SEED, TEST_SEED}) == 3
    every = [scene(seed, i) for seed in (TRAIN_SEED, REFERENCE_SEED, TEST_SEED) for i in range(200)]
    assert len({(s.cx, s.cy, s.radius) for s in every}) == len(every)
    assert len({render(s).tobytes() for s in every}) == len(every)
    s = every[0]
    assert len({caption(s, TRAIN_SEED, i) for i in range(100)}) > 10
    assert len({caption(s, seed, 0) for seed in range(100)}) > 10


def test_attributes_are_uniform_and_independent():
    count = 4000
    table = World(TEST_SEED).labels(range(count)).numpy()
    sizes = [len(values) for values in ATTRIBUTES.values()]
    assert sizes == [8, 8, 6, 3, 5]

    def check(cells: np.ndarray, number: int) -> None:
        observed, expected, freedom = np.bincount(cells, minlength=number), count / number, number - 1
        assert len(observed) == number
        assert np.sum((observed - expected) ** 2 / expected) < freedom + 6 * math.sqrt(2 * freedom)

    for column, number in enumerate(sizes):
        check(table[:, column], number)
    for a, b in itertools.combinations(range(5), 2):
        check(table[:, a] * sizes[b] + table[:, b], sizes[a] * sizes[b])


def test_labels_index_the_attributes():
    for s in SCENES[:50]:
        named = dict(zip(ATTRIBUTES, labels(s), strict=True))
        assert {name: ATTRIBUTES[name][i] for name, i in named.items()} == {n: getattr(s, n) for n in ATTRIBUTES}


def test_phrases_are_unambiguous():
    for attribute, values in PHRASES.items():
        phrases = [phrase for options in values.values() for phrase in options]
        assert len(set(phrases)) == len(phrases)
        for value, options in values.items():
            hints = {"centre": ("middle", "centre", "center")}.get(value, (value,))
            assert any(hint in options[0] for hint in hints), (attribute, value)
    assert not set(ATTRIBUTES["colour"]) & set(ATTRIBUTES["background"])


def test_captions_name_all_five_attributes_and_nothing_else():
    patterns = {
        attribute: {value: re.compile(r"\b(" + "|".join(options) + r")\b") for value, options in values.items()}
        for attribute, values in PHRASES.items()
    }
    for i, s in enumerate(SCENES):
        text = caption(s, TRAIN_SEED, i)
        for attribute, values in patterns.items():
            assert [v for v, p in values.items() if p.search(text)] == [getattr(s, attribute)], (attribute, text)


def test_vocabulary_is_exactly_what_captions_use():
    used = {token for i in range(1500) for token in tokens(caption(SCENES[i % 300], TRAIN_SEED, i))}
    assert tuple(sorted(used)) == vocabulary()
    assert len(vocabulary()) < 80
    assert all(re.fullmatch(r"[a-z]+|,", word) for word in vocabulary())


@pytest.mark.parametrize("resolution", [32, 64, 96])
def test_render_shape_and_range(resolution):
    image = render(SCENES[0], resolution)
    assert image.shape == (resolution, resolution, 3) and image.dtype == np.uint8
    assert image.max() - image.min() > 80


# area over radius^2, in closed form
AREAS = {
    "circle": math.pi * 0.92**2,
    "square": 1.64**2,
    "triangle": 0.91 * 1.67,
    "star": 10 * 0.5 * 0.48 * math.sin(math.pi / 5),  # ten triangles between neighbouring vertices and the centre
    "heart": 1.56**2 * (0.5 + math.pi / 8),  # a square on its corner and two half discs
    "cross": 4 * 0.3 * (2 * 0.95 - 0.3),
    "ring": math.pi * (0.96**2 - 0.52**2),
    "diamond": 2 * 0.78,
}


@pytest.mark.parametrize("shape", ATTRIBUTES["shape"])
def test_area_is_the_closed_form(shape):
    for radius, angle in ((9.3, 5.0), (14.2, 0.0), (20.7, -8.0)):
        area = coverage(posed(shape, cx=31.7, cy=32.4, radius=radius, angle=angle)).sum()
        assert area == pytest.approx(AREAS[shape] * radius**2, rel=0.02)


@pytest.mark.parametrize("shape", ATTRIBUTES["shape"])
def test_shapes_are_upright_mirror_images_of_themselves(shape):
    c = coverage(posed(shape))
    np.testing.assert_allclose(c, c[:, ::-1], atol=0.02)
    widest = c.sum(axis=1).argmax()
    if shape in ("triangle", "heart"):
        assert widest > 40 if shape == "triangle" else widest < 30
    tilted = coverage(posed(shape, angle=8.0))
    right = tilted[:32, 32:].sum() - tilted[:32, :32].sum()  # a positive angle is clockwise: the top leans to the right
    if shape in ("triangle", "star", "diamond"):
        assert right > 5


def test_shapes_differ_from_each_other():
    masks = {shape: coverage(posed(shape)) for shape in ATTRIBUTES["shape"]}
    for a, b in itertools.combinations(masks.values(), 2):
        assert np.minimum(a, b).sum() / np.maximum(a, b).sum() < 0.85


def test_edges_are_smooth_and_independent_of_resolution():
    for s in SCENES[:24]:
        fine = render(s, 128).astype(np.float64).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        difference = np.abs(fine - render(s))
        assert difference.mean() < 0.5 and difference.max() < 60
        moved = np.abs(render(replace(s, cx=s.cx + 0.1)).astype(np.float64) - render(s))
        assert 0 < moved.max() <= 0.15 * 255  # no pixel jumps when the object creeps


@pytest.mark.parametrize("resolution", [64, 128])
def test_edges_are_one_pixel_wide(resolution):
    c = coverage(posed("circle"), resolution)
    partial = ((c > 0.02) & (c < 0.98)).sum()
    perimeter = 2 * math.pi * 0.92 * 20 * resolution / 64
    assert 0.8 * perimeter < partial < 1.1 * perimeter


def test_the_object_stays_inside_the_frame():
    worst = [
        posed(shape, size, position, radius=RADII[size][1], angle=angle)
        for shape, size, position in itertools.product(ATTRIBUTES["shape"], RADII, DIRECTIONS)
        for angle in (-TILT, TILT)
    ]
    worst = [replace(s, cx=s.cx + SHIFT * (s.cx > 32 or -1), cy=s.cy + SHIFT * (s.cy > 32 or -1)) for s in worst]
    for s in SCENES + worst:
        image = render(s)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        expected = np.rint(np.add(COLOURS[s.background], s.shade))
        assert (border == expected).all(), s


def test_the_palette_is_well_separated():
    for a, b in itertools.combinations(COLOURS.values(), 2):
        assert math.dist(a, b) > 85
    hues = [(colorsys.rgb_to_hsv(*(c / 255 for c in COLOURS[name]))[0] + 0.05) % 1 for name in ATTRIBUTES["colour"]]
    assert hues == sorted(hues)  # named in the order of the rainbow, from red to pink


def test_colours_are_nearest_to_their_names():
    for s in SCENES:
        image = render(s)
        c = coverage(s)
        inside = c > 0.5
        assert nearest(image[inside].mean(axis=0)) == s.colour
        assert nearest(image[c < 0.01].mean(axis=0)) == s.background
        assert inside.sum() > 60


def test_the_centroid_tells_the_position():
    axis = np.arange(64) - 31.5
    for s in SCENES:
        c = coverage(s)
        x, y = (c.sum(axis=0) @ axis) / c.sum(), (c.sum(axis=1) @ axis) / c.sum()
        found = {
            "centre": max(abs(x), abs(y)) < 4.5,
            "left": x < -4.5 and abs(y) < 4.5,
            "right": x > 4.5 and abs(y) < 4.5,
            "top": y < -4.5 and abs(x) < 4.5,
            "bottom": y > 4.5 and abs(x) < 4.5,
        }
        assert [name for name, yes in found.items() if yes] == [s.position], s


def test_sizes_do_not_overlap():
    sides: dict[str, list[float]] = {size: [] for size in ATTRIBUTES["size"]}
    for s in SCENES:
        inside = coverage(s) > 0.5
        sides[s.size].append(max(np.ptp(np.nonzero(inside.any(axis=k))[0]) + 1 for k in (0, 1)))
    for smaller, larger in itertools.pairwise(sides.values()):
        assert max(smaller) < min(larger)


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
