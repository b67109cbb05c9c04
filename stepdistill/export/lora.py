"""A LoRA adapter as one safetensors file that stock Diffusers loads in full and at the right strength.

Two things make it so. The keys are PEFT's own behind the component's name: Diffusers guesses the format from the first
key, and with renamed attention keys beside others it drops most of the adapter with no more than a warning. And rank and
alpha travel as adapter metadata: without it the loader takes alpha = rank, which is another strength.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ExportError, InputError
from ..families import Model, TeacherConfig, load
from ..networks.denoiser import Denoiser
from ..networks.lora import Adapters, LoraSpec
from ..networks.network import Network
from .config import Verify
from .part import Loaded, Part, check_finite

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # where Diffusers' loaders look
GUEST = "export_check"


def adapter_of(student: Network) -> tuple[Adapters, str]:
    """The student's adapters and the name of its own; InputError for a network without."""
    if student.adapters is None or student.adapter is None:
        raise InputError("expected a LoRA student, got a network without an adapter; fix --student.kind lora")
    return student.adapters, student.adapter


@dataclass(frozen=True)
class Layout:
    """How an adapter is written down.

    Attributes:
        file: the file's name.
        key: PEFT's name of a tensor -> its key in the file.
        metadata: of the file.
        extra: (keys, spec) -> tensors that the file holds beside the weights.
    """

    file: str
    key: Callable[[str], str]
    metadata: Callable[[LoraSpec], dict[str, str]]
    extra: Callable[[Iterable[str], LoraSpec], dict[str, Tensor]] = lambda keys, spec: {}


def diffusers_layout(prefix: str = "unet") -> Layout:
    """Diffusers' own, for the pipeline component `prefix`: unet or transformer.

    The metadata is the arguments of PEFT's LoraConfig that are not defaults, as sorted JSON under one key: safetensors
    writes several in random order, and an older PEFT raises for an argument that it does not know.
    """

    def metadata(spec: LoraSpec) -> dict[str, str]:
        config = spec.peft_config()
        arguments = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
        return {METADATA_KEY: json.dumps({f"{prefix}.{k}": v for k, v in arguments.items()}, sort_keys=True)}

    return Layout(WEIGHTS, lambda name: f"{prefix}.{name}", metadata)


def save_lora(
    student: Network, folder: str | Path, dtype: torch.dtype = torch.float32, layout: Layout | None = None
) -> Path:
    """Writes the adapter into `folder` (made if missing), by default as pytorch_lora_weights.safetensors; returns the path.

    Equal weights give equal bytes in Diffusers' layout.

    Args:
        student: a network with an adapter; its weights now are what is saved (enter `ema.applied()` for the average).
        dtype: of the saved weights.
        layout: Diffusers' for a unet by default.
    """
    adapters, name = adapter_of(student)
    spec, layout = adapters.specs[name], layout or diffusers_layout()
    named = {layout.key(key): p for key, p in sorted(adapters.parameters(name).items())}
    check_finite(named.items(), dtype)
    tensors = {key: p.detach().to("cpu", dtype, copy=True).contiguous() for key, p in named.items()}
    path = Path(folder) / layout.file
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **layout.extra(tensors, spec)}, path, metadata=layout.metadata(spec))
    path.chmod(0o644)  # safetensors makes files that only their owner can read
    return path


class AdapterFile(Part):
    """An adapter in one layout.

    Args:
        teacher: where the weights under the adapter came from, for a check that opens them anew.
        layout: of the file.
    """

    def __init__(self, model: Model, student: Denoiser, teacher: TeacherConfig, layout: Layout) -> None:
        super().__init__(model, student)
        self.adapters, adapter = adapter_of(student)
        self.teacher, self.layout, self.name = teacher, layout, layout.file
        self.spec = self.adapters.specs[adapter]
        self.trained = dict(self.adapters.parameters(adapter))
        self.strengths = self.adapters.scalings(adapter)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        save_lora(self.student, folder, dtype, self.layout)

    def written(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        names = {self.layout.key(name): name for name in self.trained}
        extra = self.layout.extra(names, self.spec)
        with safe_open(folder / self.name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                if key not in extra:
                    yield names.get(key, key), file.get_tensor(key)

    @contextlib.contextmanager
    def opened(self, folder: Path, how: Verify) -> Iterator[Loaded]:
        # Diffusers' own file by its folder, as users name it, so that it must be found beside others
        path = folder if self.name == WEIGHTS else folder / self.name
        if how == "shared":
            pipeline = self.model.pipeline(self.student)
            with self.adapters.guest(GUEST, lambda: _load(pipeline, path)):
                yield _loaded(self.student)
        else:
            fresh = load(self.teacher, dtype=_base_dtype(self.student)).to(self.model.device)
            _load(fresh.pipeline(), path)
            yield _loaded(fresh.denoiser)


def _loaded(network: Denoiser) -> Loaded:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {n: m for n, m in network.module.named_modules() if isinstance(m, BaseTunerLayer)}
    strengths = {n: float(m.scaling[GUEST]) for n, m in layers.items() if GUEST in m.scaling}
    weights = (p for n, p in network.module.named_parameters() if f".{GUEST}." in n)
    return Loaded(network, next(weights).dtype, strengths)


def _base_dtype(network: Denoiser) -> torch.dtype:
    return next(p for n, p in network.module.named_parameters() if "lora_" not in n).dtype


class _NoTextEncoderKeys(logging.Filter):
    """Drops the loader's line about an adapter that has nothing for a text encoder."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")


def _load(pipeline: Any, path: Path) -> None:
    logger, quiet = logging.getLogger("diffusers.loaders.lora_base"), _NoTextEncoderKeys()
    logger.addFilter(quiet)
    try:
        pipeline.load_lora_weights(str(path), adapter_name=GUEST)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ExportError(f"Diffusers does not load the adapter in {path}: {error}") from error
    finally:
        logger.removeFilter(quiet)
