import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RESOLUTION, tiny_images, tiny_pipeline

from stepdistill.data.cache import ShardStore
from stepdistill.data.images import ImageFolder
from stepdistill.data.latents import CachedLatents, cache_latents
from stepdistill.errors import InputError
from stepdistill.families import TeacherConfig, load
from stepdistill.families.unet import StableDiffusion
from stepdistill.randomness import StepRandom

COUNT, SHARD = 12, 5


class Counting(StableDiffusion):
    """Counts the images and prompts that it encodes, and dies after `limit` images."""

    images, prompts, limit = 0, 0, 10**9

    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.images + len(pixels) > self.limit:
            raise KeyboardInterrupt
        self.images += len(pixels)
        return super().posterior(pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        self.prompts += len(prompts)
        return super().encode_prompts(prompts)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(pipeline: Path) -> Counting:
    return Counting.load(TeacherConfig(path=str(pipeline)), str(pipeline), torch.float32)  # type: ignore[return-value]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tiny_images(tmp_path / "images", COUNT)


def cached(model: Any, images: Path, folder: Path, **options: Any) -> CachedLatents:
    settings = {"batch_size": 2, "progress": False, "shard": SHARD, **options}
    return cache_latents(model, ImageFolder(images), RESOLUTION, folder, **settings)


def everything(data: CachedLatents) -> dict[str, torch.Tensor]:
    rows = data.rows("latents", range(len(data)))
    return {**rows, **data.rows("prompts", rows["prompt"].tolist())}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_rows_are_the_models_own_posterior_and_embeddings(model: Counting, images: Path, tmp_path: Path):
    source = ImageFolder(images)
    data = cached(model, images, tmp_path / "cache")
    assert (len(data), model.images, model.prompts) == (COUNT, COUNT, 5)  # five different captions
    rows = everything(data)
    for i in range(COUNT):
        mean, std = model.posterior(source.picture(i, RESOLUTION).pixels[None])
        torch.testing.assert_close(rows["mean"][i], mean[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rows["std"][i], std[0], rtol=1e-5, atol=1e-5)
        embeds = model.encode_prompts([source.captions[i]])["prompt_embeds"]
        torch.testing.assert_close(rows["prompt_embeds"][i], embeds[0], rtol=1e-5, atol=1e-5)
    assert rows["mean"].dtype == rows["std"].dtype == torch.float32
    assert rows["original"].tolist() == [[32, 32]] * COUNT


def test_batch_samples_the_posterior_and_asks_the_model_for_no_prompt(model: Counting, images: Path, tmp_path: Path):
    data = cached(model, images, tmp_path / "cache")
    rng = StepRandom(0, 3, [4, 0, 9])
    batch, rows = data.batch([7, 2, 7], rng), everything(data)
    noise = rng.normal("posterior", (4, 4, 4))
    assert batch.x0 is not None
    torch.testing.assert_close(batch.x0, rows["mean"][[7, 2, 7]] + rows["std"][[7, 2, 7]] * noise, rtol=0, atol=0)
    assert not torch.equal(batch.x0[0], batch.x0[2])  # the same image at two places gets two samples
    torch.testing.assert_close(batch.cond["prompt_embeds"], rows["prompt_embeds"][[7, 2, 7]], rtol=0, atol=0)
    empty = model.encode_prompts([""])["prompt_embeds"]
    torch.testing.assert_close(batch.uncond["prompt_embeds"], empty.expand(3, -1, -1), rtol=0, atol=0)
    assert batch.rng is rng


def test_batch_does_not_depend_on_how_it_is_split(model: Counting, images: Path, tmp_path: Path):
    data = cached(model, images, tmp_path / "cache")
    chosen = [11, 0, 3, 6, 5, 4, 10, 1]
    rng = StepRandom(1, 2, range(8))
    whole = data.batch(chosen, rng)
    for size in (1, 2, 3):
        parts = [data.batch(chosen[i : i + size], rng.slice(i, i + size)) for i in range(0, 8, size)]
        torch.testing.assert_close(torch.cat([p.data() for p in parts]), whole.data(), rtol=0, atol=0)
        embeds = torch.cat([p.cond["prompt_embeds"] for p in parts])
        torch.testing.assert_close(embeds, whole.cond["prompt_embeds"], rtol=0, atol=0)
    with pytest.raises(IndexError, match=r"indices in \[0, 12\)"):
        data.batch([12], rng.slice(0, 1))


def test_a_finished_cache_is_reused_without_the_model(model: Counting, images: Path, tmp_path: Path):
    first = everything(cached(model, images, tmp_path / "cache"))
    model.images = model.prompts = 0
    stamps = {f: f.stat().st_mtime_ns for f in shards(tmp_path / "cache")}
    again = everything(cached(model, images, tmp_path / "cache"))
    assert (model.images, model.prompts) == (0, 0)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert {f: f.stat().st_mtime_ns for f in shards(tmp_path / "cache")} == stamps


@pytest.mark.parametrize("limit", [0, 4, 7, 10])
def test_a_killed_run_is_completed_to_the_same_tensors(model: Counting, images: Path, tmp_path: Path, limit: int):
    whole = everything(cached(model, images, tmp_path / "whole"))
    model.images, model.limit = 0, limit
    with pytest.raises(KeyboardInterrupt):
        cached(model, images, tmp_path / "cache")
    done = len(shards(tmp_path / "cache"))
    assert done == limit // SHARD
    model.images, model.limit = 0, COUNT
    data = cached(model, images, tmp_path / "cache")
    assert model.images == COUNT - done * SHARD  # finished shards were not made again
    torch.testing.assert_close(everything(data), whole, rtol=0, atol=0)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_another_image_caption_resolution_or_model_is_another_cache(
    model: Counting, images: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path / "cache"
    cached(model, images, folder)
    (images / "03.png").write_bytes((images / "04.png").read_bytes())
    cached(model, images, folder)
    (images / "03.txt").write_text("other")
    cached(model, images, folder)
    cache_latents(model, ImageFolder(images), 16, folder, progress=False)
    other = load(TeacherConfig(path=str(tiny_pipeline(tmp_path_factory.mktemp("other"), seed=1))))
    cached(other, images, folder)
    assert len(list(folder.iterdir())) == 5
    cached(model, images, folder)
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "empty"])
@pytest.mark.parametrize("name", ["latents-00001", "prompts-00000"])
def test_a_damaged_shard_is_made_again_alone(model: Counting, images: Path, tmp_path: Path, damage: str, name: str):
    first = everything(cached(model, images, tmp_path / "cache"))
    (file,) = (tmp_path / "cache").rglob(f"{name}.safetensors")
    whole = file.read_bytes()
    if damage == "flip":
        file.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    elif damage == "cut":
        os.truncate(file, len(whole) // 2)
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    model.images = model.prompts = 0
    torch.testing.assert_close(everything(cached(model, images, tmp_path / "cache")), first, rtol=0, atol=0)
    assert (model.images, model.prompts) == ((SHARD, 0) if name.startswith("latents") else (0, 5))
    assert file.read_bytes() == whole


def test_a_damaged_manifest_only_costs_time(model: Counting, images: Path, tmp_path: Path):
    first = everything(cached(model, images, tmp_path / "cache"))
    (manifest,) = (tmp_path / "cache").rglob("manifest.json")
    for text in ("{", "[]", json.dumps({"about": {"format": -1}, "files": {}})):
        manifest.write_text(text)
        torch.testing.assert_close(everything(cached(model, images, tmp_path / "cache")), first, rtol=0, atol=0)


def test_latents_that_are_not_finite_name_the_file(model: Counting, images: Path, tmp_path: Path):
    def broken(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = StableDiffusion.posterior(model, pixels)
        std[1] = torch.inf
        return mean, std

    model.posterior = broken  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"finite latents.*'01\.png'.*--teacher\.vae"):
        cached(model, images, tmp_path / "cache")


def test_a_folder_that_cannot_be_written(model: Counting, images: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"latent cache.*--data\.cache_dir"):
        cached(model, images, tmp_path / "file" / "cache")


def test_only_the_main_process_writes_and_the_others_wait(model: Counting, images: Path, tmp_path: Path):
    """The waits of the second process are where the first does its work."""
    folder = tmp_path / "cache"
    waits: list[int] = []

    def main_runs() -> None:
        waits.append(0)
        if len(waits) == 1:
            cached(model, images, folder)

    data = cached(model, images, folder, main=False, wait=main_runs)
    assert (len(waits), model.images) == (2, COUNT)
    assert everything(data)["mean"].shape == (COUNT, 4, 4, 4)


def test_others_say_so_where_they_cannot_see_the_cache(model: Counting, images: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"main process's latent cache.*all nodes share"):
        cached(model, images, tmp_path / "cache", main=False, wait=lambda: None)


def test_leftovers_of_killed_runs_go_after_a_day(tmp_path: Path):
    store = ShardStore(tmp_path, {"format": 1})
    store.write("a", {"x": torch.arange(3)})
    old, new = tmp_path / ".b.1.tmp", tmp_path / ".c.2.tmp"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    store.remove_leftovers()
    assert (old.exists(), new.exists()) == (False, True)
    assert oct(store.path("a").stat().st_mode) == oct((tmp_path / "manifest.json").stat().st_mode)


def test_progress_is_plain_lines_where_there_is_no_terminal(
    model: Counting, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cached(model, images, tmp_path / "cache", progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("caching")]
    assert lines == [f"caching images: {n} of 12" for n in (5, 10, 12)] + ["caching captions: 5 of 5"]
