"""A network with weights of its own as a Diffusers folder, `unet/`: config and safetensors, which from_pretrained opens.

Full students, and adapters on backbones for which Diffusers has no loader of adapters.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ExportError
from ..families import Model
from ..networks.denoiser import Denoiser
from ..networks.merge import merged
from .config import Verify
from .part import Loaded, Part, check_finite, component


class WholeNetwork(Part):
    """All weights of a student, buffers included; an adapter is merged into the weights under it."""

    def __init__(self, model: Model, student: Denoiser) -> None:
        super().__init__(model, student)
        if student.adapters is not None:
            self.source, self.student = self.student, copy.copy(student)
            self.student.net, self.student.adapters, self.student.adapter = merged(student), None, None
        self.name = component(model.pipeline())
        self.trained = dict(self.student.module.state_dict(keep_vars=True))
        self.strengths = {}

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        check_finite(self.trained.items(), dtype)
        module: Any = self.student.module
        with _held_as(self.trained.values(), dtype):
            module.save_pretrained(str(folder / self.name))
        for file in (folder / self.name).glob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes files that only their owner can read
        config = folder / self.name / "config.json"
        fields = json.loads(config.read_text(encoding="utf-8"))
        fields.pop("_name_or_path", None)  # where the teacher lay on this machine
        config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def written(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        for path in sorted((folder / self.name).glob("*.safetensors")):  # several, where it is split
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # no mapping
                    yield key, file.get_tensor(key)

    @contextlib.contextmanager
    def opened(self, folder: Path, how: Verify) -> Iterator[Loaded]:
        network = copy.copy(self.student)
        module = open_network(type(self.student.module), folder, self.name)
        network.net = module.to(next(self.student.module.parameters()).device)
        yield Loaded(network, torch.float32, {})


def open_network(cls: Any, folder: Path, name: str) -> Any:
    """The network in `folder/name` by its class's from_pretrained, in float32; ExportError unless it is whole."""
    try:
        module, info = cls.from_pretrained(
            str(folder), subfolder=name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"Diffusers does not load {folder / name}: {error}") from error
    for kind, keys in info.items():
        if keys:
            raise ExportError(
                f"Diffusers loads {folder / name} with {len(keys)} {kind}, first {sorted(map(str, keys))[0]}"
            )
    return module


@contextlib.contextmanager
def _held_as(tensors: Iterable[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Within it the tensors are on the CPU in `dtype`, so that a module is saved so without a second one in memory."""
    trained = [(t, t.data) for t in tensors if t.is_floating_point()]
    try:
        for tensor, data in trained:
            tensor.data = data.to("cpu", dtype)
        yield
    finally:
        for tensor, data in trained:
            tensor.data = data
