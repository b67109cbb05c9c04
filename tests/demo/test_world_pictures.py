"""How the demo world draws a scene: areas, edges, textures and colours in closed form, at any resolution."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from stepdistill.demo.world import ATTRIBUTES, COLOURS, CONTRAST, PERIODS, SHADE, TEST_SEED, Scene, Thing, render, scene

SCENES = [scene(TEST_SEED, i) for i in range(60)]
AWAY = Thing("circle", "red", -500.0, 0.0, 8.0)
SHAPES, GROUNDS = ATTRIBUTES["first shape"], ATTRIBUTES["ground"]
# area over radius^2, in closed form
AREAS = {
    "circle": math.pi * 0.92**2,
    "square": 1.64**2,
    "triangle": 0.91 * 1.67,
    "star": 10 * 0.5 * 0.48 * math.sin(math.pi / 5),  # ten triangles between neighbouring vertices and the centre
    "cross": 4 * 0.3 * (2 * 0.95 - 0.3),
    "ring": math.pi * (0.96**2 - 0.52**2),
}


def posed(shape: str, **changes) -> Scene:
    """One yellow object, far larger than the world's own, in the middle of a plain black ground."""
    thing = Thing(shape, "yellow", 32.0, 32.0, 28.0)
    return Scene("beside", replace(thing, **changes), AWAY, "black", "plain")


def ground(texture: str, **changes) -> Scene:
    """Nothing but ground, the texture's axes along the picture's."""
    return replace(Scene("beside", AWAY, AWAY, "grey", texture, period=10.0), **changes)


def cover(s: Scene, resolution: int = 64) -> np.ndarray:
    """[H, W], read back from the image alone: how far each pixel went from black to yellow."""
    image, back = render(s, resolution).astype(np.float64), np.array(COLOURS["black"])
    front = np.add(COLOURS["yellow"], s.first.tint) - back
    return (image - back) @ front / (front @ front)


def bright(s: Scene, resolution: int = 64) -> np.ndarray:
    """[H, W]: 0 in a texture's dark tone, 1 in its bright one."""
    return (render(s, resolution)[..., 0] - (COLOURS[s.ground][0] - CONTRAST)) / (2 * CONTRAST)


@pytest.mark.parametrize("resolution", [32, 64, 96])
def test_render_shape_and_range(resolution):
    image = render(SCENES[0], resolution)
    assert image.shape == (resolution, resolution, 3) and image.dtype == np.uint8
    assert image.max() - image.min() > 80


# --- objects


