from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline
from tiny_flux import tiny_flux
from tiny_sd3 import tiny_sd3
from torch import Tensor
from toys import sd_table

from stepdistill.batch import Cond
from stepdistill.data.config import DataConfig
from stepdistill.data.generating import TeacherLatents
from stepdistill.data.latents import CachedLatents, cache_latents
from stepdistill.data.open import open_source
from stepdistill.diffusion.schedule import Flow, NoiseSchedule
from stepdistill.errors import InputError
from stepdistill.families import TeacherConfig, load
from stepdistill.families.analytic import TwoClass
from stepdistill.families.model import Model
from stepdistill.networks.lora import LoraSpec
from stepdistill.randomness import StepRandom

STEPS, SCALE = 5, 7.5  # a divisor of 1000, at which the stock scheduler has our grid


class TwoPrompts(Model):
    """The prompts "0" and "1" are the classes of a truth known in closed form; latents are one eighth of the pixels."""

    name, resolution, latent_shape, modules = "truth", 32, (2, 4, 4), ()
    device = torch.device("cpu")  # type: ignore[assignment]

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.denoiser = TwoClass((-1.0, 2.0), 0.3, schedule, "v", uncond_mean=0.5)

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return {"label": torch.tensor([int(p) for p in prompts])}

    def uncond(self, cond: Cond) -> Cond:
        return {"label": torch.full_like(cond["label"], -1)}

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("there are no images")

    def decode(self, latents: Tensor) -> Tensor:
        raise AssertionError("nothing is decoded")

    def pipeline(self, student: Any = None) -> Any:
        raise AssertionError("nothing is shown")

    def fingerprint(self) -> str:
        return "truth"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_pipeline(folder, timestep_spacing="trailing", set_alpha_to_one=True)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TeacherLatents, "shard", 2)


def made(model: Model, prompts: Sequence[str], folder: Path, *, seed: int = 0, **options: Any) -> CachedLatents:
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(prompts))
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "encode_batch_size": 2, **options}
    config = DataConfig(path=str(folder / "prompts.txt"), cache_dir=str(folder / "cache"), **options)
    return cache_latents(model, open_source(config), config, seed=seed, progress=False)


def latents(data: CachedLatents) -> Tensor:
    x0 = data.batch(range(len(data)), StepRandom(0, 0, range(len(data)))).x0
    assert x0 is not None
    return x0


def noise(count: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    return StepRandom(seed, 0, range(count)).normal("teacher latents", shape)


@pytest.mark.parametrize("guidance_scale", [1.0, SCALE])
def test_latents_are_the_stock_pipelines(pipeline: Path, tmp_path: Path, guidance_scale: float):
    model = load(TeacherConfig(path=str(pipeline)))
    prompts = ["red", "blue", "red"]
    stock = model.pipeline()(
        prompts, latents=noise(3, (4, 4, 4)), num_inference_steps=STEPS, guidance_scale=guidance_scale, output_type="latent"
    ).images  # fmt: skip
    # a student on the same weights must change nothing
    student = model.denoiser.with_lora(LoraSpec(2, 2.0, tuple(model.denoiser.lora_targets)), seed=0)
    for parameter in student.trainable():
        parameter.data.add_(0.1)
    data = made(model, prompts, tmp_path, guidance_scale=guidance_scale)
    found = latents(data)
    assert len(data) == 3
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[0], found[2])  # a repeated prompt has noise of its own


@pytest.mark.parametrize("schedule", [sd_table(), Flow()], ids=["table", "flow"])
def test_guided_latents_of_a_gaussian_are_the_closed_form(schedule: NoiseSchedule, tmp_path: Path):
    model = TwoPrompts(schedule)
    found = latents(made(model, ["0", "1", "1"], tmp_path, resolution=64, guidance_scale=3.0))
    start, grid = noise(3, (2, 8, 8)).double(), schedule.grid(STEPS)
    for i, label in enumerate((0, 1, 1)):
        truth = model.denoiser.guided(label, 2.0)
        multiplier = truth.ddim_multiplier(grid[:-1], grid[1:]).prod()
        expected = truth.mean + multiplier * (start[i] - schedule.alpha(grid[:1]) * truth.mean)
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_batch_is_the_latent_itself_and_has_the_prompts_conditions(tmp_path: Path):
    data = made(TwoPrompts(Flow()), ["0", "1", "0"], tmp_path)
    first, second = (data.batch([1, 2], StepRandom(0, step, [0, 1])) for step in (0, 1))
    torch.testing.assert_close(first.x0, second.x0, rtol=0, atol=0)  # no noise on top
    assert (first.cond["label"].tolist(), first.uncond["label"].tolist()) == ([1, 0], [-1, -1])
    rows = data.rows("latents", range(3))
    assert set(rows) == {"mean", "original", "crop", "prompt"}
    assert (rows["original"].tolist(), rows["crop"].tolist()) == ([[32, 32]] * 3, [[0, 0]] * 3)


