"""How the processes of a run share its networks: whole copies of them (DDP), or a share of each weight (FSDP2).

The only place that wraps and unwraps. With FSDP2, PyTorch's `fully_shard` (arXiv 2304.11277), a parameter of a network is
a DTensor, of which each process holds some rows; so are its gradient, its moments and its average, and what is computed
elementwise on them stays as it is written. What needs whole tensors (files, norms, callbacks) asks for them here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError
from ..method import Method
from ..networks.network import Network

UNIT = 1_000_000  # parameters that are worth a collective of their own
OTHERS = {
    "DEEPSPEED": "DeepSpeed",
    "FSDP": "its FSDP plugin",
    "MEGATRON_LM": "Megatron-LM",
    "PARALLELISM_CONFIG": "a device mesh",
}

Learning = Callable[[Sequence[str]], AbstractContextManager[None]]


def refuse_other_wrappers(environment: Mapping[str, str] = os.environ) -> None:
    """InputError where `accelerate launch` was told to wrap and step the networks itself.

    Read from the environment it sets, before an Accelerator is made: on a CPU that drops such a plugin without a word.
    """
    for key, name in OTHERS.items():
        if environment.get(f"ACCELERATE_USE_{key}", "false").lower() in ("true", "1"):
            raise InputError(
                f"expected accelerate to start processes and no more, got {name}, which would wrap the networks in its own "
                "way: two phases and files by name would not survive it; launch without it (accelerate config, or "
                "--multi_gpu), and to share out the weights of a full student give --train.parallel fsdp"
            )


def sharing(kind: str, method: Method, trained: set[str], accelerator: Any) -> Replicated | Sharded:
    """The way `kind` shares the networks of `method` out; with fsdp on several processes they are shards from here on.

    Raises:
        InputError: fsdp can't train this method. Also with one process, so that it is known before a cluster is.
    """
    check_shared(kind, method)
    networks = method.networks()
    if kind == "fsdp" and accelerator.num_processes > 1:
        return Sharded(networks, accelerator, rounds=type(method).next_round is not Method.next_round)
    return Replicated({name: networks[name] for name in networks if name in trained}, accelerator)


def check_shared(kind: str, method: Method) -> None:
    """InputError for a method whose networks `kind` can't share out."""
    if kind != "fsdp":
        return
    networks, trained, fix = method.networks(), method.trained(), "; use --train.parallel ddp"
    if method.needs_whole:
        raise InputError(f"expected whole weights {method.needs_whole}, got shards of them{fix}")
    seen: dict[int, str] = {}
    for name, network in networks.items():
        if network.adapters is not None:
            raise InputError(
                f"expected a full student with --train.parallel fsdp, got a LoRA adapter in {name!r}, whose base is the "
                f"teacher's too and stays whole{fix}, or --student.kind full"
            )
        for parameter in network.module.parameters():
            owner = seen.setdefault(id(parameter), name)
            if owner != name:
                raise InputError(
                    f"expected networks of their own with --train.parallel fsdp, got weights that {owner!r} and {name!r} "
                    f"share{fix}"
                )
        if tied := _tied(network.module):
            raise InputError(
                f"expected blocks with weights of their own with --train.parallel fsdp, got {tied} of {name!r} in several{fix}"
            )
    if len(trained) > 1:
        raise InputError(
            f"expected one trained network with --train.parallel fsdp, got {', '.join(sorted(trained))}: what a phase freezes "
            f"in one would have to be in step with the collectives of all{fix}"
        )


class Replicated:
    """Each process has every network whole; DDP averages the gradients of the trained ones."""

    def __init__(self, trained: Mapping[str, Network], accelerator: Any) -> None:
        self.trained, self.accelerator = trained, accelerator

    def autocast(self) -> AbstractContextManager[None]:
        """Accelerate's mixed precision."""
        return self.accelerator.autocast()

    @contextmanager
    def training(self, learning: Learning) -> Iterator[None]:
        """Within it the trained networks are wrapped."""
        if self.accelerator.num_processes == 1:
            yield
            return
        bare = {name: network.net for name, network in self.trained.items()}
        device = self.accelerator.device
        for name, network in self.trained.items():
            with learning((name,)):  # DDP waits for all that requires grad now, and roles may share one base
                network.net = DistributedDataParallel(
                    network.net, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
                )
        try:
            yield
        finally:
            for name, network in self.trained.items():
                network.net = bare[name]

    def whole(self, everywhere: bool = True) -> AbstractContextManager[None]:
        """Nothing to do: every module is whole."""
        return nullcontext()

    def changing(self) -> AbstractContextManager[None]:
        """Nothing to do, either."""
        return nullcontext()