@pytest.mark.parametrize("shape", SHAPES)
def test_area_is_the_closed_form(shape):
    for radius, angle, tolerance in ((7.5, 5.0, 0.025), (10.5, -20.0, 0.02), (20.7, 0.0, 0.01)):
        area = cover(posed(shape, cx=31.7, cy=32.4, radius=radius, angle=angle)).sum()
        assert area == pytest.approx(AREAS[shape] * radius**2, rel=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_upright_and_mirror_images_of_themselves(shape):
    c = cover(posed(shape))
    np.testing.assert_allclose(c, c[:, ::-1], atol=0.02)
    if shape not in ("triangle", "star"):
        np.testing.assert_allclose(c, c.T, atol=0.02)
    rows = np.arange(64) + 0.5
    down = rows @ c.sum(axis=1) / c.sum() - 32
    assert down == pytest.approx(28 * (2 * 0.67 - 1) / 3 if shape == "triangle" else 0, abs=0.1)  # centroid of corners
    tilted = cover(posed(shape, angle=12.0))
    if shape in ("triangle", "star"):  # a positive angle is clockwise: the top leans to the right
        assert tilted[:16, 32:].sum() > 2 * tilted[:16, :32].sum()
    if shape in ("circle", "ring"):
        np.testing.assert_allclose(tilted, c, atol=0.02)
    else:
        assert np.abs(tilted - c).max() > 0.5


def test_shapes_differ_from_each_other():
    masks = [cover(posed(shape)) for shape in SHAPES]
    for a, b in itertools.combinations(masks, 2):
        assert np.minimum(a, b).sum() / np.maximum(a, b).sum() < 0.85


@pytest.mark.parametrize("resolution", [64, 128])
def test_edges_are_one_pixel_wide(resolution):
    c = cover(posed("circle"), resolution)
    partial = ((c > 0.02) & (c < 0.98)).sum()
    perimeter = 2 * math.pi * 0.92 * 28 * resolution / 64
    assert 0.8 * perimeter < partial < 1.1 * perimeter


def test_a_level_edge_covers_its_share_of_a_pixel():
    for radius in (10.0, 10.2, 10.45):
        c = cover(posed("square", radius=radius, cx=32.0, cy=32.0))
        side = 0.82 * radius
        share = np.clip(side - np.abs(np.arange(64) - 31.5) + 0.5, 0, 1)
        np.testing.assert_allclose(c[32], share, atol=0.005)
        np.testing.assert_allclose(c[:, 32], share, atol=0.005)


def test_a_picture_is_the_same_at_every_resolution():
    for s in SCENES[:24]:
        fine = render(s, 256).astype(np.float64).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        difference = fine - render(s)
        assert np.abs(difference).mean() < 0.5 and np.abs(difference).max() < 80, s  # what is not a straight edge: tips


def test_no_pixel_jumps_when_an_object_creeps():
    for s in SCENES[:24]:
        for which in ("first", "second"):
            thing = vars(s)[which]
            moved = render(replace(s, **{which: replace(thing, cx=thing.cx + 0.1)})).astype(np.float64) - render(s)
            assert 0 < np.abs(moved).max() <= 0.15 * 255


def test_colours_are_the_palette_and_the_tint():
    for tint in ((0.0, 0.0, 0.0), (10.0, -10.0, 4.0)):
        image = render(posed("circle", tint=tint))
        expected = np.clip(np.add(COLOURS["yellow"], tint), 0, 255)
        assert np.array_equal(image[32, 32], expected) and np.array_equal(image[0, 0], COLOURS["black"])
    shaded = replace(posed("circle"), shade=-5.0)
    assert np.array_equal(render(shaded)[0, 0], np.subtract(COLOURS["black"], 5))


# --- grounds


@pytest.mark.parametrize("name", GROUNDS)
@pytest.mark.parametrize("texture", ["stripes", "checks", "dots"])
def test_textures_have_two_tones_about_the_ground(name, texture):
    for shade in (-SHADE, 0.0, SHADE):
        image = render(ground(texture, ground=name, shade=shade, turn=33.0)).reshape(-1, 3).astype(int)
        tones, counts = np.unique(image, axis=0, return_counts=True)
        low, high = (np.rint(np.clip(np.add(COLOURS[name], shade + k * CONTRAST), 0, 255)) for k in (-1, 1))
        assert np.array_equal(image.min(axis=0), low) and np.array_equal(image.max(axis=0), high)
        pure = sum(n for tone, n in zip(tones, counts, strict=True) if (tone == low).all() or (tone == high).all())
        assert pure / len(image) > 0.55  # the rest are edges
        assert (high - low).min() >= 2 * CONTRAST - 4  # a tone beyond black or white loses 3 levels at most


@pytest.mark.parametrize("name", GROUNDS)
def test_a_plain_ground_has_one_tone(name):
    image = render(ground("plain", ground=name, shade=3.0))
    assert (image == np.add(COLOURS[name], 3)).all()


@pytest.mark.parametrize("texture", ["stripes", "checks", "dots"])
def test_textures_repeat_after_their_period(texture):
    """Period 10 turned by the angle of a 3-4-5 triangle comes round after whole pixels along both of its axes."""
    b = bright(ground(texture, turn=math.degrees(math.atan2(4, 3)), phase=(0.13, 0.37)))
    np.testing.assert_allclose(b[8:, 6:], b[:-8, :-6], atol=1e-6)  # (x, y) by (6, 8)
    np.testing.assert_allclose(b[6:, :-8], b[:-6, 8:], atol=1e-6)  # by (-8, 6)
    assert np.abs(b[4:, 3:] - b[:-4, :-3]).max() > 0.9  # and not after half of it
    assert np.abs(b[8:, :-6] - b[:-8, 6:]).max() > 0.9  # nor the other way round
    for period in (9.0, 12.0):
        b = bright(ground(texture, period=period))
        np.testing.assert_allclose(b[:, int(period) :], b[:, : -int(period)], atol=1e-6)


def test_textures_begin_at_their_phase():
    for texture in ("stripes", "checks", "dots"):
        still = bright(ground(texture, period=12.0))
        along = bright(ground(texture, period=12.0, phase=(0.25, 0.0)))
        across = bright(ground(texture, period=12.0, phase=(0.0, 0.25)))
        np.testing.assert_allclose(along[:, :-3], still[:, 3:], atol=1e-6)  # a quarter of the period is 3 pixels
        assert np.array_equal(across, still) if texture == "stripes" else not np.array_equal(across, still)
        np.testing.assert_allclose(across[:-3], still[3:], atol=1e-6)


def test_stripes_are_bright_for_half_a_period():
    b = bright(ground("stripes", period=12.0))
    assert (b == b[0]).all()
    assert b[0, :12].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]


def test_checks_are_squares_of_half_a_period():
    b = bright(ground("checks", period=16.0), 128)  # squares of 16 pixels; the first is cut in half
    square = np.floor((np.arange(128) + 8) / 16) % 2
    assert np.array_equal(b > 0.5, square[:, None] != square[None, :])
    assert b.mean() == pytest.approx(0.5, abs=1e-6)


def test_dots_are_discs_one_to_a_cell():
    b = bright(ground("dots", period=8.0), 256)
    assert b.mean() == pytest.approx(math.pi * 0.3**2, rel=0.01)
    y, x = (np.mgrid[:256, :256] + 0.5) / 4 % 8 - 4
    inside = np.hypot(x, y) < 0.3 * 8
    assert np.abs(inside - b).max() < 0.75 and ((b > 0.5) != inside).mean() < 0.01


def test_the_textures_periods_tell_them_apart_from_noise():
    """At 64 pixels and 4 pixels a latent, half a period is more than a latent wide."""
    assert set(PERIODS) == set(ATTRIBUTES["texture"])
    assert min(low for name, (low, _) in PERIODS.items() if name != "plain") / 2 > 4