def test_an_interrupted_run_goes_on_where_it_was(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = load(TeacherConfig(path=str(pipeline)))
    prompts = [f"picture {i}" for i in range(7)]
    whole = latents(made(model, prompts, tmp_path / "whole"))
    calls, left = [], 5
    original = TeacherLatents._sampled

    def counted(self: TeacherLatents, start: Tensor, cond: Cond) -> Tensor:
        if sum(calls) + len(start) > left:
            raise SystemExit(143)
        calls.append(len(start))
        return original(self, start, cond)

    monkeypatch.setattr(TeacherLatents, "_sampled", counted)
    with pytest.raises(SystemExit):
        made(model, prompts, tmp_path / "cache")
    assert sum(calls) == 4
    calls, left = [], 100
    torch.testing.assert_close(latents(made(model, prompts, tmp_path / "cache")), whole)
    assert sum(calls) == 3
    made(model, prompts, tmp_path / "cache")
    assert sum(calls) == 3


def test_all_that_decides_the_latents_is_in_the_key(
    pipeline: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    model = load(TeacherConfig(path=str(pipeline)))
    options: list[dict[str, Any]] = [
        {}, {"guidance_scale": 2.0}, {"num_inference_steps": 4}, {"seed": 1}, {"resolution": 16},
    ]  # fmt: skip
    found = [latents(made(model, ["a", "b"], tmp_path, **each)) for each in options]
    assert len({tuple(x.flatten()[:8].tolist()) for x in found}) == len(options)
    made(model, ["a", "c"], tmp_path)
    with torch.no_grad():
        next(model.denoiser.module.parameters()).add_(1e-3)
    made(model, ["a", "b"], tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == len(options) + 2


def test_guidance_needs_a_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = TwoPrompts(Flow())
    monkeypatch.setattr(model, "uncond", lambda cond: {})
    with pytest.raises(InputError, match=r"'truth', which cannot be guided; give --data\.guidance_scale 1"):
        made(model, ["0"], tmp_path)
    assert len(made(model, ["0"], tmp_path, guidance_scale=1.0)) == 1


def test_latents_that_are_not_finite_name_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        TeacherLatents, "_sampled", lambda self, start, cond: start / cond["label"][:, None, None, None]
    )
    with pytest.raises(InputError, match="finite latents, got NaN or infinity for '0'"):
        made(TwoPrompts(Flow()), ["1", "0"], tmp_path)


@torch.no_grad()
def test_flux_samples_as_its_own_pipeline_does_told_its_guidance_once(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    from stepdistill.families.flux import pack, unpack

    model: Any = load(TeacherConfig(str(tiny_flux(tmp_path / "flux"))))
    calls: list[int] = []
    model.denoiser.module.register_forward_pre_hook(lambda *_: calls.append(1))
    noise = StepRandom(0, 0, range(2)).normal("teacher latents", model.latent_shape)
    latents = TeacherLatents(model, ["a", "b"], 32, model.latent_shape, [0, 1], 4.0, 3, batch_size=2).make(range(2))
    assert len(calls) == 3
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "flux")  # its scheduler shifts by the size of the image
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        ["a", "b"], num_inference_steps=3, guidance_scale=4.0, latents=pack(noise), height=32, width=32,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(latents.tensors["mean"], unpack(theirs, 4, 4), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sd3_samples_at_the_shift_of_its_scheduler(tmp_path: Path) -> None:
    model = load(TeacherConfig(str(tiny_sd3(tmp_path / "sd3"))))
    times: list[float] = []
    model.denoiser.module.register_forward_pre_hook(
        lambda _, __, given: times.append(given["timestep"][0].item()), with_kwargs=True
    )
    TeacherLatents(model, ["a"], 32, model.latent_shape, [0], 1.0, 4).make(range(1))
    assert times == pytest.approx([1000.0, 900.0, 750.0, 500.0])
    without = load(TeacherConfig(str(tiny_sd3(tmp_path / "even", shift=1.0))))
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "encode_batch_size": 2}
    folders = []
    for place, made_by in (("a", model), ("b", without)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "prompts.txt").write_text("a red circle")
        config = DataConfig(path=str(tmp_path / place / "prompts.txt"), cache_dir=str(tmp_path / "cache"), **options)
        folders.append(cache_latents(made_by, open_source(config), config, progress=False).store.folder)
    assert folders[0] != folders[1]  # another shift makes other latents
