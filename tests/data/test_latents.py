import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RESOLUTION, tiny_images, tiny_pipeline

from stepdistill.data.config import DataConfig
from stepdistill.data.encoding import ImageLatents, PromptEmbeds, check_bad
from stepdistill.data.folder import ImageFolder
from stepdistill.data.latents import CachedLatents, cache_latents, latent_shape
from stepdistill.data.open import open_source
from stepdistill.data.pictures import views
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


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for maker in (ImageLatents, PromptEmbeds):
        monkeypatch.setattr(maker, "shard", SHARD)


def cached(model: Any, images: Path, folder: Path, **options: Any) -> CachedLatents:
    calls = {key: options.pop(key) for key in ("seed", "rank", "world", "wait") if key in options}
    config = DataConfig(**{"path": str(images), "encode_batch_size": 2, "cache_dir": str(folder), **options})
    return cache_latents(model, open_source(config), config, progress=False, **calls)


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
        mean, std = model.posterior(source.pictures(i, RESOLUTION)[0].pixels[None])
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
    done = len(list((tmp_path / "cache").rglob("latents-*.safetensors")))
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
    cached(model, images, folder, resolution=16)
    cached(model, images, folder, random_flip=True)
    cached(model, images, folder, random_flip=True, seed=1)
    cached(model, images, folder, center_crop=False)
    cached(model, images, folder, center_crop=False, variants=2)
    other = load(TeacherConfig(path=str(tiny_pipeline(tmp_path_factory.mktemp("other"), seed=1))))
    cached(other, images, folder)
    assert len(list(folder.iterdir())) == 9
    cached(model, images, folder, max_bad_fraction=0.5, seed=1)  # which change no latent of centred crops
    assert len(list(folder.iterdir())) == 9


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


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"size": 1}', "", '{"size": "a", "sha256": "", "mtime_ns": 0, "rows": 1}']
)
def test_a_damaged_list_beside_a_shard_only_costs_time(model: Counting, images: Path, tmp_path: Path, text: str):
    first = everything(cached(model, images, tmp_path / "cache"))
    model.images = 0
    (sidecar,) = (tmp_path / "cache").rglob("latents-00001.json")
    sidecar.write_text(text)
    torch.testing.assert_close(everything(cached(model, images, tmp_path / "cache")), first, rtol=0, atol=0)
    assert model.images == SHARD


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


def test_progress_is_plain_lines_where_there_is_no_terminal(
    model: Counting, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = DataConfig(path=str(images), encode_batch_size=2, cache_dir=str(tmp_path / "cache"))
    cache_latents(model, open_source(config), config)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("caching")]
    assert lines == [
        "caching images: 5 of 12", "caching captions: 5 of 5", "caching images: 10 of 12", "caching images: 12 of 12",
    ]  # fmt: skip


def broken(images: Path, *numbers: int) -> None:
    for number in numbers:
        (images / f"{number:02d}.png").write_bytes(b"no image")


