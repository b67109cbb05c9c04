"""Exponential moving average of what a network trains, in float32: the weights that are sampled and exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .network import Network


class EMA:
    """shadow <- decay shadow + (1 - decay) weights, over the trainable parameters only.

    Args:
        network: whose parameters are averaged.
        decay: in [0, 1); the ramp min(decay, (1 + n) / (10 + n)) lets early updates n count.
    """

    def __init__(self, network: Network, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"expected an EMA decay in [0, 1), got {decay}")
        self.network, self.decay, self.updates = network, decay, 0
        self.shadow = {n: p.detach().float().clone() for n, p in network.named_trainable().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the current weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.network.named_trainable().items():
            self.shadow[name].lerp_(parameter.detach().float(), 1.0 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the network computes with the averaged weights; the trained ones come back after."""
        parameters = self.network.named_trainable()
        trained = {name: p.detach().clone() for name, p in parameters.items()}
        self._load(self.shadow)
        try:
            yield
        finally:
            self._load(trained)

    def fold(self) -> None:
        """The averaged weights become the network's own."""
        self._load(self.shadow)

    @torch.no_grad()
    def _load(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.network.named_trainable().items():
            parameter.copy_(values[name])
