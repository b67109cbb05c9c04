"""What a run's folder says of its training, read back: sections of config.yaml, checkpoints, a student's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from ..config import CommaList
from ..errors import InputError
from ..networks.network import Network
from ..training.checkpoint import Checkpoint, CheckpointStore
from .config import CONFIG

T = TypeVar("T")


def find_checkpoint(folder: Path, which: str) -> Checkpoint:
    """The checkpoint asked for, of all fits of a run; InputError where there is none, or it is damaged."""
    fits = sorted(p for p in folder.glob("*") if p.is_dir() and not p.name.isdigit() and not p.name.startswith("."))
    stores = [store for place in (folder, *fits) if (store := CheckpointStore(place)).steps()]
    if which == "latest" and stores:
        stores = [max(stores, key=lambda store: store.steps()[-1])]
    elif which.isdecimal():
        stores = [store for store in stores if int(which) in store.steps()][-1:] or stores[-1:]
    found = (stores[-1] if stores else CheckpointStore(folder)).find(which, strict=True)
    if found is None:
        raise InputError(f"expected a checkpoint in {folder}, got none; train first, or name another run folder")
    return found


def section(cls: type[T], sections: dict[str, Any], name: str, changes: dict[str, Any] | None = None) -> T:
    """A section as the dataclass it came from, with `changes`; InputError for fields that it does not have."""
    values = {**(sections.get(name) or {}), **(changes or {})}
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := set(values) - known:
        raise InputError(
            f"expected the fields {', '.join(sorted(known))} in section {name} of {CONFIG}, got also "
            f"{', '.join(sorted(unknown))}; was it written by another version?"
        )
    hints = get_type_hints(cls)
    lists = {name for name in known if CommaList in (hints[name], *get_args(hints[name]))}
    return cls(**{k: CommaList.parse(v) if k in lists and v is not None else v for k, v in values.items()})


def load_student(student: Network, checkpoint: Checkpoint) -> None:
    """Puts the checkpoint's weights into the student, and over them the average in `student.ema` if there is one."""
    _copy(checkpoint.tensors("student"), student.state(), checkpoint)
    if average := checkpoint.tensors("student.ema"):
        _copy(average, {name: p.data for name, p in student.named_trainable().items()}, checkpoint)


@torch.no_grad()
def _copy(saved: Mapping[str, Tensor], live: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    if saved.keys() != live.keys():
        odd = sorted(saved.keys() ^ live.keys())
        raise InputError(
            f"expected the {len(live)} tensors of this student in {checkpoint.path}, got {len(saved)}; {len(odd)} are in one "
            f"only, first {odd[0]}; do `student` and `teacher` in {CONFIG} belong to this checkpoint?"
        )
    for name, tensor in live.items():
        if saved[name].shape != tensor.shape:
            raise InputError(
                f"expected {name} of shape {tuple(tensor.shape)} in {checkpoint.path}, got {tuple(saved[name].shape)}; is the "
                f"rank in {CONFIG} the one of this checkpoint?"
            )
        tensor.copy_(saved[name])
