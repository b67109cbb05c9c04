"""What a distillation recipe shows: samples while it trains, and at its end the table, the grid and the lines to paste."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..export.card import loading_lines, write_card
from ..export.sampling import sampling
from ..export.student import FACTS
from ..families import Model, TeacherConfig, load
from ..families.loading import DEMO_JUDGE
from ..methods.lcm import LCMConfig
from ..networks.denoiser import Denoiser
from .config import EvalConfig
from .demo import compare_with_teacher
from .generate import generate
from .grid import picture_grid
from .judge import Judge

REPOSITORY = Path(__file__).resolve().parents[2]


def sampler(
    model: Model, student: Denoiser, method: LCMConfig, prompts: Sequence[str] | None, folder: str | Path, seed: int = 0
) -> Callable[[int], None]:
    """A callback that writes `samples/<step>.png`: a row a prompt, a column a number of steps, one noise a row.

    Without prompts it does nothing. The noise depends on `seed` and the prompt's place alone, so pictures of one run compare.
    """
    plan = sampling(method, model)

    def sample(step: int) -> None:
        if not prompts:
            return
        pipe = model.pipeline(student)
        pipe.scheduler = type(plan.scheduler).from_config(plan.scheduler.config)
        with student.active():
            columns = {
                f"{steps} step{'s' * (steps > 1)}": generate(
                    pipe, prompts, steps=steps, guidance_scale=plan.guidance_scale, seed=seed
                )
                for steps in plan.steps
            }
        path = Path(folder) / "samples" / f"{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(path, columns, prompts)

    return sample


def finish(folder: str | Path, teacher: TeacherConfig, method: LCMConfig, config: EvalConfig) -> None:
    """The end of a run: on the demo teacher its table and picture grid, made with the exported files; then how to load them.

    The student is opened as any user would: a fresh stock pipeline with `folder` loaded into it.
    """
    if teacher.path == "demo" and config.images:
        student, bare = load(teacher), load(teacher)
        pipe = student.pipeline()
        pipe.load_lora_weights(str(folder))
        pipe.scheduler = sampling(method, student).scheduler
        compare_with_teacher(
            folder, pipe, bare.pipeline(), Judge.load(DEMO_JUDGE), REPOSITORY / config.results,
            steps=config.steps.ints(), n=config.images,
        )  # fmt: skip
        print(f"pictures: {Path(folder) / 'grid.png'}   table: {Path(folder) / 'table.md'}")
        info = json.loads((Path(folder) / FACTS).read_text(encoding="utf-8"))
        write_card(Path(folder), info, loading_lines(folder, teacher), Path(folder))  # now that there are scores for it
    print(f"\nload it in stock Diffusers:\n\n{loading_lines(folder, teacher)}")
