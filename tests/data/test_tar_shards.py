import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepdistill.data.pictures import Unreadable
from stepdistill.data.tars import TarShards, expand
from stepdistill.errors import InputError


def picture(level: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, {"jpg": "jpeg"}.get(kind, kind))
    return file.getvalue()


def written(path: Path, members: dict[str, bytes | str], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            content = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    written(
        tmp_path / "s" / "001.tar",
        {"c.txt": "third", "c.JPG": picture(30, "jpg"), "d.webp": picture(40, "webp"), "d.json": '{"text": "fourth"}'},
    )
    written(
        tmp_path / "s" / "000.tar",
        {
            "./x/a.png": picture(10), "b.seg.png": picture(99), "x/a.txt": "first\nline", "b.png": picture(20),
            "b.caption": "second", "notes.txt": "no image", ".hidden.png": b"", "__MACOSX/b.png": b"",
        },
    )  # fmt: skip
    return tmp_path / "s"


def test_samples_in_order_with_their_captions_and_bytes(shards: Path):
    source = TarShards(str(shards))
    assert source.captions == ["first line", "second", "third", "fourth"]
    assert [source.name(i) for i in range(4)] == ["000.tar:x/a", "000.tar:b", "001.tar:c", "001.tar:d"]
    for i in (3, 0, 2, 1):  # at random
        (square,) = source.pictures(i, 8)
        torch.testing.assert_close(square.pixels.mean(), torch.tensor((i + 1) * 10 / 127.5 - 1), rtol=0, atol=0.01)
    assert TarShards(str(shards), None).captions == [""] * 4


def test_shards_by_range_glob_file_and_folder(shards: Path):
    both = TarShards(str(shards)).names
    for path in ("{000..001}.tar", "*.tar", "[0-9]*.tar"):
        assert TarShards(str(shards / path)).names == both
    assert TarShards(str(shards / "001.tar")).names == both[2:]
    for part in "01":
        written(shards / part / "09.tar", {})
    assert [f.parent.name for f in expand(str(shards / "{0..1}" / "{09..09}.tar"))] == ["0", "1"]
    with pytest.raises(InputError, match=r"no file .*0/08\.tar' \(2 missing\)"):
        expand(str(shards / "{0..1}" / "{08..09}.tar"))
    with pytest.raises(InputError, match="got none; fix --data.path"):
        expand(str(shards / "x*.tar"))


def test_ranges_are_as_wide_as_their_first_number(tmp_path: Path):
    for name in ("7", "8", "9", "10", "11", "098", "099", "100"):
        written(tmp_path / f"{name}.tar", {})
    assert [f.stem for f in expand(str(tmp_path / "{8..11}.tar"))] == ["8", "9", "10", "11"]
    assert [f.stem for f in expand(str(tmp_path / "{098..100}.tar"))] == ["098", "099", "100"]


def test_which_caption_counts(tmp_path: Path):
    fields = json.dumps({"caption": "short", "long": "a long one"})
    file = written(tmp_path / "a.tar", {"a.png": picture(1), "a.json": fields, "b.png": picture(1), "b.txt": "text"})
    assert TarShards(str(file)).captions == ["short", "text"]
    assert TarShards(str(file), "long").captions == ["a long one", "text"]
    file = written(tmp_path / "b.tar", {"a.png": picture(1), "a.json": fields, "a.txt": "text"})
    assert TarShards(str(file)).captions == ["text"]
    assert TarShards(str(file), "long").captions == ["a long one"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": "text"}, r"key\.jpg .*got none"),
        ({"a.png": b"x"}, r"caption beside 'a\.tar:a', got none.*caption_column"),
        ({"a.png": b"x", "a.json": '{"text": ["a"]}'}, r"got \['a'\]"),
        ({"a.png": b"x", "a.json": '{"text": '}, "JSON beside 'a.tar:a'"),
        ({"a.png": b"x", "a.json": "[1]"}, "got none"),
        ({"a.png": b"x", "a.txt": b"caf\xe9"}, "UTF-8 text"),
    ],
)
def test_bad_members(tmp_path: Path, members: dict[str, bytes | str], message: str):
    with pytest.raises(InputError, match=message):
        TarShards(str(written(tmp_path / "a.tar", members)))


def test_damaged_and_compressed_shards_are_named(tmp_path: Path):
    members: dict[str, bytes | str] = {f"{i}.{kind}": b"x" * 600 for i in range(4) for kind in ("png", "txt")}
    good = written(tmp_path / "a.tar", members).read_bytes()
    for name, data in {
        "cut in a header": good[: 512 * 3 + 100],
        "cut in a member": good[: 512 * 4 + 100],
        "no tar": b"no tar" * 200,
        "a header damaged": good[: 512 * 6] + b"?" * 512 + good[512 * 7 :],
        "empty": b"",
    }.items():
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(InputError, match=r"uncompressed tar file at .*b\.tar'"):
            print(name, TarShards(str(tmp_path / "b.tar")).names)
    written(tmp_path / "c.tar", members, "w:gz")
    with pytest.raises(InputError, match=r"uncompressed tar file at .*c\.tar'"):
        TarShards(str(tmp_path / "c.tar"))


def test_a_member_that_is_no_image_is_unreadable(tmp_path: Path):
    source = TarShards(str(written(tmp_path / "a.tar", {"a.png": b"x", "a.txt": "a"})))
    with pytest.raises(Unreadable, match="no known image format"):
        source.pictures(0, 8)


def test_fingerprint_depends_on_contents_and_not_on_the_place(shards: Path, tmp_path: Path):
    first = TarShards(str(shards)).fingerprint()
    assert TarShards(str(shutil.copytree(shards, tmp_path / "t"))).fingerprint() == first
    assert TarShards(str(shards), None).fingerprint() != first
    os.utime(shards / "000.tar", (1, 1))
    assert TarShards(str(shards)).fingerprint() != first
