import shutil
from pathlib import Path

import datasets
import pytest
import torch
from tiny import tiny_images

from stepdistill.data import open as opening
from stepdistill.data.config import DataConfig
from stepdistill.data.folder import ImageFolder
from stepdistill.data.hub import HubImages
from stepdistill.data.images import Source, WorldImages
from stepdistill.data.open import open_source
from stepdistill.data.pictures import View
from stepdistill.data.prompts import Prompts
from stepdistill.data.tars import TarShards
from stepdistill.demo.world import TRAIN_SEED, World
from stepdistill.errors import InputError


def opened(path: str | Path, **options: str) -> Source:
    return open_source(DataConfig(path=str(path), **options))  # type: ignore[arg-type]


def test_demo_images_are_the_training_world():
    source = open_source(DataConfig(demo_images=3))
    assert isinstance(source, WorldImages)
    world = World(TRAIN_SEED, 32)
    assert len(source) == 3
    assert source.captions == world.captions(range(3))
    torch.testing.assert_close(source.pictures(2, 32)[0].pixels, world.pixels([2])[0], rtol=0, atol=0)
    mirrored = source.pictures(2, 32, [View(flip=True)])[0].pixels
    torch.testing.assert_close(mirrored.flip(-1), world.pixels([2])[0], rtol=0, atol=0)
    assert open_source(DataConfig(demo_images=3, caption_column="none")).captions == [""] * 3
    assert source.fingerprint() == WorldImages(3).fingerprint() != WorldImages(4).fingerprint()


@pytest.fixture
def kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every kind of training data by name; the classes that read them only note what they were given."""
    tiny_images(tmp_path / "images", 1)
    tiny_images(tmp_path / "both" / "deep", 1)
    for name in ("tars/deep/0.tar", "tars/0.parquet", "both/0.tar", "tables/data/0.parquet", "one.csv", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "tables" / ".git").mkdir()
    for place in (".git", ".hidden.png"):
        shutil.copy(tmp_path / "images" / "00.png", tmp_path / "tables" / place)
    (tmp_path / "p.txt").write_text("a prompt")
    (tmp_path / "empty").mkdir()
    datasets.Dataset.from_dict({"image": ["a"], "text": ["b"]}).save_to_disk(tmp_path / "saved", num_shards=1)
    for name in ("HubImages", "TarShards"):
        monkeypatch.setattr(
            opening, name, type(name, (), {"__init__": lambda self, *given: setattr(self, "given", given)})
        )
    return tmp_path


def test_the_kind_of_source_follows_from_the_path(kinds: Path):
    for name in ("images", "both"):
        assert isinstance(opened(kinds / name), ImageFolder)
    assert isinstance(opened(kinds / "p.txt"), Prompts)
    for name in ("tars", "tars/deep/0.tar", "tars/{00..01}.tar", "tars/*.tar"):
        source = opened(kinds / name, caption_column="long")
        assert (type(source).__name__, source.given) == ("TarShards", (str(kinds / name), "long"))  # type: ignore[attr-defined]
    for path in (kinds / "tables", kinds / "one.csv", kinds / "saved", "org/name", "mnist"):
        source = opened(path, split="test", image_column="img", caption_column="none")
        assert type(source).__name__ == "HubImages"
        assert source.given == (str(path), "test", "img", None)  # type: ignore[attr-defined]


def test_bad_paths_list_what_is_possible(kinds: Path):
    for path, found in {"none": "nothing there", "a/b/c": "nothing there", "one.parquet": "nothing there"}.items():
        with pytest.raises(InputError, match=rf"got {found}; give --data\.path .*shards.*hub id.*prompts"):
            opened(kinds / path)
    with pytest.raises(InputError, match="another kind"):
        opened(kinds / "notes.md")
    with pytest.raises(InputError, match=r"\.png.*tables in .*got none; give --data\.path"):
        opened(kinds / "empty")
    with pytest.raises(InputError, match="got no file at"):
        opened(kinds / "q.txt")


def test_the_real_classes_are_named():
    assert (opening.HubImages, opening.TarShards) == (HubImages, TarShards)
