"""The parts of a call, exact to the second on a clock of our own; real pipelines keep their images and lose their hooks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline
from tiny_pixels import tiny_pixels
from tiny_sdxl import tiny_sdxl
from torch import Tensor, nn

from stepdistill.bench import stages
from stepdistill.bench.generate import generate
from stepdistill.bench.stages import Stages, timed_call
from stepdistill.errors import InputError


class Device:
    """A clock that stands still until the queued work is waited for."""

    def __init__(self) -> None:
        self.now, self.queued = 0.0, 0.0

    def queue(self, seconds: float) -> None:
        self.queued += seconds

    def synchronise(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    monkeypatch.setattr(stages, "synchronise", device.synchronise)
    return device


class Work(nn.Module):
    """Queues its seconds, then runs what is inside."""

    def __init__(self, device: Device, seconds: float, inner: Callable[[Tensor], object] | None = None) -> None:
        super().__init__()
        self.device, self.seconds = device, seconds
        object.__setattr__(self, "inner", inner)

    def forward(self, x: Tensor) -> Tensor:
        self.device.queue(self.seconds)
        if self.inner is not None:
            self.inner(x)
        return x


class Autoencoder(Work):
    def decode(self, x: Tensor, again: bool = True) -> Tensor:
        self.device.queue(self.seconds)
        if again:
            self.decode(x, again=False)
        return x


def pipeline(**parts: Any) -> Any:
    return SimpleNamespace(components=parts)


def test_parts_by_hand(device: Device) -> None:
    text, text_2, other = Work(device, 1.0), Work(device, 2.0), Work(device, 64.0)
    net, vae = Work(device, 4.0), Autoencoder(device, 8.0)
    pipe = pipeline(text_encoder=text, text_encoder_2=text_2, unet=net, vae=vae, image_encoder=other, scheduler="ddim")

    def call() -> list[int]:
        x = torch.zeros(6, 2)
        text(x)
        text_2(x)
        other(x)
        device.queue(0.5)
        for _ in range(5):
            net(x)
        device.queue(0.25)
        vae.decode(x)
        vae(x)  # encoding is no decoding
        return [0, 1, 2]

    device.queue(1000.0)  # what ran before is not part of the call
    expected = Stages(
        total=3 + 64 + 0.5 + 20 + 0.25 + 24, text=3.0, denoiser=20.0, decode=16.0, rest=72.75, evaluations=10.0, calls=5
    )
    assert timed_call(pipe, call) == expected


def test_a_part_inside_another_counts_once_for_the_outer(device: Device) -> None:
    text = Work(device, 1.0)
    vae = Autoencoder(device, 2.0, inner=text)
    net = Work(device, 4.0, inner=lambda x: (text(x), vae.decode(x)))
    pipe = pipeline(text_encoder=text, text_encoder_2=text, transformer=net, vae=vae)

    def call() -> list[int]:
        net(torch.zeros(1, 2))
        text(torch.zeros(1, 2))
        return [0]

    found = timed_call(pipe, call)
    assert (found.text, found.denoiser, found.decode, found.rest) == (1.0, 9.0, 0.0, 0.0)
    assert (found.total, found.calls) == (10.0, 1)


def test_hooks_that_were_there_count_with_their_part(device: Device) -> None:
    net = Work(device, 4.0)  # offloading moves a network to the device and back in hooks
    net.register_forward_pre_hook(lambda *_: device.queue(16.0))
    net.register_forward_hook(lambda *_: device.queue(32.0))
    assert timed_call(pipeline(unet=net), lambda: [net(torch.zeros(1, 2))]).denoiser == 52.0


def fail(_x: Tensor) -> None:
    raise RuntimeError("broken")


def test_an_error_that_the_pipeline_survives(device: Device) -> None:
    text, net = Work(device, 1.0, inner=fail), Work(device, 4.0)
    pipe = pipeline(text_encoder=text, unet=net)

    def call() -> list[int]:
        with pytest.raises(RuntimeError, match="broken"):
            text(torch.zeros(1, 2))
        net(torch.zeros(1, 2))
        return [0]

    found = timed_call(pipe, call)
    assert (found.text, found.denoiser, found.total) == (1.0, 4.0, 5.0)


def bare(*modules: nn.Module) -> bool:
    """No hooks left, no wrapped decode."""
    return not any(m._forward_hooks or m._forward_pre_hooks or "decode" in vars(m) for m in modules)


def test_an_error_leaves_nothing_behind(device: Device) -> None:
    text, net, vae = Work(device, 1.0), Work(device, 1.0, inner=fail), Autoencoder(device, 1.0)
    with pytest.raises(RuntimeError, match="broken"):
        timed_call(pipeline(text_encoder=text, unet=net, vae=vae), lambda: net(torch.zeros(1, 2)))
    assert bare(text, net, vae)


def test_a_decode_that_fails_and_was_wrapped_already(device: Device) -> None:
    net, vae = Work(device, 4.0), Autoencoder(device, 2.0)

    def refuse(x: Tensor) -> Tensor:
        device.queue(16.0)
        raise RuntimeError("no decoding")

    vae.decode = refuse

    def call() -> list[int]:
        with pytest.raises(RuntimeError, match="no decoding"):
            vae.decode(torch.zeros(1, 2))
        net(torch.zeros(1, 2))
        return [0]

    found = timed_call(pipeline(unet=net, vae=vae), call)
    assert (found.decode, found.denoiser, found.rest) == (16.0, 4.0, 0.0)
    assert vae.decode is refuse  # the wrapper that was there is back


def test_pixel_pipelines_have_no_text_and_no_decoding(device: Device) -> None:
    net = Work(device, 4.0)

    def call() -> list[int]:
        net(torch.zeros(2, 2))
        return [0, 1]

    pipe = pipeline(unet=net, text_encoder=None, vae=None, scheduler="ddim")
    assert timed_call(pipe, call) == Stages(4.0, 0.0, 4.0, 0.0, 0.0, 1.0, 1)


@pytest.mark.parametrize(
    "images", [[1, 2], np.zeros((2, 4, 4, 3)), torch.zeros(2, 3, 4, 4), {"images": [1, 2], "flags": None}, ([1, 2],)]
)
def test_evaluations_are_per_image_however_they_come(device: Device, images: Any) -> None:
    net = Work(device, 1.0)
    assert timed_call(pipeline(unet=net), lambda: (net(torch.zeros(6, 2)), images)[1]).evaluations == 3.0


@pytest.mark.parametrize("images", [None, [], {"sample": [1]}, ()])
def test_calls_without_images(device: Device, images: Any) -> None:
    net = Work(device, 1.0)
    with pytest.raises(ValueError, match="returns its images"):
        timed_call(pipeline(unet=net), lambda: (net(torch.zeros(6, 2)), images)[1])


def test_a_denoiser_that_hooks_do_not_see(device: Device) -> None:
    net = Work(device, 1.0)
    with pytest.raises(ValueError, match="0 forwards"):
        timed_call(pipeline(unet=net), lambda: [net.forward(torch.zeros(1, 2))])
    with pytest.raises(InputError, match="unet or a transformer"):
        timed_call(pipeline(vae=net), lambda: [0])


def tick(device: Device, module: nn.Module, seconds: float) -> Any:
    """Makes a real module's forward take so many seconds of the fake clock."""
    return module.register_forward_hook(lambda *_: device.queue(seconds))


