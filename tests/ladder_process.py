"""A ladder killed with -9: `python ladder_process.py full|lora FOLDER`, from the tests of progressive distillation.

FOLDER/whole, and FOLDER/killed in lives that end in the callback of the second rung's end, within the change of rungs,
within the checkpoint that follows it, and in the third rung. Prints the exit codes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from ladders import ladder
from toy_process import die, import_for_all, life
from toys import Numbers, options, stopping_after

from stepdistill.methods.progressive import Progressive
from stepdistill.training.checkpoint import CheckpointStore
from stepdistill.training.trainer import Trainer

STEPS = 4  # of each rung


def climb(folder: Path, method: Progressive, on_round: Callable[[int], None] | None = None) -> None:
    """The whole ladder, or the rest of it."""
    config = options(
        max_train_steps=STEPS, ema_decay=0.5, checkpointing_steps=3, resume_from_checkpoint="latest", lr_scheduler="linear"
    )  # fmt: skip
    Trainer(config, folder).fit(method, Numbers(), on_round=on_round)


def within_the_rung(folder: Path, method: Progressive) -> None:
    """In the second step of the third rung."""
    with stopping_after(method, 2 * STEPS + 2, die):
        climb(folder, method)


def at_its_end(folder: Path, method: Progressive) -> None:
    """In the callback, of the second rung."""
    climb(folder, method, on_round=lambda number: die() if number == 1 else None)


def within_the_change(folder: Path, method: Progressive) -> None:
    """To the third rung: the teacher has its new weights, and nothing is saved."""
    original = method.next_round

    def next_round() -> bool:
        more = original()
        if method.rung == 2:
            die()
        return more

    method.next_round = next_round  # type: ignore[method-assign]
    climb(folder, method)


def within_the_checkpoint(folder: Path, method: Progressive) -> None:
    """Which is of the third rung's start: its files are written, and not yet in place."""
    original = CheckpointStore._commit
    CheckpointStore._commit = lambda *args: die() if method.rung == 2 else original(*args)  # type: ignore[method-assign]
    climb(folder, method)


def main() -> None:
    torch.set_num_threads(1)
    kind, folder = sys.argv[1], Path(sys.argv[2])
    import_for_all("accelerate", *(("peft", "diffusers.loaders.peft") if kind == "lora" else ()))
    torch.optim.AdamW([torch.zeros(1)])  # which imports a compiler
    codes = []
    for death in (at_its_end, within_the_change, within_the_checkpoint, within_the_rung, climb):
        codes.append(life(lambda place, death=death: death(place, ladder(kind)), folder / "killed", None, 0.0))
    codes.append(life(lambda place: climb(place, ladder(kind)), folder / "whole", None, 0.0))
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
