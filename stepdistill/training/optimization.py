"""One optimizer step: learning rate, gradient scale, clipping, loss scaling; and the losses on their way to means."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..method import Losses
from ..networks.network import Network
from .config import TrainConfig


class NonFiniteError(RuntimeError):
    """A loss or gradient norm became NaN or infinite; the weights are those of before the step."""


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
    """A trained network with its optimizer.

    The roles of a phase step together: :meth:`clip` for all of them, a look at the norms, then :meth:`step`.

    Args:
        name: the role.
        network: whose trainable parameters are stepped.
        config: optimizer and clipping.
        scaler: fp16's loss scaler, which the trainer updates once all roles have stepped; None in other precisions.
    """

    def __init__(self, name: str, network: Network, config: TrainConfig, scaler: torch.amp.GradScaler | None) -> None:
        self.name, self.network, self.config, self.scaler = name, network, config, scaler
        self.parameters = network.trainable()
        self.reset()

    def reset(self) -> None:
        """A fresh optimizer: at the start of a fit and of each round."""
        self.optimizer = make_optimizer(self.config, self.network)

    def clip(self, gradient_scale: float) -> float:
        """Multiplies the gradients by `gradient_scale` and clips them; returns their norm before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise ValueError(f"no gradient reached {self.name!r}: its loss does not depend on its trainable parameters")
        torch._foreach_mul_(gradients, gradient_scale)
        limit = self.config.max_grad_norm or math.inf
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))

    def step(self, lr: float) -> None:
        """One optimizer step; clears the gradients. A loss scaler skips the step where gradients overflowed."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state_dict."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restores the moments of :meth:`optimizer_state`; betas, decay and epsilon stay those of the config."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state, "param_groups": groups})


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
