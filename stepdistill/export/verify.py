"""Every export is loaded back by stock Diffusers and compared with the student it came from, or it does not count.

Four comparisons, from the cheapest to the one that matters: the file's tensors, the modules that the loader filled, the
strength in each, and the output of the network on the same latents, timestep and embeddings, without autocast.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..batch import Cond, move
from ..families import Model, TeacherConfig, load
from ..networks.denoiser import Denoiser
from .config import Verify
from .lora import WEIGHTS, adapter_of

GUEST = "export_check"
HALF_TOLERANCE = (
    0.02  # of the largest output: PEFT computes B A in the adapter's dtype, so half precision rounds on its way
)
SHOWN = 5  # names in a message


class ExportError(RuntimeError):
    """An export that does not load back as what was trained; the message says how far off it is and where."""


def verify(folder: str | Path, model: Model, student: Denoiser, teacher: TeacherConfig, how: Verify = "shared") -> None:
    """Loads the adapter in `folder` through the stock pipeline's `load_lora_weights` and compares it with `student`.

    Outputs must be equal to the bit. Where the file or the base is in half precision, so that the adapter is rounded on its
    way, the student is rounded in the same way for the comparison.

    Args:
        folder: holds pytorch_lora_weights.safetensors.
        model: the teacher that the student shares its weights with.
        teacher: where those weights came from, for "full".
        how: "shared" adds the adapter to the student's own module and takes it off again, which leaves no trace;
            "full" opens the base anew, so that it also sees weights that changed in memory; "none" does nothing.

    Raises:
        ExportError: for a missing or unexpected tensor or module, another strength, or another output.
    """
    if how == "none":
        return
    adapters, name = adapter_of(student)
    student = copy.copy(student)
    student.net = student.module  # no wrapper: one process of several may be alone here
    pipeline: Any = model.pipeline(student)
    prefix = component(pipeline)
    saved = _compare_tensors(Path(folder), {f"{prefix}.{k}": p for k, p in adapters.parameters(name).items()})
    inputs = probe(model)
    if how == "shared":
        with _as_sampled(student), adapters.guest(GUEST, lambda: _load(pipeline, folder)):
            found, loaded, dtype = student.call(*inputs), adapters.scalings(GUEST), _dtype(student, GUEST)
    else:
        fresh = load(teacher, dtype=_dtype(student)).to(inputs[0].device)
        _load(fresh.pipeline(), folder)
        with _as_sampled(fresh.denoiser):
            found, loaded, dtype = (
                fresh.denoiser.call(*inputs),
                _scalings(fresh.denoiser),
                _dtype(fresh.denoiser, GUEST),
            )
    _compare_scalings(loaded, adapters.scalings(name))
    with _as_sampled(student), _rounded(adapters.parameters(name).values(), saved, dtype):
        _compare_outputs(found, student.output(*inputs))


def component(pipeline: Any) -> str:
    """The part of a stock pipeline that a denoiser's adapter is loaded into: "unet" or "transformer"."""
    return "transformer" if "transformer" in pipeline.components else "unet"


def probe(model: Model) -> tuple[Tensor, Tensor, Cond]:
    """(x_t [2, C, H, W], t [2], cond): the same inputs each time, one at the noisy end and one in the middle."""
    parameter = next(model.denoiser.module.parameters())
    draws = torch.Generator().manual_seed(0)
    x_t = torch.randn((2, *model.latent_shape), generator=draws).to(parameter.device)
    grid = model.denoiser.schedule.grid(50)
    return x_t, grid[[0, 25]], move(model.encode_prompts(["a", "another one"]), parameter.device)


@contextlib.contextmanager
def _as_sampled(network: Denoiser) -> Iterator[None]:
    """No gradient, no autocast, no dropout; the module's mode is put back."""
    module, training = network.module, network.module.training
    device = next(module.parameters()).device.type
    try:
        module.eval()
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        module.train(training)


def _dtype(network: Denoiser, adapter: str | None = None) -> torch.dtype:
    """The dtype of the base's weights, or of an adapter's."""
    named = network.module.named_parameters()
    return next(p for n, p in named if (f".{adapter}." in n if adapter else "lora_" not in n)).dtype


@contextlib.contextmanager
def _rounded(parameters: Iterable[nn.Parameter], saved: torch.dtype, loaded: torch.dtype) -> Iterator[None]:
    """Within it the parameters are what a file in `saved` makes of them in a module that holds them in `loaded`."""
    trained = [(p, p.data) for p in parameters]
    try:
        for parameter, data in trained:
            parameter.data = data.to(saved).to(loaded)
        yield
    finally:
        for parameter, data in trained:
            parameter.data = data


class _NoTextEncoderKeys(logging.Filter):
    """Drops the loader's one line about an adapter that has nothing for the text encoder."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")


def _load(pipeline: Any, folder: str | Path) -> None:
    logger, quiet = logging.getLogger("diffusers.loaders.lora_base"), _NoTextEncoderKeys()
    logger.addFilter(quiet)
    try:
        pipeline.load_lora_weights(str(folder), adapter_name=GUEST)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ExportError(f"Diffusers does not load the adapter in {folder}: {error}") from error
    finally:
        logger.removeFilter(quiet)


def _scalings(network: Denoiser) -> dict[str, float]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {n: m for n, m in network.module.named_modules() if isinstance(m, BaseTunerLayer)}
    return {n: float(m.scaling[GUEST]) for n, m in layers.items() if GUEST in m.scaling}


def _some(names: Any) -> str:
    names = sorted(names)
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _compare_names(what: str, found: set[str], expected: set[str]) -> None:
    if missing := expected - found:
        raise ExportError(
            f"{len(missing)} of {len(expected)} trained {what} are missing in the export: {_some(missing)}"
        )
    if extra := found - expected:
        raise ExportError(f"the export has {len(extra)} {what} that were not trained: {_some(extra)}")


def _compare_tensors(folder: Path, trained: dict[str, Any]) -> torch.dtype:
    """The file's dtype, when each of its tensors is the trained one in it."""
    try:
        saved = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"expected an adapter in {folder / WEIGHTS}, got: {error}") from error
    _compare_names("tensors", set(saved), set(trained))
    off: dict[str, float] = {}
    for key, value in saved.items():
        weight = trained[key].detach().cpu().to(value.dtype)
        if value.shape != weight.shape:
            raise ExportError(f"{key} has shape {tuple(value.shape)} in the export, {tuple(weight.shape)} in training")
        if not torch.equal(value, weight):
            off[key] = (value.double() - weight.double()).abs().max().item()
    if off:
        raise ExportError(
            f"{len(off)} of {len(saved)} tensors of the export differ from the trained ones, by up to "
            f"{max(off.values()):.3g}: {_some(off)}"
        )
    return next(iter(saved.values())).dtype


def _compare_scalings(loaded: dict[str, float], trained: dict[str, float]) -> None:
    _compare_names("modules", set(loaded), set(trained))
    off = {n: f"{n} ({loaded[n]:g} instead of {trained[n]:g})" for n in trained if loaded[n] != trained[n]}
    if off:
        raise ExportError(f"{len(off)} of {len(trained)} modules load at another strength: {_some(off.values())}")


def _compare_outputs(found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected):  # nan is unequal too
        difference = (found.double() - expected.double()).abs().max().item()
        raise ExportError(
            f"the loaded adapter computes something else: outputs differ by up to {difference:.3g} where the largest "
            f"is {expected.abs().max().item():.3g}, though tensors, modules and strengths agree; is the base model another "
            "one, or were its weights changed?"
        )
