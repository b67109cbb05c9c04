"""One optimizer step: learning rate, gradient scale, clipping, loss scaling; and the losses on their way to means."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import InputError
from ..method import Losses
from ..networks.network import Network
from .config import TrainConfig
from .parallel import assembled, share

log = logging.getLogger(__name__)

SMALLEST_SCALE = 1e-4  # of fp16's loss scaler; gradients that overflow below it are broken, not large


class NonFiniteError(RuntimeError):
    """A loss or gradient norm became NaN or infinite; the weights are those of before the step."""


class NonFinite:
    """What becomes of a loss or gradient norm that is NaN or infinite: an error, or a step left out and counted.

    The counts are of steps, and part of a checkpoint, so that a resumed run gives up where it would have given up.
    """

    LIMIT = 50  # steps left out in a row; by then it is not the data

    def __init__(self, skip: bool, speaks: bool = True) -> None:
        self.skip, self.skipped, self.in_a_row = skip, 0, 0
        self._speaks, self._met = speaks, ""

    def meet(self, what: str) -> None:
        """Raises NonFiniteError, or notes that a phase of this step is left out."""
        if not self.skip:
            raise NonFiniteError(
                f"{what}; the weights were not changed by it. Lower --train.learning_rate, use bf16 instead of fp16, look at "
                "these samples, or leave such steps out with --train.on_nonfinite skip"
            )
        self._met = what

    def end_step(self) -> bool:
        """Whether a phase of the step was left out. Raises NonFiniteError when that happens too often in a row."""
        met, self._met = self._met, ""
        self.in_a_row = self.in_a_row + 1 if met else 0
        self.skipped += bool(met)
        if met and self._speaks:
            log.warning("step left out: %s", met)
        if self.in_a_row >= self.LIMIT:
            raise NonFiniteError(f"{self.LIMIT} steps in a row were left out, the last of them since the {met}")
        return bool(met)


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
    """AdamW over what `network` trains. InputError when it is to be in 8 bits and can't."""
    parameters = network.trainable()
    if not parameters:
        raise ValueError("expected a network with trainable parameters; is it a frozen copy?")
    adam: Any = _adam_8bit(parameters[0].device) if config.use_8bit_adam else torch.optim.AdamW
    optimizer: torch.optim.Optimizer = adam(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    return optimizer


def _adam_8bit(device: torch.device) -> Any:
    """The AdamW of bitsandbytes, once it has made a step on `device`: nothing else tells for sure that it can."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            f"expected bitsandbytes for --train.use_8bit_adam, got: {error}; pip install 'stepdistill[bitsandbytes]', or drop "
            "--train.use_8bit_adam"
        ) from error
    probe = torch.nn.Parameter(torch.zeros(4096, device=device))  # it keeps the moments of smaller ones in 32 bits
    probe.grad = torch.zeros_like(probe)
    try:
        AdamW8bit([probe]).step()
    except RuntimeError as error:
        raise InputError(
            f"expected a device that bitsandbytes has 8-bit kernels for, got {device}: {error}; drop --train.use_8bit_adam"
        ) from error
    return AdamW8bit


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
        return float(assembled(torch.nn.utils.clip_grad_norm_(self.parameters, limit)))

    def step(self, lr: float) -> None:
        """One optimizer step; clears the gradients. A loss scaler skips the step where gradients overflowed."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Clears the gradients without a step."""
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state_dict."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restores the moments of :meth:`optimizer_state`; betas, decay and epsilon stay those of the config."""
        moments = {number: _shared(of, self.parameters[number]) for number, of in state["state"].items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _shared(moments: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """A parameter's moments, shared out as it is itself; its step count, of another shape, is the same everywhere."""
    if not isinstance(parameter, DTensor):
        return moments
    return {name: share(v, parameter) if v.shape == parameter.shape else v for name, v in moments.items()}


class Sums:
    """Losses of micro-batches, weighted by their counts, on their way to the means over the global batch."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._broken: list[Tensor] = []  # for each micro-batch, whether its loss is not finite

    def add(self, losses: Losses) -> None:
        """Takes in one micro-batch."""
        total = losses.total.detach().float()
        count = torch.as_tensor(losses.count, dtype=torch.float32).to(total.device)
        for name, value in {"loss": total, **losses.terms, **losses.metrics}.items():
            self._add(name, value.detach().float() * count)
        self._add("count", count)
        self._broken.append(~torch.isfinite(total))

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self, accelerator: Any) -> tuple[dict[str, float], float, list[int]]:
        """(name -> mean over all micro-batches and processes, their count, the micro-batches whose loss is not finite).

        Micro-batches are numbered through the global batch, those of process 0 first. A count of 0 (every token masked) gives
        means 0 and count 1, so that the gradients, zero already, stay zero.
        """
        sums, broken = torch.stack(list(self._sums.values())), torch.stack(self._broken).float()
        flags = broken.new_zeros(accelerator.num_processes, len(broken))
        flags[accelerator.process_index] = broken
        both = torch.cat([sums, flags.flatten()])  # in one collective
        values = (accelerator.reduce(both, "sum") if accelerator.num_processes > 1 else both).tolist()
        means = dict(zip(self._sums, values, strict=False))
        count = means.pop("count")
        found = [number for number, flag in enumerate(values[len(self._sums) :]) if flag]
        if count == 0:
            return dict.fromkeys(means, 0.0), 1.0, found
        return {name: value / count for name, value in means.items()}, count, found
