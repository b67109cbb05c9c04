"""A fit as tensors and JSON, and back: networks, optimizers, EMA, loss scaler, the method's own state, all by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from .checkpoint import Checkpoint
from .state import join_state, split_state

if TYPE_CHECKING:
    from .loop import Fit


def identity(fit: Fit) -> dict[str, Any]:
    """What a resumed run must have in common with the one it continues, or its samples and noise would differ."""
    return {
        "method": type(fit.method).__name__,
        "roles": sorted(fit.roles),
        "seed": fit.config.seed,
        "global batch size": fit.trainer.global_batch_size,
        "number of samples": len(fit.data),
        "first step": fit.first,
    }


def snapshot(fit: Fit) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(file name -> tensors, JSON state) of this moment."""
    files = {role: network.state() for role, network in fit.networks.items()}
    optimizers = {}
    for name, role in fit.roles.items():
        files[f"{name}.optimizer"], optimizers[name] = split_state(role.optimizer_state())
    files["method"], method = split_state(fit.method.state_dict())
    state = {
        "fit": fit.name,
        "round": fit.round,
        "round_start": fit.start,
        "run": identity(fit),
        "optimizers": optimizers,
        "method": method,
    }
    if fit.ema is not None:
        files["student.ema"], state["ema_updates"] = fit.ema.shadow, fit.ema.updates
    if fit.accelerator.scaler is not None:
        state["scaler"] = fit.accelerator.scaler.state_dict()
    return {name: tensors for name, tensors in files.items() if tensors}, state


def restore(fit: Fit, checkpoint: Checkpoint) -> None:
    """Every tensor and counter back to what it was. Raises InputError for a checkpoint of another run."""
    state, place = checkpoint.state, f"checkpoint {checkpoint.path}"
    for key, now in identity(fit).items():
        if state["run"][key] != now:
            raise InputError(
                f"expected {key} {state['run'][key]} as in {place}, got {now}; set it back (seed, batch size, accumulation, "
                "processes, data, steps of earlier fits), or start anew with another --output_dir"
            )
    if (fit.ema is None) != ("ema_updates" not in state):
        raise InputError(f"expected the EMA setting of {place}; set --train.ema_decay back, or start anew elsewhere")
    for name, network in fit.networks.items():
        copy_into(network.state(), checkpoint.tensors(name), f"{place}, {name}")
    for name, role in fit.roles.items():
        role.load_optimizer_state(join_state(checkpoint.tensors(f"{name}.optimizer"), state["optimizers"][name]))
    if fit.ema is not None:
        copy_into(fit.ema.shadow, checkpoint.tensors("student.ema"), f"{place}, EMA")
        fit.ema.updates = state["ema_updates"]
    if fit.accelerator.scaler is not None and "scaler" in state:
        fit.accelerator.scaler.load_state_dict(state["scaler"])
    fit.method.load_state_dict(join_state(checkpoint.tensors("method"), state["method"]))
    fit.round, fit.start, fit.trainer.step = state["round"], state["round_start"], checkpoint.step
    fit.saved_at = (fit.round, checkpoint.step)


def copy_into(live: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """Copies saved tensors into live ones; raises InputError where names or shapes differ."""
    odd = [n for n in live.keys() | saved.keys() if n not in live or n not in saved or live[n].shape != saved[n].shape]
    if odd:
        raise InputError(
            f"expected the tensors of {what}, got {len(odd)} of other names or shapes ({', '.join(sorted(odd)[:3])}); this "
            "run's networks differ from the saved ones: set the teacher, rank and targets back, or start anew with another "
            "--output_dir"
        )
    with torch.no_grad():
        for name, value in live.items():
            value.copy_(saved[name])
