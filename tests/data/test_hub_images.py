import io
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from tiny import tiny_images

from stepdistill.data import hub
from stepdistill.data.hub import HubImages
from stepdistill.data.pictures import Unreadable
from stepdistill.errors import InputError

# what `datasets` leaves open
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, "png")
    return file.getvalue()


def rows(count: int = 5, **columns: Any) -> datasets.Dataset:
    """An Image column of grey levels 0, 10, 20, ... and captions."""
    found: dict[str, Any] = {"image": [{"bytes": png(10 * i), "path": f"{i}.png"} for i in range(count)]}
    found |= {"text": [f"picture {i % 3}" for i in range(count)], **columns}
    return datasets.Dataset.from_dict(found).cast_column("image", datasets.Image())


def check(source: HubImages, count: int = 5) -> None:
    assert len(source) == count
    assert source.captions == [f"picture {i % 3}" for i in range(count)]
    for i in reversed(range(count)):
        (square,) = source.pictures(i, 8)
        torch.testing.assert_close(square.pixels, torch.full((3, 8, 8), 10 * i / 127.5 - 1))


def test_save_to_disk_of_one_split_and_of_several(tmp_path: Path):
    rows().save_to_disk(tmp_path / "one")
    check(HubImages(str(tmp_path / "one")))
    datasets.DatasetDict({"train": rows(3), "test": rows()}).save_to_disk(tmp_path / "two")
    check(HubImages(str(tmp_path / "two"), "test"))
    with pytest.raises(InputError, match=r"split 'val'.*\['test', 'train'\]; fix --data\.split"):
        HubImages(str(tmp_path / "two"), "val")
    with pytest.raises(InputError, match=r"expected split 'test'.*fix --data\.split"):
        HubImages(str(tmp_path / "one"), "test")


def test_a_folder_of_parquet_files_and_a_slice_of_it(tmp_path: Path):
    (tmp_path / "a" / "data").mkdir(parents=True)
    for split, count in (("train", 5), ("test", 2)):
        rows(count).to_parquet(tmp_path / "a" / "data" / f"{split}-00000-of-00001.parquet")
    check(HubImages(str(tmp_path / "a")))
    check(HubImages(str(tmp_path / "a"), "test"), 2)
    check(HubImages(str(tmp_path / "a"), "train[:3]"), 3)
    with pytest.raises(InputError, match=r"split 'val'.*--data\.split"):
        HubImages(str(tmp_path / "a"), "val")
    check(HubImages(str(tmp_path / "a" / "data" / "train-00000-of-00001.parquet")))


def test_tables_that_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "SAMPLED", 1)
    tiny_images(tmp_path / "a" / "files", 3)
    lines = [f'{{"img": "files/0{i}.png", "text": "picture {i}"}}\n' for i in range(3)]
    (tmp_path / "a" / "rows.jsonl").write_text("".join(lines))
    path = tmp_path / "a" / "rows.jsonl"
    source = HubImages(str(path), image_column="img")
    assert source.captions == ["picture 0", "picture 1", "picture 2"]
    assert source.data(2) == (tmp_path / "a" / "files" / "02.png").read_bytes()
    assert source.name(1) == "row 1 (files/01.png)"
    mixed: list[Any] = [{"bytes": png(7), "path": "files/01.png"}, {"bytes": None, "path": "files/02.png"}, None]
    datasets.Dataset.from_dict({"img": mixed, "text": ["a"] * 3}).to_parquet(tmp_path / "a" / "b.parquet")
    both = HubImages(str(tmp_path / "a" / "b.parquet"), image_column="img")
    assert (both.data(0), both.data(1)) == (png(7), source.data(2))
    first, second = source.fingerprint(), both.fingerprint()
    assert HubImages(str(path), image_column="img").fingerprint() == first
    (tmp_path / "a" / "files" / "01.png").touch()  # of which the second holds the bytes
    assert source.fingerprint() != first and both.fingerprint() == second
    first = source.fingerprint()
    shutil.copy(tmp_path / "a" / "files" / "00.png", tmp_path / "a" / "files" / "02.png")
    assert source.fingerprint() != first and both.fingerprint() != second
    (tmp_path / "a" / "files" / "02.png").unlink()
    with pytest.raises(Unreadable, match="No such file"):
        source.pictures(2, 8)


def test_columns_of_bytes_and_of_bytes_with_a_path(tmp_path: Path):
    levels = [png(10 * i) for i in range(5)]
    texts = [f"picture {i % 3}" for i in range(5)]
    for name, column in {"bytes": levels, "both": [{"bytes": b, "path": None} for b in levels]}.items():
        datasets.Dataset.from_dict({"image": column, "text": texts}).to_parquet(tmp_path / f"{name}.parquet")
        check(HubImages(str(tmp_path / f"{name}.parquet")))


