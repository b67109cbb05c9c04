"""A recipe killed with -9: `python recipe_process.py progressive|ladd full|lora FOLDER`, from the tests of the recipes.

FOLDER/whole, and FOLDER/killed in lives that end

progressive    after the guidance distillation, in the export of the second rung, within the change of rungs, and in the third
               rung after a checkpoint of it; the LoRA has no guidance distillation, and its teacher two evaluations a step
ladd           in the discriminator's phase, between the two phases, after both, in a checkpoint, and in the export

Prints the exit codes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recipe_runs import load_recipe, run_in_process
from tiny import tiny_images, tiny_pipeline
from toy_process import die, import_for_all, life

from stepdistill.export import student as exporting
from stepdistill.methods.ladd import LADD
from stepdistill.methods.progressive import Progressive
from stepdistill.training.checkpoint import CheckpointStore

STEPS = 3  # of each rung
GUIDANCE = {"full": 2, "lora": 0}  # steps of the guidance distillation


def words(folder: Path, output_dir: Path, kind: str, *more: object) -> list[object]:
    """What the tiny ladder is started with; the pipeline and the images lie in FOLDER."""
    return [
        *common(folder, output_dir, kind), "--guidance_steps", GUIDANCE[kind], "--method.teacher_steps", "8",
        "--method.rungs", "4,2,1", "--train.max_train_steps", STEPS, *more,
    ]  # fmt: skip


def ladd_words(folder: Path, output_dir: Path, kind: str, *more: object) -> list[object]:
    """The same for LADD: six steps, in which the warm-up ends, and R1 and the guard's look come on every second."""
    return [
        *common(folder, output_dir, kind), "--method.head_width", "8", "--method.warmup_steps", "3", "--method.r1_every", "2",
        "--method.guard_every", "2", "--method.discriminator_rate", "2", "--train.max_train_steps", "6", *more,
    ]  # fmt: skip


def common(folder: Path, output_dir: Path, kind: str) -> list[object]:
    """What both recipes are told."""
    return [
        "--teacher.path", folder / "sd", "--data.path", folder / "images", "--data.cache_dir", folder / "cache",
        "--data.resolution", "32", "--student.kind", kind, "--student.rank", "4", "--train.train_batch_size", "2",
        "--train.checkpointing_steps", "2", "--train.learning_rate", "1e-3", "--train.ema_decay", "0.5",
        "--output_dir", output_dir,
    ]  # fmt: skip


def make_inputs(folder: Path) -> None:
    """The teacher and the images."""
    tiny_pipeline(folder / "sd", prediction_type="v_prediction")
    tiny_images(folder / "images", count=4)


def before_the_ladder(_first: int) -> None:
    """The guidance distillation is over, and the ladder has not begun."""
    Progressive.__init__ = lambda *_, **__: die()  # type: ignore[method-assign]


def in_the_export(_first: int) -> None:
    """Of the second rung: all is written, and nothing in its place."""
    original = exporting.commit
    exporting.commit = lambda source, place: die() if place.name == "2" else original(source, place)


def in_the_change(_first: int) -> None:
    """To the third rung: it is exported, the teacher has its new weights, and no checkpoint says so."""
    original = Progressive.next_round

    def next_round(method: Progressive) -> bool:
        more = original(method)
        if method.rung == 2:
            die()
        return more

    Progressive.next_round = next_round  # type: ignore[method-assign]


def in_the_third_rung(first: int) -> None:
    """In its third step; a checkpoint of its first or second is there."""
    original = Progressive.training_step

    def training_step(method: Progressive, batch: Any) -> Any:
        if method.step == first + 3 * STEPS - 1:
            die()
        return original(method, batch)

    Progressive.training_step = training_step  # type: ignore[method-assign]


def in_the_discriminators_phase(_first: int) -> None:
    """Of the third step."""
    dying_in("discriminate", step=2)


def between_the_phases(_first: int) -> None:
    """Of the fifth step: the discriminator has made it, and the student has not."""
    dying_in("deceive", step=4)


def after_both(_first: int) -> None:
    """Of the last step's phases; what the method counts has not moved."""
    dying_in("after_step", step=5)


def dying_in(name: str, step: int) -> None:
    """At the beginning of this method of LADD, in this step."""
    original = getattr(LADD, name)
    setattr(LADD, name, lambda method, *given: die() if method.step == step else original(method, *given))


def in_the_last_checkpoint(_first: int) -> None:
    """All of it is written, and it has not its name."""
    original = CheckpointStore._commit

    def commit(store: CheckpointStore, temp: Path, final: Path) -> None:
        if final.name == "6":
            die()
        original(store, temp, final)

    CheckpointStore._commit = commit  # type: ignore[method-assign]


def in_the_only_export(_first: int) -> None:
    """All is written, and nothing in its place."""
    exporting.commit = die


def survives(_first: int) -> None:
    """To the end."""


DEATHS: dict[str, tuple[Callable[[int], None], ...]] = {
    "progressive": (before_the_ladder, in_the_export, in_the_change, in_the_third_rung),
    "ladd": (in_the_discriminators_phase, between_the_phases, after_both, in_the_last_checkpoint, in_the_only_export),
}


def main() -> None:
    torch.set_num_threads(1)
    name, kind, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    make_inputs(folder)
    import_for_all(
        "accelerate", "peft", "diffusers.loaders.peft", "stepdistill.bench.finish", "stepdistill.data.open",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "diffusers.schedulers.scheduling_ddim",
    )  # fmt: skip
    torch.optim.AdamW([torch.zeros(1)])  # which imports a compiler
    recipe, given = load_recipe(name), {"progressive": words, "ladd": ladd_words}[name]

    def dying(death: Callable[[int], None]) -> Callable[[Path], None]:
        def run(output_dir: Path) -> None:
            death(GUIDANCE[kind])
            run_in_process(recipe, given(folder, output_dir, kind, "--train.resume_from_checkpoint", "latest"))

        return run

    deaths = [death for death in DEATHS[name] if death is not before_the_ladder or GUIDANCE[kind]]
    codes = [life(dying(death), folder / "killed", None, 0.0) for death in [*deaths, survives]]
    codes.append(life(dying(survives), folder / "whole", None, 0.0))
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
