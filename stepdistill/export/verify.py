"""Every export is loaded back by stock Diffusers and compared with the student it came from, or it does not count.

Four comparisons, from the cheapest to the one that matters: the file's tensors, the modules that the loader filled, the
strength in each, and the output of the network on the same inputs, without autocast. One path for all kinds of
:class:`~.part.Part`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..batch import Cond, move
from ..errors import ExportError
from ..families import Model
from ..networks.denoiser import Denoiser
from .config import Verify
from .part import Part

GUIDANCES = (2.0, 8.0)  # at which a student that is told its guidance is compared
SHOWN = 5  # names in a message


def verify(part: Part, folder: str | Path, how: Verify = "shared") -> None:
    """Loads what `part` saved in `folder` through stock Diffusers and compares it with the student.

    Outputs must be equal to the bit. Where the file or the base is in half precision, so that weights are rounded on their
    way, the student is rounded in the same way for the comparison.

    Args:
        part: what was saved; it knows the student and how to open it.
        folder: where it lies.
        how: "shared" adds an adapter to the student's own module and takes it off again, which leaves no trace; "full"
            opens its base anew, so that it also sees weights that changed in memory; "none" does nothing. A full student
            has no base: it is opened anew either way.

    Raises:
        ExportError: for a missing or unexpected tensor or module, another strength, or another output.
    """
    if how == "none":
        return
    saved = _compare_tensors(part, Path(folder))
    inputs = probes(part.model, part.student)
    with part.opened(Path(folder), how) as loaded, _as_sampled(loaded.network):
        found = [loaded.network.call(*given) for given in inputs]
    _compare_strengths(loaded.strengths, part.strengths)
    with _as_sampled(part.student), _rounded(part.trained.values(), saved, loaded.dtype):
        for output, given in zip(found, inputs, strict=True):
            _compare_outputs(output, part.student.output(*given))
    if part.source is not None:
        with _as_sampled(part.student), _as_sampled(part.source):
            for given in inputs:
                _compare_merged(part.student.output(*given), part.source.output(*given), part.model.denoiser.module)


def probes(model: Model, student: Denoiser) -> list[tuple[Tensor, Tensor, Cond]]:
    """(x_t [2, C, H, W], t [2], cond), the same inputs each time: one at the noisy end and one in the middle.

    One entry, or for a student that is told its guidance one for each of `GUIDANCES`.
    """
    device = next(student.module.parameters()).device
    draws = torch.Generator().manual_seed(0)
    x_t = torch.randn((2, *model.latent_shape), generator=draws).to(device)
    t = student.schedule.grid(50)[[0, 25]]
    cond = move(model.conditions(model.examples), device)
    if not student.takes_guidance:
        return [(x_t, t, cond)]
    return [(x_t, t, {**cond, "guidance": torch.full((2,), scale)}) for scale in GUIDANCES]


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


@contextlib.contextmanager
def _rounded(tensors: Iterable[Tensor], saved: torch.dtype, loaded: torch.dtype) -> Iterator[None]:
    """Within it the tensors are what a file in `saved` makes of them in a module that holds them in `loaded`."""
    trained = [(t, t.data) for t in tensors if t.is_floating_point()]
    try:
        for tensor, data in trained:
            tensor.data = data.to(saved).to(loaded)
        yield
    finally:
        for tensor, data in trained:
            tensor.data = data


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


def _compare_tensors(part: Part, folder: Path) -> torch.dtype:
    """The dtype of what was saved, when each of its tensors is the trained one in it."""
    found: set[str] = set()
    shapes: list[str] = []
    off: dict[str, float] = {}
    dtypes: set[torch.dtype] = set()
    try:
        for name, value in part.written(folder):
            found.add(name)
            if name not in part.trained:
                continue
            weight = part.trained[name].detach().cpu().to(value.dtype)
            if value.is_floating_point():
                dtypes.add(value.dtype)
            if value.shape != weight.shape:
                shapes.append(f"{name} is {tuple(value.shape)} in the export, {tuple(weight.shape)} in training")
            elif not torch.equal(value, weight):
                off[name] = (value.double() - weight.double()).abs().max().item()
    except (OSError, SafetensorError) as error:
        raise ExportError(f"expected weights in {folder / part.name}, got: {error}") from error
    _compare_names("tensors", found, set(part.trained))
    if shapes:
        raise ExportError(f"{len(shapes)} of {len(found)} tensors have another shape: {_some(shapes)}")
    if off:
        raise ExportError(
            f"{len(off)} of {len(found)} tensors of the export differ from the trained ones, by up to "
            f"{max(off.values()):.3g}: {_some(off)}"
        )
    if len(dtypes) != 1:
        raise ExportError(f"expected weights of one dtype in {folder / part.name}, got {_some(map(str, dtypes))}")
    return dtypes.pop()


def _compare_strengths(loaded: dict[str, float], trained: dict[str, float]) -> None:
    _compare_names("modules", set(loaded), set(trained))
    off = {n: f"{n} ({loaded[n]:g} instead of {trained[n]:g})" for n in trained if loaded[n] != trained[n]}
    if off:
        raise ExportError(f"{len(off)} of {len(trained)} modules load at another strength: {_some(off.values())}")


def _compare_outputs(found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected):  # nan is unequal too
        difference = (found.cpu().double() - expected.cpu().double()).abs().max().item()
        raise ExportError(
            f"the loaded student computes something else: outputs differ by up to {difference:.3g} where the largest "
            f"is {expected.abs().max().item():.3g}, though tensors, modules and strengths agree; is the base model another "
            "one, or were its weights changed?"
        )


def _compare_merged(found: Tensor, expected: Tensor, base: nn.Module) -> None:
    """W + B A in one product or in two differs by rounding, in the base's dtype."""
    dtype = next(base.parameters()).dtype
    difference, largest = (
        (found.cpu().double() - expected.cpu().double()).abs().max().item(),
        expected.abs().max().item(),
    )
    if not difference <= torch.finfo(dtype).eps ** 0.5 * largest:
        raise ExportError(
            f"the adapter merged into the weights computes something else: outputs differ by up to {difference:.3g} where "
            f"the largest is {largest:.3g}"
        )