def test_undecodable_and_missing_images_are_named_and_the_rest_is_read(tmp_path: Path):
    found: list[Any] = [{"bytes": png(10 * i), "path": None} for i in range(5)]
    found[1], found[3] = {"bytes": b"no image", "path": "b.png"}, None
    table = datasets.Dataset.from_dict({"image": found, "text": ["a"] * 5}).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "a")
    source = HubImages(str(tmp_path / "a"))
    with pytest.raises(Unreadable, match="no known image format"):
        source.pictures(1, 8)
    with pytest.raises(Unreadable, match="no image in this row"):
        source.pictures(3, 8)
    assert [source.name(i) for i in range(3)] == ["row 0", "row 1 (b.png)", "row 2"]
    assert len(source.pictures(4, 8)) == 1
    assert len(source.fingerprint()) == 32


def test_captions_of_every_kind(tmp_path: Path):
    labels = datasets.ClassLabel(names=["cat", "dog"])
    columns = {"caption": list("abcde"), "number": range(5), "label": [0, 1, 0, 1, 1], "many": [["a"]] * 5}
    table = rows(**{name: list(values) for name, values in columns.items()}, gap=["a", None, "b", None, "c"])
    table.cast_column("label", labels).save_to_disk(tmp_path / "a")

    def captions(column: str | None) -> Any:
        return HubImages(str(tmp_path / "a"), caption_column=column).captions

    assert captions("other") == list("abcde")  # "caption" is tried
    assert captions("number") == list("01234")
    assert captions("label") == ["cat", "dog", "cat", "dog", "dog"]
    assert captions(None) == [""] * 5
    with pytest.raises(InputError, match=r"one caption an image in column 'many'.*caption_column"):
        captions("many")
    with pytest.raises(InputError, match="got none in 2, the first being row 1"):
        captions("gap")
    with pytest.raises(InputError, match=r"column 'picture' in .*'image', 'text'.*--data\.image_column"):
        HubImages(str(tmp_path / "a"), image_column="picture")
    with pytest.raises(InputError, match=r"images, encoded bytes or paths in column 'number'"):
        HubImages(str(tmp_path / "a"), image_column="number")
    rows(2).remove_columns("text").save_to_disk(tmp_path / "b")
    with pytest.raises(InputError, match=r"a column 'text' in .*\['image'\]; fix --data\.caption_column"):
        HubImages(str(tmp_path / "b"))


def test_fingerprint_is_of_the_contents(tmp_path: Path):
    rows().save_to_disk(tmp_path / "a")
    rows().save_to_disk(tmp_path / "b", num_shards=2)
    first = HubImages(str(tmp_path / "a")).fingerprint()
    assert HubImages(str(tmp_path / "b")).fingerprint() == first  # another folder, other files, the same rows
    assert HubImages(str(tmp_path / "b")).fingerprint() == first
    other = rows()
    seen = {first}
    for changed in (
        other.select([1, 0, 2, 3, 4]), other.select(range(4)), rows(text=["a"] * 5),
        rows(image=[{"bytes": png(9 if i == 2 else 10 * i), "path": None} for i in range(5)]),
    ):  # fmt: skip
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        changed.save_to_disk(tmp_path / "c")
        seen.add(HubImages(str(tmp_path / "c")).fingerprint())
    assert len(seen) == 5


def test_lengths_tell_images_apart_that_are_not_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "SAMPLED", 2)  # the first and the last
    seen = set()
    for name, data in {"a": png(20), "b": png(20) + b"x"}.items():
        column = [{"bytes": data if i == 2 else png(0), "path": None} for i in range(5)]
        rows(image=column).save_to_disk(tmp_path / name)
        seen.add(HubImages(str(tmp_path / name)).fingerprint())
    assert len(seen) == 2


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)

    def never(*_given: Any, **_options: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", never)
    with pytest.raises(InputError, match=r"'org/name', which is neither .*hub cannot be reached; fix --data\.path"):
        HubImages("org/name")


def test_broken_files_are_named(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"a `datasets` data set at .*a\.parquet', got: .*--data\.path"):
        HubImages(str(tmp_path / "a.parquet"))
    rows().save_to_disk(tmp_path / "b")
    next((tmp_path / "b").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(InputError, match=r"a `datasets` data set at .*b', got: .*--data\.path"):
        HubImages(str(tmp_path / "b"))
    rows().select([]).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"no data.*--data\.split"):
        HubImages(str(tmp_path / "c.parquet"))
