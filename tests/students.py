"""Students of the tiny pipelines, with weights that are not zero, for the tests of networks, export and command line."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.families import Model, TeacherConfig, load
from stepdistill.families.unet import LCM_TARGETS
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.lora import LoraSpec, StudentConfig
from stepdistill.networks.network import Network

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MODULES = {ATTENTION: 32, LCM_TARGETS: 79}  # of the tiny UNet that have these names


@functools.cache
def _loaded(base: Path, dtype: torch.dtype) -> Model:
    return load(TeacherConfig(str(base)), dtype)


def opened(base: Path, dtype: torch.dtype = torch.float32) -> Model:
    """The checkpoint, opened; a copy of its own for each caller, since adapters go into the modules."""
    return copy.deepcopy(_loaded(base, dtype))


def randomised(network: Network, seed: int = 3, scale: float = 0.1) -> None:
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.trainable():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=draws))


def student_of(
    model: Model, rank: int = 4, alpha: float = 4, targets: Sequence[str] = LCM_TARGETS, seed: int = 3
) -> Denoiser:
    student = model.denoiser.with_lora(LoraSpec(rank, alpha, tuple(targets)))
    randomised(student, seed)
    return student


def full_student_of(model: Model, embed_guidance: bool = True, seed: int = 3) -> Any:
    """A full student whose weights have moved a little, its guidance input too."""
    student = model.denoiser.student(StudentConfig(kind="full"), embed_guidance=embed_guidance)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.trainable():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=draws))
    return student


def inputs(seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    x_t = torch.randn((batch, 4, 4, 4), generator=draws)
    embeds = torch.randn((batch, 24, 16), generator=draws)
    return x_t, torch.linspace(1.0, 0.4, batch, dtype=torch.float64), {"prompt_embeds": embeds}


@torch.no_grad()
def look(network: Denoiser) -> Tensor:
    return network.output(*inputs())


@torch.no_grad()
def run_unet(unet: Any) -> Tensor:
    """The same as :func:`look` with a stock UNet."""
    x_t, t, cond = inputs()
    out: Tensor = unet(x_t, (1000 * t - 1).float(), encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]
    return out


@torch.no_grad()
def look_at(model: Model, network: Denoiser, guidance: float | None = None) -> Tensor:
    """What a network of any family computes on noise."""
    x_t = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(1))
    cond = model.conditions(model.examples)
    if guidance is not None:
        cond["guidance"] = torch.full((2,), guidance)
    return network.output(x_t, torch.tensor([1.0, 0.4], dtype=torch.float64), cond)


def train(student: Denoiser, steps: int = 3) -> None:
    """A few optimizer steps towards nothing in particular, with the teacher's kind of loss."""
    optimizer = torch.optim.AdamW(student.trainable(), lr=1e-2)
    for step in range(steps):
        loss = student.output(*inputs(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@contextlib.contextmanager
def log_lines(*names: str) -> Iterator[list[str]]:
    """What these loggers say meanwhile; diffusers' and transformers' don't pass anything on to the root logger."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep(logging.WARNING)
    loggers = [
        logging.getLogger(name) for name in names or ("diffusers", "transformers", "peft", "huggingface_hub", "")
    ]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield lines
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