def test_unreadable_images_are_left_out_and_remembered(
    model: Counting, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source = ImageFolder(images)
    good = [i for i in range(COUNT) if i not in (0, *range(5, 10))]  # a whole shard is lost, and the first of another
    broken(images, 0, *range(5, 10))
    data = cached(model, images, tmp_path / "cache", max_bad_fraction=0.5)
    assert "6 of 12 images cannot be read" in caplog.text
    assert "00.png (of no known image format), 05.png" in caplog.text and "09.png" not in caplog.text
    rows = everything(data)
    assert (len(data), model.images) == (len(good), len(good))
    for row, i in enumerate(good):
        mean, _ = model.posterior(source.pictures(i, RESOLUTION)[0].pixels[None])
        torch.testing.assert_close(rows["mean"][row], mean[0], rtol=1e-5, atol=1e-5)
        embeds = model.encode_prompts([source.captions[i]])["prompt_embeds"]
        torch.testing.assert_close(rows["prompt_embeds"][row], embeds[0], rtol=1e-5, atol=1e-5)
    model.images = 0
    caplog.clear()
    torch.testing.assert_close(everything(cached(model, images, tmp_path / "cache", max_bad_fraction=0.5)), rows)
    assert model.images == 0 and "6 of 12 images cannot be read" in caplog.text
    with pytest.raises(InputError, match=r"at most 5 unreadable .*max_bad_fraction 0\.42\), got at least 6: 00\.png"):
        cached(model, images, tmp_path / "cache", max_bad_fraction=0.42)


def test_too_many_unreadable_images_end_it_at_once_and_keep_what_is_finished(
    model: Counting, images: Path, tmp_path: Path
):
    broken(images, 1, 6, 11)
    with pytest.raises(InputError, match=r"at most 1 .* of 12 .*at least 2: 01\.png \(of no known .*06\.png.*; repair"):
        cached(model, images, tmp_path / "cache", max_bad_fraction=0.1)
    names = [file.name for file in shards(tmp_path / "cache")]
    assert names == ["latents-00000.safetensors", "prompts-00000.safetensors"]
    model.images = 0
    with pytest.raises(InputError, match=r"at least 2: 01\.png .*06\.png"):  # the first is known from the cache
        cached(model, images, tmp_path / "cache", max_bad_fraction=0.1)
    assert model.images == 0
    assert len(cached(model, images, tmp_path / "cache", max_bad_fraction=0.25)) == 9
    broken(images, *range(COUNT))
    with pytest.raises(InputError, match=r"at most 0 .*got at least 1: 00\.png"):
        cached(model, images, tmp_path / "cache")


def test_variants_are_the_views_of_each_image_and_drawn_by_step_and_place(
    model: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tiny_images(tmp_path / "wide", 6, resolution=48)
    options = {"resolution": 32, "variants": 3, "center_crop": False, "random_flip": True}
    data = cached(model, folder, tmp_path / "cache", **options)
    assert (len(data), model.images) == (6, 18)
    source, rows = ImageFolder(folder), data.rows("latents", range(18))
    monkeypatch.setattr(
        model,
        "size_cond",
        lambda original, crop, target: {"ids": torch.tensor([original, crop, target]).transpose(0, 1)},
    )
    for i in range(6):
        pictures = source.pictures(i, 32, views(0, i, 3, False, True))
        for v, picture in enumerate(pictures):
            mean, _ = model.posterior(picture.pixels[None])
            torch.testing.assert_close(rows["mean"][3 * i + v], mean[0], rtol=1e-5, atol=1e-5)
            assert tuple(rows["crop"][3 * i + v].tolist()) == picture.crop
    seen = set()
    for step in range(20):
        rng = StepRandom(0, step, [2, 9])
        batch, chosen = data.batch([5, 5], rng), rng.integers("variant", 0, 3).tolist()
        seen.update(chosen)
        noise = rng.normal("posterior", (4, 4, 4))
        places = [15 + v for v in chosen]
        torch.testing.assert_close(batch.data(), rows["mean"][places] + rows["std"][places] * noise, rtol=0, atol=0)
        assert batch.cond["ids"][:, 1].tolist() == rows["crop"][places].tolist()
        assert batch.cond["ids"][0, [0, 2]].tolist() == [[48, 48], [32, 32]]
        alone = data.batch([5], rng.slice(1, 2))
        torch.testing.assert_close(alone.data()[0], batch.data()[1], rtol=0, atol=0)
    assert seen == {0, 1, 2}


def test_models_without_text_need_no_captions(
    model: Counting, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(model, "encode_prompts", lambda prompts: {})
    monkeypatch.setattr(model, "uncond", lambda cond: {})
    for file in images.glob("*.txt"):
        file.unlink()
    data = cached(model, images, tmp_path / "cache", caption_column="none")
    batch = data.batch([3, 4], StepRandom(0, 0, [0, 1]))
    assert (batch.cond, batch.uncond, len(data)) == ({}, {}, COUNT)
    assert batch.data().shape == (2, 4, 4, 4)
    assert len(cached(model, images, tmp_path / "cache", caption_column="none")) == COUNT


def test_resolution_must_suit_the_model(model: Counting, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert latent_shape(model, 48) == (4, 6, 6)
    monkeypatch.setattr(model, "latent_shape", (16, 2, 2))  # a patch of 16 pixels
    assert latent_shape(model, 48) == (16, 3, 3)
    with pytest.raises(InputError, match=r"a multiple of 16 pixels, .*got resolution 40; fix --data\.resolution"):
        cached(model, images, tmp_path / "cache", resolution=40)


def test_several_processes_need_a_barrier(model: Counting, images: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="expected a barrier"):
        cached(model, images, tmp_path / "cache", rank=1, world=2)


def test_the_allowed_share_is_exact():
    check_bad(["a"] * 29, 100, 0.29)  # though 0.29 * 100 < 29 in floating point
    with pytest.raises(InputError, match="at most 29 unreadable images of 100"):
        check_bad(["a"] * 30, 100, 0.29)
