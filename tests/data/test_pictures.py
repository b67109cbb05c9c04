from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.data.pictures import CENTRE, Picture, Unreadable, View, load, views


def saved(image: Image.Image, file: Path, **options: object) -> bytes:
    image.save(file, **options)
    return file.read_bytes()


def square(data: bytes, resolution: int) -> Picture:
    (picture,) = load(data, resolution)
    return picture


def test_pixels_of_an_image_of_the_right_size_are_its_bytes(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = square(saved(Image.fromarray(values), tmp_path / "a.png"), 16)
    torch.testing.assert_close(picture.pixels, torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1)
    assert (picture.original, picture.crop) == ((16, 16), (0, 0))


def test_centre_of_a_wide_and_of_a_tall_image(tmp_path: Path):
    values = np.zeros((16, 40, 3), dtype=np.uint8)
    values[:, 12:28] = 255  # exactly the centre
    wide = square(saved(Image.fromarray(values), tmp_path / "w.png"), 16)
    assert float(wide.pixels.min()) == 1.0
    assert (wide.original, wide.crop) == ((16, 40), (0, 12))
    tall = square(saved(Image.fromarray(values.transpose(1, 0, 2).copy()), tmp_path / "t.png"), 16)
    assert float(tall.pixels.min()) == 1.0
    assert (tall.original, tall.crop) == ((40, 16), (12, 0))


def test_small_images_grow_and_odd_sizes_fill_the_square(tmp_path: Path):
    for size in ((5, 7), (33, 17), (100, 31)):
        picture = square(saved(Image.new("RGB", size, "white"), tmp_path / "a.png"), 24)
        assert picture.pixels.shape == (3, 24, 24)
        assert float(picture.pixels.min()) == 1.0
        assert picture.original == size[::-1]


def test_shrinking_is_antialiased(tmp_path: Path):
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    image = Image.fromarray(np.repeat(checks[..., None], 3, 2).astype(np.uint8))
    assert float(square(saved(image, tmp_path / "a.png"), 16).pixels.abs().max()) < 0.05  # grey, and not stripes


def test_exif_rotation_is_honoured(tmp_path: Path):
    values = np.zeros((16, 32, 3), dtype=np.uint8)
    values[:8] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees: white is at the right
    picture = square(saved(Image.fromarray(values), tmp_path / "a.png", exif=exif), 16)
    assert picture.original == (32, 16)
    assert float(picture.pixels[..., :8].max()) == -1.0
    assert float(picture.pixels[..., 8:].min()) == 1.0


def test_transparency_lies_on_white_in_every_mode(tmp_path: Path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("LA", (8, 8), (0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert float(square(saved(clear, tmp_path / "a.png"), 8).pixels.min()) == 1.0
    assert abs(float(square(saved(half, tmp_path / "b.png"), 8).pixels.mean())) < 0.02
    assert float(square(saved(palette, tmp_path / "c.png", transparency=1), 8).pixels.min()) == 1.0
    opaque = square(saved(palette, tmp_path / "d.png"), 8).pixels
    torch.testing.assert_close(opaque[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))


def test_sixteen_bits_and_grey_are_scaled_and_not_clipped(tmp_path: Path):
    deep = Image.fromarray(np.full((8, 8), 257 * 200, dtype=np.uint16))
    grey = Image.new("L", (8, 8), 200)
    for image in (deep, grey, grey.convert("1", dither=Image.Dither.NONE).convert("L").point(lambda _: 200)):
        pixels = square(saved(image, tmp_path / "a.png"), 8).pixels
        torch.testing.assert_close(pixels, torch.full((3, 8, 8), 200 / 127.5 - 1))


def test_random_views_show_the_place_that_they_name(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    data = saved(Image.fromarray(values), tmp_path / "a.png")
    found = views(0, 3, 40, center_crop=False, random_flip=True)
    whole = torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1
    for view, picture in zip(found, load(data, 16, found), strict=True):
        assert (picture.original, picture.crop[0]) == ((16, 40), 0)
        left = picture.crop[1]  # within the mirrored image, where it is one
        torch.testing.assert_close(picture.pixels, (whole.flip(-1) if view.flip else whole)[..., left : left + 16])
    places = {picture.crop[1] for picture in load(data, 16, found)}
    assert min(places) >= 0 and max(places) <= 24 and len(places) > 10
    assert [view.flip for view in found] in ([True, False] * 20, [False, True] * 20)


def test_crops_reach_both_ends_evenly(tmp_path: Path):
    data = saved(Image.new("RGB", (8, 11)), tmp_path / "a.png")
    tops = [load(data, 8, views(0, i, 1, False, False))[0].crop[0] for i in range(400)]
    assert [tops.count(n) for n in range(5)] == pytest.approx([100, 100, 100, 100, 0], abs=35)


def test_views_are_a_function_of_seed_image_and_variant():
    first = views(1, 5, 3, False, True)
    assert first == views(1, 5, 5, False, True)[:3]  # more variants leave the first ones as they are
    assert len(set(first)) == 3
    assert first != views(1, 6, 3, False, True) and first != views(2, 5, 3, False, True)
    assert views(0, 7, 1, True, False) == [CENTRE]
    assert views(0, 7, 2, True, True) in ([View(), View(flip=True)], [View(flip=True), View()])
    coins = [views(0, i, 1, True, True)[0].flip for i in range(400)]
    assert 160 < sum(coins) < 240


@pytest.mark.parametrize("damage", ["cut png", "cut jpeg", "text", "empty", "float"])
def test_broken_files_are_unreadable_with_a_reason(tmp_path: Path, damage: str):
    suffix = "jpg" if damage == "cut jpeg" else "tif" if damage == "float" else "png"
    image = Image.effect_noise((64, 64), 90).convert("F" if damage == "float" else "RGB")
    data = saved(image, tmp_path / f"a.{suffix}")
    data = {"text": b"no image", "empty": b"", "float": data}.get(damage, data[: len(data) // 2])
    reason = {"float": "floating-point", "cut jpeg": "truncated", "text": "no known image format"}.get(damage, ".")
    with pytest.raises(Unreadable, match=reason):
        load(data, 32)
