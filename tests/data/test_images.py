import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_images

from stepdistill.data.images import DataConfig, ImageFolder, WorldImages, open_images
from stepdistill.data.pictures import load
from stepdistill.demo.world import TRAIN_SEED, World
from stepdistill.errors import InputError


def saved(image: Image.Image, file: Path, **options: object) -> bytes:
    image.save(file, **options)
    return file.read_bytes()


def without_text(folder: Path, count: int = 4) -> Path:
    tiny_images(folder, count)
    for file in folder.glob("*.txt"):
        file.unlink()
    return folder


def metadata(folder: Path, *rows: dict[str, object]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_pixels_of_an_image_of_the_right_size_are_its_bytes(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = load(saved(Image.fromarray(values), tmp_path / "a.png"), 16)
    torch.testing.assert_close(picture.pixels, torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1)
    assert (picture.original, picture.crop) == ((16, 16), (0, 0))


def test_centre_of_a_wide_and_of_a_tall_image(tmp_path: Path):
    values = np.zeros((16, 40, 3), dtype=np.uint8)
    values[:, 12:28] = 255  # exactly the centre
    wide = load(saved(Image.fromarray(values), tmp_path / "w.png"), 16)
    assert float(wide.pixels.min()) == 1.0
    assert (wide.original, wide.crop) == ((16, 40), (0, 12))
    tall = load(saved(Image.fromarray(values.transpose(1, 0, 2).copy()), tmp_path / "t.png"), 16)
    assert float(tall.pixels.min()) == 1.0
    assert (tall.original, tall.crop) == ((40, 16), (12, 0))


def test_small_images_grow_and_odd_sizes_fill_the_square(tmp_path: Path):
    for size in ((5, 7), (33, 17), (100, 31)):
        picture = load(saved(Image.new("RGB", size, "white"), tmp_path / "a.png"), 24)
        assert picture.pixels.shape == (3, 24, 24)
        assert float(picture.pixels.min()) == 1.0
        assert picture.original == size[::-1]


def test_shrinking_is_antialiased(tmp_path: Path):
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    image = Image.fromarray(np.repeat(checks[..., None], 3, 2).astype(np.uint8))
    assert float(load(saved(image, tmp_path / "a.png"), 16).pixels.abs().max()) < 0.05  # grey, and not stripes


def test_exif_rotation_is_honoured(tmp_path: Path):
    values = np.zeros((16, 32, 3), dtype=np.uint8)
    values[:8] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees: white is at the right
    picture = load(saved(Image.fromarray(values), tmp_path / "a.png", exif=exif), 16)
    assert picture.original == (32, 16)
    assert float(picture.pixels[..., :8].max()) == -1.0
    assert float(picture.pixels[..., 8:].min()) == 1.0


def test_transparency_lies_on_white_in_every_mode(tmp_path: Path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("LA", (8, 8), (0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert float(load(saved(clear, tmp_path / "a.png"), 8).pixels.min()) == 1.0
    assert abs(float(load(saved(half, tmp_path / "b.png"), 8).pixels.mean())) < 0.02
    assert float(load(saved(palette, tmp_path / "c.png", transparency=1), 8).pixels.min()) == 1.0
    opaque = load(saved(palette, tmp_path / "d.png"), 8).pixels
    torch.testing.assert_close(opaque[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))


def test_sixteen_bits_and_grey_are_scaled_and_not_clipped(tmp_path: Path):
    deep = Image.fromarray(np.full((8, 8), 257 * 200, dtype=np.uint16))
    grey = Image.new("L", (8, 8), 200)
    for image in (deep, grey, grey.convert("1", dither=Image.Dither.NONE).convert("L").point(lambda _: 200)):
        pixels = load(saved(image, tmp_path / "a.png"), 8).pixels
        torch.testing.assert_close(pixels, torch.full((3, 8, 8), 200 / 127.5 - 1))


def test_captions_beside_images_subfolders_and_hidden_files(tmp_path: Path):
    folder = tiny_images(tmp_path / "a [1]*", 3)
    tiny_images(folder / "test" / "deep", 1)
    (folder / ".thumbs").mkdir()
    (folder / ".thumbs" / "x.png").write_bytes(b"")
    (folder / "01.txt").write_text("﻿two\nlines é\n", encoding="utf-8")
    source = open_images(DataConfig(path=str(folder)))
    assert source.names == ["00.png", "01.png", "02.png", "test/deep/00.png"]
    assert source.captions == ["picture 0", "two lines é", "picture 2", "picture 0"]


def test_metadata_in_several_folders_with_subfolder_names_of_splits(tmp_path: Path):
    folder = without_text(tmp_path / "a [1]*")
    for name in ("test", "train"):
        without_text(folder / name, 1)
    metadata(folder, *({"file_name": n, "text": f"of {n}"} for n in ("00.png", "01.png", "02.png", "test/00.png")))
    metadata(folder / "train", {"file_name": "00.png", "text": "of the subfolder"})
    (folder / "03.txt").write_text("beside", encoding="utf-8")
    source = ImageFolder(folder)
    assert dict(zip(source.names, source.captions, strict=True)) == {
        "00.png": "of 00.png", "01.png": "of 01.png", "02.png": "of 02.png", "03.png": "beside",
        "test/00.png": "of test/00.png", "train/00.png": "of the subfolder",
    }  # fmt: skip


def test_caption_column(tmp_path: Path):
    folder = without_text(tmp_path / "a", 1)
    metadata(folder, {"file_name": "00.png", "caption": "a", "long": "b"})
    assert ImageFolder(folder).captions == ["a"]
    assert ImageFolder(folder, "long").captions == ["b"]
    metadata(folder, {"file_name": "00.png", "prompt": "a", "id": "b"})
    with pytest.raises(InputError, match=r"'text'.*\['id', 'prompt'\].*caption_column"):
        ImageFolder(folder)


# the reader of `datasets` leaves its CSV file open
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_csv_metadata_and_its_empty_cells(tmp_path: Path):
    folder = without_text(tmp_path / "a", 2)
    (folder / "metadata.csv").write_text('file_name,text\n00.png,"one, two"\n01.png,1984\n', encoding="utf-8")
    assert ImageFolder(folder).captions == ["one, two", "1984"]
    (folder / "metadata.csv").write_text("file_name,text\n00.png,one\n01.png,\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"01\.png.*empty cell"):
        ImageFolder(folder)
    gc.collect()  # its warnings come here and not at the end of the session


def test_missing_and_empty_folders(tmp_path: Path):
    with pytest.raises(InputError, match=r"got nothing there; fix --data\.path"):
        open_images(DataConfig(path=str(tmp_path / "none")))
    (tmp_path / "notes.md").write_text("no image")
    with pytest.raises(InputError, match=r"\.png.*got none"):
        open_images(DataConfig(path=str(tmp_path)))
    with pytest.raises(InputError, match="got a file there"):
        open_images(DataConfig(path=str(tmp_path / "notes.md")))


def test_images_without_captions_name_the_first_and_both_ways(tmp_path: Path):
    folder = without_text(tmp_path / "a")
    (folder / "00.txt").write_text("a")
    with pytest.raises(InputError, match=r"none for 3 of them.*01\.png.*metadata\.jsonl.*a\.txt"):
        ImageFolder(folder)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"file_name": "9.png", "text": "a"}', r"no file .*9\.png"),
        ('{"file_name": "00.png", "text": ', "JSON parse error"),
        ("", "no lines"),
        ('{"file": "00.png", "text": "a"}', "file_name"),
        ('{"file_name": "00.png", "text": "a"}\n{"file_name": null, "text": "b"}', "a file_name in every line"),
        ('{"file_name": "00.png", "text": ["a", "b"]}', "one caption an image"),
        ('{"file_name": "00.png", "text": "a"}\n{"file_name": "01.png", "text": null}', r"caption for .*01\.png"),
        ('{"file_name": "../../00.png", "text": "a"}', "must be a relative path"),
    ],
)
def test_bad_metadata(tmp_path: Path, lines: str, message: str):
    folder = without_text(tmp_path / "a", 2)
    (folder / "metadata.jsonl").write_text(lines)
    with pytest.raises(InputError, match=message):
        ImageFolder(folder)


def test_unreadable_images_are_listed_up_to_five(tmp_path: Path):
    folder = tiny_images(tmp_path / "a", 7)
    whole = (folder / "02.png").read_bytes()
    (folder / "02.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"1 of 7 unreadable: 02\.png \(.+\); repair"):
        ImageFolder(folder)
    for file in folder.glob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(
        InputError, match=r"all 7 unreadable: 00\.png \(of no known .*04\.png \([^,]*\), \.\.\.; repair"
    ):
        ImageFolder(folder)


def test_a_cut_jpeg_is_named_when_it_is_decoded(tmp_path: Path):
    data = saved(Image.effect_noise((64, 64), 90).convert("RGB"), tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"a\.jpg.*truncated"):
        ImageFolder(tmp_path).picture(0, 32)


def test_fingerprint_depends_on_bytes_captions_and_names_but_not_on_the_place(tmp_path: Path):
    first = ImageFolder(tiny_images(tmp_path / "a", 3)).fingerprint()
    folder = tiny_images(tmp_path / "b", 3)
    assert ImageFolder(folder).fingerprint() == first
    (folder / "01.txt").write_text("other")
    other = ImageFolder(folder).fingerprint()
    assert other != first
    tiny_images(folder, 2, seed=1)
    assert ImageFolder(folder).fingerprint() not in (first, other)
    (tmp_path / "a" / "02.png").rename(tmp_path / "a" / "03.png")
    (tmp_path / "a" / "02.txt").rename(tmp_path / "a" / "03.txt")
    assert ImageFolder(tmp_path / "a").fingerprint() != first


def test_demo_images_are_the_training_world():
    source = open_images(DataConfig(demo_images=3))
    world = World(TRAIN_SEED, 32)
    assert len(source) == 3
    assert source.captions == world.captions(range(3))
    torch.testing.assert_close(source.picture(2, 32).pixels, world.pixels([2])[0], rtol=0, atol=0)
    assert source.fingerprint() == WorldImages(3).fingerprint() != WorldImages(4).fingerprint()


@pytest.mark.parametrize("resolution", [-8, 0, 100])
def test_resolution_must_be_a_multiple_of_eight(resolution: int):
    with pytest.raises(InputError, match=rf"multiple of 8 pixels, got resolution {resolution}; fix --data.resolution"):
        DataConfig(resolution=resolution)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("STEPDISTILL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert DataConfig().cache_folder() == Path("~/.cache/stepdistill").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert DataConfig().cache_folder() == Path("/xdg/stepdistill")
    monkeypatch.setenv("STEPDISTILL_CACHE", "/own")
    assert DataConfig().cache_folder() == Path("/own")
    assert DataConfig(cache_dir="/given").cache_folder() == Path("/given")
