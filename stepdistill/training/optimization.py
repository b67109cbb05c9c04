"""One optimizer step of one role: learning rate, gradient scale, finite check, clipping."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..method import Losses
from ..networks.network import Network
from .config import TrainConfig


def lr_factor(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate at `step` of a round of `total` steps, as a share of its peak.

    A function of the step, with no state: nothing to save, nothing that counts processes twice.
    """
    warmup = 0 if config.lr_scheduler == "constant" else config.lr_warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_scheduler in ("constant", "constant_with_warmup"):
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 1.0 - progress if config.lr_scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(config: TrainConfig, network: Network) -> torch.optim.Optimizer:
    """AdamW over what `network` trains."""
    parameters = network.trainable()
    if not parameters:
        raise ValueError("expected a network with trainable parameters; is it a frozen copy?")
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


class Role:
    """A trained network with its optimizer, wrapped for mixed precision by Accelerate."""

    def __init__(self, name: str, network: Network, config: TrainConfig, accelerator: Any) -> None:
        self.name, self.network, self.config, self.accelerator = name, network, config, accelerator
        self.parameters = network.trainable()
        self.reset()

    def reset(self) -> None:
        """A fresh optimizer: at the start of a fit and of each round."""
        self.optimizer = self.accelerator.prepare_optimizer(
            make_optimizer(self.config, self.network), device_placement=False
        )

    def step(self, lr: float, gradient_scale: float) -> float:
        """Scales the gradients, checks them, clips, steps, and clears them.

        Returns:
            The gradient norm before clipping. If it is not finite nothing is stepped, except that fp16's loss scaler
            may do what it is there for: skip the step and lower its scale.
        """
        self.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise ValueError(f"no gradient reached {self.name!r}: its loss does not depend on its trainable parameters")
        torch._foreach_mul_(gradients, gradient_scale)
        limit = self.config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if math.isfinite(norm) or self.accelerator.scaler is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state_dict."""
        state: dict[str, Any] = self.optimizer.optimizer.state_dict()
        return state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restores :meth:`optimizer_state`."""
        self.optimizer.optimizer.load_state_dict(state)


class Sums:
    """Losses of micro-batches, weighted by their counts, on their way to the means over the global batch."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, losses: Losses) -> None:
        """Takes in one micro-batch."""
        total = losses.total.detach().float()
        count = torch.as_tensor(losses.count, dtype=torch.float32).to(total.device)
        for name, value in {"loss": total, **losses.terms, **losses.metrics}.items():
            self._add(name, value.detach().float() * count)
        self._add("count", count)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self, accelerator: Any) -> tuple[dict[str, float], float]:
        """(name -> mean over all micro-batches and processes, their count).

        A count of 0 (every token masked) gives means 0 and count 1, so that the gradients, zero already, stay zero.
        """
        values = torch.stack(list(self._sums.values()))
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values, "sum")
        means = dict(zip(self._sums, values.tolist(), strict=True))
        count = means.pop("count")
        if count == 0:
            return dict.fromkeys(means, 0.0), 1.0
        return {name: value / count for name, value in means.items()}, count
