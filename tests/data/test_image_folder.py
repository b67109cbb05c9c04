import errno
import gc
import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import tiny_images

from stepdistill.data.folder import ImageFolder
from stepdistill.data.images import digest
from stepdistill.data.pictures import Unreadable
from stepdistill.errors import InputError


def without_text(folder: Path, count: int = 4) -> Path:
    tiny_images(folder, count)
    for file in folder.glob("*.txt"):
        file.unlink()
    return folder


def metadata(folder: Path, *rows: dict[str, object]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_captions_beside_images_subfolders_and_hidden_files(tmp_path: Path):
    folder = tiny_images(tmp_path / "a [1]*", 3)
    tiny_images(folder / "test" / "deep", 1)
    (folder / ".thumbs").mkdir()
    (folder / ".thumbs" / "x.png").write_bytes(b"")
    (folder / "01.txt").write_text("﻿two\nlines é\n", encoding="utf-8")
    source = ImageFolder(folder)
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


def test_empty_captions_for_unconditional_models(tmp_path: Path):
    folder = without_text(tmp_path / "a", 2)
    metadata(folder, {"file_name": "00.png", "text": "a"})
    source = ImageFolder(folder, None)
    assert (source.names, source.captions) == (["00.png", "01.png"], ["", ""])


def test_no_image_is_read_at_the_start(tmp_path: Path):
    folder = tiny_images(tmp_path / "a", 3)
    (folder / "01.png").write_bytes(b"no image")
    (folder / "02.png").chmod(0)
    source = ImageFolder(folder)
    assert len(source.fingerprint()) == 32
    assert len(source.pictures(0, 32)) == 1
    with pytest.raises(Unreadable, match="no known image format"):
        source.pictures(1, 32)
    (folder / "02.png").unlink()
    with pytest.raises(Unreadable, match="No such file"):
        source.pictures(2, 32)


def test_a_failing_disk_is_not_the_images_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = ImageFolder(tiny_images(tmp_path / "a", 1))

    def fail(_self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(InputError, match=r"to read '00\.png', got: .*Input/output error"):
        source.pictures(0, 32)


def test_fingerprint_depends_on_files_captions_and_names_but_not_on_the_place(tmp_path: Path):
    folder = tiny_images(tmp_path / "a", 3)
    first = ImageFolder(folder).fingerprint()
    assert ImageFolder(shutil.copytree(folder, tmp_path / "b")).fingerprint() == first  # a copy with its times
    seen = {first}

    def changed() -> None:
        seen.add(ImageFolder(folder).fingerprint())

    (folder / "01.txt").write_text("other")
    changed()
    os.utime(folder / "02.png", ns=(0, 10**18))  # written again, perhaps with as many bytes
    changed()
    with (folder / "02.png").open("ab") as file:
        file.write(b"x")
    os.utime(folder / "02.png", ns=(0, 10**18))
    changed()
    (folder / "02.png").rename(folder / "03.png")
    (folder / "02.txt").rename(folder / "03.txt")
    changed()
    assert len(seen) == 5


def test_texts_and_lists_have_an_end():
    lists = [(["ab", "c"], []), (["a", "bc"], []), (["abc"], []), (["ab"], ["c"]), ([], ["ab", "c"])]
    assert len({digest(*each).hexdigest() for each in lists}) == 5
