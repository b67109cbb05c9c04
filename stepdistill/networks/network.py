"""A plain object around a module: what trains, what can be copied, what can be tapped.

Not an nn.Module, so that DDP and FSDP wrap `.net` alone and a method never meets a wrapper's attributes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .lora import Adapters


class Network:
    """A role of a method: a student, a critic, a discriminator.

    Args:
        net: the module; the trainer may replace :attr:`net` by a wrapped one, :attr:`module` never changes.
        adapters: the LoRA adapters on `net`, when it has any; they may be shared with other networks.
        adapter: the name of the adapter this network computes with; None means the bare base.

    What trains is fixed here: the parameters of `adapter`, or without adapters those that require grad now.
    """

    def __init__(self, net: nn.Module, adapters: Adapters | None = None, adapter: str | None = None) -> None:
        self.net = net
        self.adapters, self.adapter = adapters, adapter
        self._fix_trainable()

    def _fix_trainable(self) -> None:
        if self.adapters is None:
            self._trainable = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        elif self.adapter is None:
            self._trainable = {}
        else:
            named = self.adapters.parameters(self.adapter)
            self._trainable = {n: p for n, p in named.items() if p.requires_grad}

    @property
    def module(self) -> nn.Module:
        """The module itself, never wrapped: for generate(), hooks, adapter switches and saving."""
        return self.net.module if isinstance(self.net, DistributedDataParallel) else self.net

    def trainable(self) -> list[nn.Parameter]:
        """The parameters this network trains, as fixed at construction."""
        return list(self._trainable.values())

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """The same by name."""
        return dict(self._trainable)

    def state(self) -> dict[str, Tensor]:
        """What this network owns and training may change, by name: its adapter, or all weights and persistent buffers.

        The tensors are the live ones; checkpoints save them and copy into them.
        """
        if self.adapters is not None:
            return (
                {} if self.adapter is None else {n: p.data for n, p in self.adapters.parameters(self.adapter).items()}
            )
        return dict(self.module.state_dict(keep_vars=False))

    def compute_with(self, net: nn.Module) -> None:
        """Puts `net` in the place of the module, with parameters of the same names: what trains stays the same by name."""
        own = dict(net.named_parameters())
        self.net, self._trainable = net, {name: own[name] for name in self._trainable}

    def active(self) -> AbstractContextManager[None]:
        """Within it, the shared base computes with this network's adapter (or with none)."""
        return nullcontext() if self.adapters is None else self.adapters.use(self.adapter)

    def frozen_copy(self) -> Self:
        """A copy that never trains, in eval mode: the weights are copied, or with LoRA only the adapter."""
        twin = copy.copy(self)
        if self.adapters is None:
            twin.net = copy.deepcopy(self.module).requires_grad_(False).eval()
        elif self.adapter is not None:
            twin.net, twin.adapter = self.module, self.adapters.duplicate(self.adapter)
        else:
            twin.net = self.module
        twin._trainable = {}
        return twin

    def tapped(self, name: str, output: Any) -> Any:
        """What a tap on submodule `name` keeps of its output: the tensor, or the first of a tuple.

        Networks whose blocks return the text's tokens before the image's choose here.
        """
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def taps(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Collects the outputs of submodules: `with net.taps(["mid_block"]) as features: net(...)`.

        What is kept of an output that is no tensor, :meth:`tapped` says. Raises ValueError for a name that is no submodule. A
        module called several times leaves its last output.
        """
        modules: dict[str, nn.Module] = {}
        for name in names:
            with contextlib.suppress(AttributeError):  # each by its name: a list of all would cost 2 ms with adapters
                modules[name] = self.module.get_submodule(name)
        if missing := [name for name in names if name not in modules]:
            raise ValueError(f"expected names of submodules to tap, got {missing}; print net.module to see them")
        features: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                features[name] = self.tapped(name, output)

            return hook

        with contextlib.ExitStack() as stack:
            for name in names:
                stack.callback(modules[name].register_forward_hook(keep(name)).remove)
            yield features


class Module(Network):
    """A network that is called as its module is: discriminators, classifiers, autoencoders."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.active():
            return self.net(*args, **kwargs)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters, each storage counted once."""
    seen: dict[int, Tensor] = {p.data_ptr(): p for p in module.parameters()}
    return sum(p.numel() * p.element_size() for p in seen.values())