class Sharded:
    """Each process has some rows of every weight of the networks, also of those that only follow the trained one.

    Those (a target, say) are shared out alike, so that averages between them need no communication. Frozen teachers are
    not among a method's networks and stay whole; so do networks that a later round adds, copies of whole ones.
    """

    def __init__(self, networks: Mapping[str, Network], accelerator: Any, rounds: bool = False) -> None:
        self.accelerator, self.rounds = accelerator, rounds
        mesh = init_device_mesh(accelerator.device.type, (dist.get_world_size(),))
        self.networks = [_Shards(network, mesh) for network in networks.values()]

    def autocast(self) -> AbstractContextManager[None]:
        """Accelerate's mixed precision, without the cache, which keeps a half-precision copy of all weights on each process."""
        from accelerate.utils import AutocastKwargs

        return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))

    @contextmanager
    def training(self, learning: Learning) -> Iterator[None]:
        """At its end every process has every network whole again, as an ordinary module."""
        yield
        # Not in a finally: a process that failed alone would wait for the others here, forever.
        for network in self.networks:
            network.fill(True)

    @contextmanager
    def whole(self, everywhere: bool = True) -> Iterator[None]:
        """Within it the networks are ordinary modules: on every process, or on the main one alone. All must enter."""
        for network in self.networks:
            network.fill(everywhere or dist.get_rank() == 0)
        try:
            yield
        finally:
            for network in self.networks:
                network.empty()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """As :meth:`whole`, and what a method of several rounds does to the weights within it stays."""
        if not self.rounds:
            yield
            return
        with self.whole():
            yield
            for network in self.networks:
                network.take_back()


class _Shards:
    """The two modules of a sharded network: a twin that computes, of shards, and its own, which waits without weights.

    `fully_shard` changes a module for good: its class, its hooks, its parameters. So a twin is changed, and the module that
    recipes and pipelines know is never: it gets its weights back where it is needed.
    """

    def __init__(self, network: Network, mesh: DeviceMesh) -> None:
        self.network, self.whole = network, network.module
        tensors = [*self.whole.parameters(), *self.whole.buffers()]
        for tensor in tensors:  # as DDP does: shares of different first weights would be no network at all
            dist.broadcast(tensor.data, src=0)
        # To deepcopy, a tensor in its memo is copied already: the twin is new modules around the same tensors.
        self.twin = copy.deepcopy(self.whole, {id(tensor): tensor for tensor in tensors})
        for unit in _units(self.twin).values():
            # Also the outermost: left whole after a forward, its parameters would not be shards in after_step.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        self.empty()

    @torch.no_grad()
    def fill(self, here: bool) -> None:
        """Where `here`, the network is its own module with all weights; takes all processes."""
        own = dict(self.whole.named_parameters())
        for name, shards in self.twin.named_parameters():
            full = assembled(shards.detach())
            if here:
                own[name].data = full
        for twin, module in zip(self.twin.modules(), self.whole.modules(), strict=True):
            module.training = twin.training
            module._buffers.update(twin._buffers)  # the same tensors, unless a forward has assigned new ones
        if here:
            self.network.compute_with(self.whole)

    @torch.no_grad()
    def take_back(self) -> None:
        """The shards become those of the module's own weights, which must be the same on all processes."""
        own = dict(self.whole.named_parameters())
        for name, shards in self.twin.named_parameters():
            shards.copy_(share(own[name].detach(), shards))
        for twin, module in zip(self.twin.modules(), self.whole.modules(), strict=True):
            twin._buffers.update(module._buffers)

    def empty(self) -> None:
        """The network is its twin; the module's own weights are let go of."""
        for parameter in self.whole.parameters():
            parameter.data = parameter.data.new_empty(0)
        self.network.compute_with(self.twin)


def _units(module: nn.Module) -> dict[str, nn.Module]:
    """What is gathered, computed and let go of together, the innermost first.

    The repeated blocks of UNets and transformers are ModuleLists of one class (those of several hold the layers of one
    block, or the stages of a UNet). A block is a unit when it has UNIT parameters that no unit within it has; the module
    itself has the rest.
    """
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    blocks = {id(item) for items in lists if len({type(item) for item in items}) == 1 for item in items}
    units: dict[str, nn.Module] = {}
    taken: set[nn.Parameter] = set()
    for name, part in reversed(list(module.named_modules())):  # what is within a part comes before it
        free = [p for p in part.parameters() if p not in taken]
        block = id(part) in blocks and not isinstance(part, (nn.ModuleList, nn.ModuleDict))  # those have no forward
        if part is module or (block and sum(p.numel() for p in free) >= UNIT):
            units[name] = part
            taken.update(free)
    return units


def _tied(module: nn.Module) -> str:
    """The name of a weight that two units have; "" if there is none. One of them would be left with a copy of it."""
    units, homes = _units(module), dict[nn.Parameter, str]()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        home = next(unit for unit in units if not unit or name.startswith(f"{unit}."))
        if homes.setdefault(parameter, home) != home:
            return name
    return ""


@contextmanager
def no_sync(net: nn.Module) -> Iterator[None]:
    """Within it the gradients of a wrapped module stay with their process."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            net.set_requires_gradient_sync(True)
    else:
        with net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext():
            yield


def assembled(tensor: Tensor) -> Tensor:
    """All of a shared-out tensor, on each process, all of which must ask for it; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU of a process that keeps them; {} on others, which must call it just the same.

    One at a time, so that no device has to hold more than one of them.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = assembled(tensor.detach())
        if keep:
            kept[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return kept


def share(full: Tensor, like: Tensor) -> Tensor:
    """The share of `full` that this process has of `like`; all of it where `like` is not shared out."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)
