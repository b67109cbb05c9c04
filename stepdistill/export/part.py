"""One thing in an export, an adapter file or a network's folder: how it is written, and how stock Diffusers opens it.

Each kind has a file of its own here; :mod:`.verify` compares all of them in the same way.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..families import Model
from ..networks.denoiser import Denoiser
from .config import Verify


@dataclass(frozen=True)
class Loaded:
    """What Diffusers made of a part.

    Attributes:
        network: computes with it.
        dtype: that its weights are held in.
        strengths: module name -> the factor on its adapter; {} for a network of its own.
    """

    network: Denoiser
    dtype: torch.dtype
    strengths: dict[str, float]


class Part(ABC):
    """A student as it is exported.

    Args:
        model: the teacher, opened.
        student: the network to export.

    Attributes:
        name: of the file or folder, in the export's folder.
        trained: the student's tensors by name; the live ones, which :mod:`.verify` rounds for a moment.
        strengths: of its adapter, as in :class:`Loaded`.
        source: the network that trained, where `student` is another one made of it; its outputs must be near.
    """

    name: str
    trained: dict[str, Tensor]
    strengths: dict[str, float]
    source: Denoiser | None = None

    def __init__(self, model: Model, student: Denoiser) -> None:
        self.model, self.student = model, copy.copy(student)
        self.student.net = student.module  # no wrapper: one process of several may be alone here

    @abstractmethod
    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes it under its name into `folder` (made if missing), weights in `dtype`; InputError for nan or inf."""

    @abstractmethod
    def written(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """The tensors in what was saved, by the student's own names; what has none there keeps its name in the file."""

    @abstractmethod
    def opened(self, folder: Path, how: Verify) -> AbstractContextManager[Loaded]:
        """Within it, what was saved is loaded by stock Diffusers; ExportError where that does not work."""


def files_of(part: Part, folder: Path) -> list[Path]:
    """The weight files of a part that was saved in `folder`."""
    path = folder / part.name
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def component(pipeline: Any) -> str:
    """The part of a stock pipeline that is its denoiser: "unet" or "transformer"."""
    return "transformer" if "transformer" in pipeline.components else "unet"


def absent(pipeline: Any) -> list[str]:
    """Parts that the pipeline's class asks for and this one has none of, such as SD3's T5: to be named when it is opened."""
    return [n for n, part in pipeline.components.items() if part is None and n not in pipeline._optional_components]


def check_finite(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """InputError where a tensor is nan or inf, as weights beyond float16's range are in it."""
    named = list(tensors)
    bad = [name for name, value in named if not bool(torch.isfinite(value.detach().to(dtype)).all())]
    if bad:
        raise InputError(
            f"expected finite weights, got nan or inf as {dtype} in {len(bad)} of {len(named)} tensors, first {bad[0]}; "
            "export an earlier checkpoint, or --export.dtype fp32"
        )
