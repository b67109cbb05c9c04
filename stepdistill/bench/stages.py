"""Where the seconds of a call go: text encoders, denoiser, decoding, the rest; and what the denoiser really ran.

To time a part, the accelerator has to be synchronised on both sides of it, which keeps the host from queuing work ahead: a
call timed by parts takes longer than the same call left alone. So the seconds of a table come from calls without hooks
(`latency.measure`), and the shares from separate calls here, whose `total` serves to compare their own parts with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import nn

from .generate import denoiser_of
from .latency import count_evaluations, synchronise

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

TEXT = "text_encoder"  # and text_encoder_2, ...: how Diffusers names them
AUTOENCODERS = ("vae", "vqvae", "vqgan", "movq")


@dataclass(frozen=True)
class Stages:
    """One call, timed by parts; seconds, whose four parts add up to the total.

    Attributes:
        total: of this call, slowed by the synchronisation around each part.
        text: forwards of all text encoders; tokenising is in the rest.
        denoiser: forwards of the unet or transformer.
        decode: the autoencoder's `decode`, all its tiles and slices.
        rest: scheduler, tokenisers, transfers, images to bytes, and every other network (image encoders, ControlNets, ...).
        evaluations: batch rows through the denoiser, over the images made: 2 a step where guidance takes two.
        calls: forwards of the denoiser, which stacks the rows of a batch and of both conditions.
    """

    total: float
    text: float
    denoiser: float
    decode: float
    rest: float
    evaluations: float
    calls: int


class _Stopwatch:
    """Seconds by stage. A part inside another one belongs to the outer one, so nothing is counted twice."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("text", "denoiser", "decode"), 0.0)
        self._depth = 0
        self._start = 0.0

    def enter(self) -> None:
        if self._depth == 0:
            synchronise()
            self._start = time.perf_counter()
        self._depth += 1

    def leave(self, stage: str) -> None:
        self._depth -= 1
        if self._depth == 0:
            synchronise()
            self.seconds[stage] += time.perf_counter() - self._start

    @contextmanager
    def forwards(self, module: nn.Module, stage: str) -> Iterator[None]:
        """Times the module's forwards, first hook to last, so that moves to the device and back count too."""

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self.leave(stage)

        handles = [
            module.register_forward_pre_hook(lambda _module, _args: self.enter(), prepend=True),
            # also after an error, which a pipeline may catch: the stopwatch must not stay inside
            module.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def decoding(self, autoencoder: Any) -> Iterator[None]:
        """Times `decode`, a plain method that hooks don't see, by a wrapper that shadows it on the instance."""
        shadow = vars(autoencoder).get("decode")  # someone else's wrapper, e.g. a compiled decode
        decode = autoencoder.decode

        @wraps(decode)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return decode(*args, **kwargs)
            finally:
                self.leave("decode")

        autoencoder.decode = timed
        try:
            yield
        finally:
            if shadow is None:
                del autoencoder.decode
            else:
                autoencoder.decode = shadow


def timed_call(pipe: DiffusionPipeline, call: Callable[[], object]) -> Stages:
    """Runs `call` once with every part of the pipeline timed; everything is put back afterwards, also after an error.

    Synchronising inside a call makes it slower: take the seconds of a call from `latency.measure`, from here the shares. Warm
    up first.

    Args:
        pipe: a stock pipeline; parts it doesn't have (pixel pipelines have no text encoder, no autoencoder) take 0 seconds.
        call: runs the pipeline and returns its images: a sequence of them, or the pipeline's own output.

    Raises:
        InputError: the pipeline has neither a unet nor a transformer.
        ValueError: no images came back, or the denoiser made them without running its hooks (`module.compile()` skips them;
            `torch.compile(module)` doesn't), so that there is nothing to report.
    """
    watch, denoiser, parts = _Stopwatch(), denoiser_of(pipe), pipe.components
    with ExitStack() as stack:
        count = stack.enter_context(count_evaluations(denoiser))
        stack.enter_context(watch.forwards(denoiser, "denoiser"))
        for name, part in parts.items():
            if name.startswith(TEXT) and isinstance(part, nn.Module):
                stack.enter_context(watch.forwards(part, "text"))
            elif name in AUTOENCODERS and isinstance(part, nn.Module):
                stack.enter_context(watch.decoding(part))
        synchronise()
        start = time.perf_counter()
        result = call()
        synchronise()
        total = time.perf_counter() - start
    images = _images(result)
    if not count.calls:
        raise ValueError("expected a call that runs the pipeline's denoiser through its hooks, got 0 forwards of it")
    text, denoising, decode = watch.seconds.values()
    rest = total - text - denoising - decode
    return Stages(total, text, denoising, decode, rest, count.samples / images, count.calls)


def _images(result: object) -> int:
    """How many images a call returned."""
    if isinstance(result, Mapping):  # a pipeline's output, whose own length is that of its fields
        result = result.get("images")
    elif isinstance(result, tuple):  # the same with return_dict=False
        result = result[0] if result else None
    if not isinstance(result, Sized) or not len(result):
        raise ValueError(f"expected a call that returns its images, got {type(result).__name__}; return them")
    return len(result)
