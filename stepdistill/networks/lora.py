"""Named LoRA adapters (arXiv 2106.09685) over one base module: one copy of the base in memory for student and teacher.

PEFT makes and runs the layers. What is ours is the switch: PEFT's own enable / disable flips `requires_grad` of every
adapter, which silently changes what trains, and walks all parameters for it; :meth:`Adapters.use` sets what the layers
read in their forward and nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import CommaList
from ..errors import InputError


@dataclass(frozen=True)
class LoraSpec:
    """Size and place of an adapter.

    Attributes:
        rank: inner dimension r of B A.
        alpha: strength; the update is scaled by alpha / rank.
        targets: names (or ends of names) of the modules that get an adapter.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"expected a LoRA rank >= 1, got {self.rank}; fix --student.rank (64 is a usual choice)")
        if not self.alpha > 0:
            raise InputError(f"expected a LoRA alpha > 0, got {self.alpha}; fix --student.alpha (the rank is usual)")
        if not self.targets:
            raise InputError("expected at least one LoRA target module; fix --student.targets")

    def peft_config(self, name: str = "default") -> Any:
        """The PEFT LoraConfig: Gaussian A, zero B, dropout 0 (student and target must share their masks)."""
        from peft import LoraConfig

        alpha = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        return LoraConfig(
            r=self.rank,
            lora_alpha=alpha,
            target_modules=list(self.targets),
            lora_dropout=0.0,
            init_lora_weights="gaussian",
        )


@dataclass
class StudentConfig:
    """What trains.

    Attributes:
        kind: "lora", an adapter over the teacher's own weights, or "full", a network of its own.
        rank: the adapter's inner dimension (this and the rest are for lora).
        alpha: its strength is alpha / rank; the rank by default.
        targets: module names (or their ends), comma separated; the family's full set by default.
    """

    kind: Literal["lora", "full"] = "lora"
    rank: int = 64
    alpha: float | None = None
    targets: CommaList | None = None

    def __post_init__(self) -> None:
        self.spec(("any",))

    def spec(self, default_targets: Sequence[str]) -> LoraSpec:
        """The adapter's spec, with the family's targets where none were given."""
        targets = tuple(self.targets) if self.targets else tuple(default_targets)
        return LoraSpec(self.rank, float(self.rank if self.alpha is None else self.alpha), targets)


@contextmanager
def _another_adapter() -> Iterator[None]:
    """Quiets PEFT where what it warns of is meant: a second adapter on a module, transposed weights, which it sees itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute", category=UserWarning)
        yield


class Adapters:
    """The adapters attached to one module, and which of them computes now.

    At rest (outside any :meth:`use`) the adapter attached last computes, so that gradient checkpointing, which runs the
    forward again during backward, sees the student.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.specs: dict[str, LoraSpec] = {}
        self.current: str | None = None
        self._layers: dict[str, Any] = {}

    def attach(self, name: str, spec: LoraSpec, seed: int = 0) -> None:
        """Adds a trainable adapter in float32, initialised from `seed`; the base's weights stop requiring grad."""
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        if name in self.specs:
            raise ValueError(f"an adapter named {name!r} is attached already; choose another name")
        if not self.specs:
            self.module.requires_grad_(False)
        flags = self._flags()
        with torch.random.fork_rng(devices=[]), _another_adapter():  # PEFT draws A from the CPU's global generator
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
            try:
                self._inject(inject_adapter_in_model, name, spec)
            except ValueError as error:
                raise InputError(
                    f"LoRA targets {list(spec.targets)} fit no module: {error}; fix --student.targets"
                ) from error
        self._layers = {n: m for n, m in self.module.named_modules() if isinstance(m, BaseTunerLayer)}
        self._restore(flags)
        self.specs[name] = spec
        for parameter in self.parameters(name).values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._switch(name)

    def _inject(self, inject: Any, name: str, spec: LoraSpec) -> None:
        from diffusers.loaders.peft import PeftAdapterMixin

        if isinstance(self.module, PeftAdapterMixin):
            self.module.add_adapter(spec.peft_config(), adapter_name=name)
        else:
            inject(spec.peft_config(), self.module, name)

    def duplicate(self, name: str) -> str:
        """A frozen copy of adapter `name` under a new name, which is returned; what computes at rest stays the same."""
        copy = f"{name}_frozen_{len(self.specs)}"
        rest = self.current
        self.attach(copy, self.specs[name])
        source = self.parameters(name)
        for key, parameter in self.parameters(copy).items():
            parameter.data.copy_(source[key].data)
            parameter.requires_grad_(False)
        self._switch(rest)
        return copy

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by their names without the adapter's."""
        part = f".{name}."
        found = {n: p for n, p in self.module.named_parameters() if "lora_" in n and part in n}
        return {n.replace(part, "."): p for n, p in found.items()}

    def scalings(self, name: str) -> dict[str, float]:
        """Module name -> the factor on B A, for every module that adapter `name` sits on."""
        return {n: float(layer.scaling[name]) for n, layer in self._layers.items() if name in layer.scaling}

    def _flags(self) -> list[tuple[nn.Parameter, bool]]:
        return [(p, p.requires_grad) for p in self.module.parameters()]

    @staticmethod
    def _restore(flags: Sequence[tuple[nn.Parameter, bool]]) -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    def _switch(self, name: str | None) -> None:
        # the two attributes that PEFT's layers read; its setters flip requires_grad too (40 ms for the 276 layers of SD)
        for layer in self._layers.values():
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        self.current = name

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Within it the module computes with adapter `name`, or with none of them; what computed before is put back."""
        if name is not None and name not in self.specs:
            raise ValueError(f"expected one of the adapters {sorted(self.specs)}, got {name!r}")
        before = self.current
        if before == name:
            yield
            return
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    @contextmanager
    def guest(self, name: str, load: Callable[[], None]) -> Iterator[None]:
        """Within it the module computes with the adapter that `load` adds as `name`; afterwards it is as it was before.

        For checking an exported file on the module it was trained on. `load` must not adapt a module without adapters.
        """
        before, flags = self.current, self._flags()
        active = [list(layer.active_adapters) for layer in self._layers.values()]
        module: Any = self.module
        try:
            with _another_adapter():
                load()
            self._switch(name)
            yield
        finally:
            for layer, names in zip(self._layers.values(), active, strict=True):
                layer._active_adapter = names  # first, since PEFT warns when an active adapter is deleted
            module.delete_adapters(name)
            self._switch(before)
            self._restore(flags)
