"""The demo teacher's stages in order, each a resumable run that ends with a check: judge, eye, text, autoencoder, UNet.

A stage starts from random weights, or from those of an earlier teacher: `start` is a folder with `teacher/`, `judge/` and
`eye/` in it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bench.judge import Judge
from ..data.config import DataConfig
from ..data.latents import cache_latents
from ..data.open import open_source
from ..families.unet import StableDiffusion, UNet
from ..method import Method
from ..methods.denoising import Denoising, DenoisingConfig
from ..randomness import StepRandom
from ..training.config import TrainConfig
from ..training.trainer import Trainer
from . import eye, stages, teacher
from .world import EYE_SEED, TEST_SEED, TRAIN_SEED, World

CHECKED = 2000  # images or captions of the test seed in each stage's check
SCALED = 1000  # images of the training seed whose latents get unit std


def made(seed: int, build: Callable[[], Any]) -> Any:
    """What `build` returns, its weights initialised from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _going_on(module: Any) -> Any:
    """A loaded module, ready to be trained further."""
    return module.float().requires_grad_(True).train()


def _fit(config: TrainConfig, folder: Path, method: Method, data: Any) -> None:
    Trainer(config, folder).fit(method, data)
    for network in method.networks().values():
        network.module.requires_grad_(False).eval()


def make_judge(config: TrainConfig, folder: Path, images: int, start: Path | None = None) -> Judge:
    """The judge, trained and written to `folder`; prints its accuracy on clean renders."""
    judge: Judge = _going_on(Judge.load(start / "judge")) if start else made(config.seed, teacher.judge)
    _fit(config, folder, stages.Judging(stages.JudgingConfig(), judge), stages.WorldPixels(World(TRAIN_SEED), images))
    judge.standardise(World(TRAIN_SEED).pixels(range(CHECKED)))
    test = World(TEST_SEED)
    scores = stages.attribute_accuracy(judge, test.pixels(range(CHECKED)), test.labels(range(CHECKED)))
    print(f"judge on {CHECKED} clean renders: {_shown(scores)}")
    judge.save(folder)
    return judge


def make_eye(config: TrainConfig, folder: Path, images: int, start: Path | None = None) -> Any:
    """What a discriminator of pictures looks through, trained and written to `folder`; prints how it draws what is hidden."""
    from transformers import Dinov2Model

    backbone = _going_on(Dinov2Model.from_pretrained(start / "eye")) if start else made(config.seed, eye.eye)
    method = made(config.seed + 1, lambda: eye.Masking(eye.MaskingConfig(), backbone))
    _fit(config, folder, method, stages.WorldPixels(World(EYE_SEED), images))
    test = stages.WorldPixels(World(TEST_SEED), CHECKED).batch(range(CHECKED), StepRandom(0, 0, range(CHECKED)))
    print(f"eye on {CHECKED} pictures: {eye.hidden_error(method, test):.4f} from what is hidden")
    eye.save(folder, backbone)
    return backbone


def make_text(config: TrainConfig, folder: Path, captions: int, start: Path | None = None) -> Any:
    """The text model, trained and written to `folder`; prints how many captions it reads."""
    from transformers import CLIPTextModel

    tokenizer = teacher.tokenizer()
    if start:
        text = _going_on(CLIPTextModel.from_pretrained(start / "teacher" / "text_encoder"))
    else:
        text = made(config.seed, lambda: teacher.text_model(tokenizer))
    method = made(config.seed + 1, lambda: stages.TextNaming(stages.TextNamingConfig(), text, tokenizer))
    _fit(config, folder, method, stages.WorldCaptions(World(TRAIN_SEED), captions, tokenizer))
    test = stages.WorldCaptions(World(TEST_SEED), CHECKED, tokenizer)
    extra = test.batch(range(CHECKED), None).extra  # type: ignore[arg-type]  # no randomness in captions
    accuracy = stages.text_accuracy(method.student.module, extra["input_ids"], extra["labels"])
    print(f"text model names all attributes of {accuracy:.2%} of {CHECKED} captions")
    text.save_pretrained(folder / "text_encoder")
    return text


def make_autoencoder(
    config: TrainConfig, decoder: TrainConfig, folder: Path, images: int, judge: Judge, start: Path | None = None
) -> Any:
    """The autoencoder, trained and written to `folder`; prints what the judge reads in its reconstructions.

    All of it first, then its decoder alone with an error that is dear where shapes are. The second run leaves the latents as
    they are, so it may be made, or made anew, beside or after the denoiser's.
    """
    from diffusers import AutoencoderKL

    if start:
        vae = _going_on(AutoencoderKL.from_pretrained(start / "teacher" / "vae"))
    else:
        vae = made(config.seed, teacher.autoencoder)
    pixels = stages.WorldPixels(World(TRAIN_SEED), images)
    whole = stages.AutoencodingConfig(l1_weight=1.0, l2_weight=1.0, edge_weight=0.5)
    _fit(config, folder, stages.Autoencoding(whole, vae), pixels)
    if not start:  # a denoiser that is trained further knows the latents at the scale they had
        stages.set_scaling_factor(vae, World(TRAIN_SEED).pixels(range(SCALED)))
    _check_autoencoder(vae, judge)
    vae.decoder.requires_grad_(True)
    refined = stages.AutoencodingConfig(l1_weight=1.0, l2_weight=2.0, edge_weight=0.5, kl_weight=0.0)
    _fit(decoder, folder / "decoder", stages.Autoencoding(refined, vae), pixels)
    _check_autoencoder(vae, judge)
    vae.save_pretrained(folder / "vae")
    return vae


def _check_autoencoder(vae: Any, judge: Judge) -> None:
    test = World(TEST_SEED)
    scores = stages.reconstruction_accuracy(judge, vae, test.pixels(range(CHECKED)), test.labels(range(CHECKED)))
    print(f"judge on {CHECKED} reconstructions: {_shown(scores)}; scaling factor {vae.config.scaling_factor:.4f}")


def make_unet(
    config: TrainConfig, folder: Path, images: int, text: nn.Module, vae: nn.Module, start: Path | None = None
) -> Any:
    """The denoiser on the other stages' latents and embeddings."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    if start:
        unet = _going_on(UNet2DConditionModel.from_pretrained(start / "teacher" / "unet"))
    else:
        unet = made(config.seed, teacher.unet)
    parts = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=teacher.tokenizer(), unet=unet, scheduler=teacher.scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    model = StableDiffusion(parts, "demo")
    pictures = DataConfig(demo_images=images, encode_batch_size=100, cache_dir=str(folder / "cache"))
    data = cache_latents(model, open_source(pictures), pictures)
    student = UNet(unet.requires_grad_(True).train(), model.denoiser.table, "v")
    _fit(config, folder, Denoising(DenoisingConfig(), student), data)
    unet.save_pretrained(folder / "unet")
    return unet


def _shown(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