@pytest.mark.parametrize(("make", "guidance", "encodings"), [(tiny_pipeline, 3.0, 2), (tiny_sdxl, 1.0, 1)])
def test_stock_pipelines(tmp_path: Path, device: Device, make: Any, guidance: float, encodings: int) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(make(tmp_path))

    def images() -> np.ndarray:
        return generate(pipe, ["a", "b", "c"], steps=4, guidance_scale=guidance, seed=0, batch_size=2)

    plain = images()
    parts = [(pipe.unet, 100.0), (pipe.vae.decoder, 1000.0), (pipe.text_encoder, 1.0)]
    if make is tiny_sdxl:
        parts.append((pipe.text_encoder_2, 10.0))
    handles, made = [tick(device, *part) for part in parts], []
    found = timed_call(pipe, lambda: made.append(images()) or made[0])
    for handle in handles:
        handle.remove()
    batches = 2
    text = batches * encodings * (11.0 if make is tiny_sdxl else 1.0)
    assert (found.text, found.denoiser, found.decode, found.rest) == (text, batches * 400.0, batches * 1000.0, 0.0)
    assert (found.calls, found.evaluations) == (8, 4.0 * encodings)
    np.testing.assert_array_equal(made[0], plain)
    assert bare(*(part for part, _ in parts), pipe.vae)


def test_a_stock_pixel_pipeline_on_the_real_clock(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    pipe = DDPMPipeline.from_pretrained(tiny_pixels(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    found = timed_call(pipe, lambda: pipe(batch_size=2, num_inference_steps=3, output_type="np"))
    assert (found.text, found.decode, found.calls, found.evaluations) == (0.0, 0.0, 3, 3.0)
    assert 0 < found.denoiser < found.total
    assert found.denoiser + found.rest == pytest.approx(found.total)
