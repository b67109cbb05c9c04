"""A fit as tensors and JSON, and back: networks, optimizers, EMA, loss scaler, the method's own state, all by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from .checkpoint import Checkpoint
from .config import resumed_changes
from .parallel import gathered, share
from .state import join_state, split_state

if TYPE_CHECKING:
    from .loop import Fit


def identity(fit: Fit) -> dict[str, Any]:
    """What a resumed run must have in common with the one it continues, and what its config does not say."""
    return {
        "method": type(fit.method).__name__,
        "roles": sorted(fit.roles),
        "global batch size": fit.trainer.global_batch_size,
        "number of samples": len(fit.data),
        "first step": fit.first,
    }


def snapshot(fit: Fit) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(file name -> tensors, JSON state) of this moment. Takes all processes; only the main one gets tensors."""
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
        "teacher": fit.trainer.teacher,
        "config": split_state(fit.trainer.resolved)[1],  # it may hold infinities, which JSON does not
        "left_out": [fit.nonfinite.skipped, fit.nonfinite.in_a_row],
        "optimizers": optimizers,
        "method": method,
    }
    if fit.ema is not None:
        files["student.ema"], state["ema_updates"] = fit.ema.shadow, fit.ema.updates
    if fit.accelerator.scaler is not None:
        state["scaler"] = fit.accelerator.scaler.state_dict()
    return {name: gathered(tensors, fit.trainer.is_main) for name, tensors in files.items() if tensors}, state


def room(fit: Fit) -> tuple[int, int]:
    """(bytes of a checkpoint, how many more of them there will be at once), near enough.

    An optimizer that has not stepped yet is taken to keep two moments in float32. Networks that a later round adds count.
    """
    networks = (*fit.networks.values(), *fit.method.coming())
    held = [t for network in networks for t in network.state().values()]
    held += split_state(fit.method.state_dict())[0].values()
    held += fit.ema.shadow.values() if fit.ema is not None else ()
    size = sum(tensor.nbytes for tensor in held)
    for role in fit.roles.values():
        moments = split_state(role.optimizer_state()["state"])[0]
        size += sum(t.nbytes for t in moments.values()) or sum(8 * p.numel() for p in role.parameters)
    saves = -(-(fit.start + fit.steps - fit.trainer.step) // fit.config.checkpointing_steps)
    if fit.store.limit is not None:  # the oldest goes only after the newest is there
        saves = min(saves, max(0, fit.store.limit - len(fit.store.steps())) + 1)
    return size, saves


def restore(fit: Fit, checkpoint: Checkpoint) -> None:
    """Every tensor and counter back to what it was. Raises InputError for a checkpoint of another run."""
    state, place = checkpoint.state, f"checkpoint {checkpoint.path}"
    for change in resumed_changes(join_state({}, state["config"]), fit.trainer.resolved, place):
        fit.accelerator.print(f"changed since step {checkpoint.step}: {change}")
    check_teacher(state.get("teacher", {}), fit.trainer.teacher, place)
    for key, now in identity(fit).items():
        if state["run"][key] != now:
            raise InputError(
                f"expected {key} {state['run'][key]} as in {place}, got {now}; set it back (batch size, accumulation, "
                "processes, data, steps of earlier fits), or start anew with another --output_dir"
            )
    # first, since the networks that there are may depend on the round
    with fit.parallel.changing():
        fit.method.load_state_dict(join_state(checkpoint.tensors("method"), state["method"]))
    fit.meet_networks()
    for name, network in fit.networks.items():
        copy_into(network.state(), checkpoint.tensors(name), f"{place}, {name}")
    for name, role in fit.roles.items():
        role.load_optimizer_state(join_state(checkpoint.tensors(f"{name}.optimizer"), state["optimizers"][name]))
    if fit.ema is not None:
        copy_into(fit.ema.shadow, checkpoint.tensors("student.ema"), f"{place}, EMA")
        fit.ema.updates = state["ema_updates"]
    if fit.accelerator.scaler is not None and "scaler" in state:
        fit.accelerator.scaler.load_state_dict(state["scaler"])
    fit.round, fit.start, fit.trainer.step = state["round"], state["round_start"], checkpoint.step
    fit.nonfinite.skipped, fit.nonfinite.in_a_row = state["left_out"]
    fit.saved_at = (fit.round, checkpoint.step)


def check_teacher(saved: Mapping[str, str], now: Mapping[str, str], place: str) -> None:
    """InputError where the teacher, by its hashes in each dtype, is another than in `place`; of two dtypes nobody can tell."""
    if any(saved[dtype] != now[dtype] for dtype in saved.keys() & now.keys()):
        raise InputError(
            f"expected the teacher of {place}, got other weights or another noise schedule; set --teacher.path to where that "
            "teacher is now, or start anew with another --output_dir"
        )


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
            value.copy_(share(saved[name], value))
