"""What a distillation recipe shows: samples while it trains, and at its end the table, the grid and the lines to paste."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..export.card import write_card
from ..export.config import ExportConfig
from ..export.folder import FACTS, read_facts
from ..export.hub import push
from ..export.lines import loading_lines
from ..export.sampling import Sampling
from ..families import Model, TeacherConfig
from ..families.loading import DEMO_JUDGE
from ..networks.denoiser import Denoiser
from .config import EvalConfig
from .contenders import open_contenders
from .demo import STUDENT, Entry, compare_with_teacher
from .features import JudgeFeatures
from .generate import generate
from .grid import picture_grid
from .judge import Judge
from .reference import Reference
from .yardstick import Yardstick, demo_yardstick

TIMES = ("timestep", "guidance")
REPOSITORY = Path(__file__).resolve().parents[2]


def sampler(
    model: Model,
    student: Denoiser,
    plan: Callable[[], Sampling],
    prompts: Sequence[str] | None,
    folder: str | Path,
    seed: int = 0,
) -> Callable[[int], None]:
    """A callback that writes `samples/<step>.png`: a row a prompt, a column a number of steps, one noise a row.

    Without prompts it does nothing. `plan` says how the student is sampled at that moment. The noise depends on `seed` and the
    prompt's place alone, so pictures of one run compare.

    Raises InputError, before the training, for prompts that the model does not read.
    """
    if prompts and "tokenizer" not in model.pipeline().components:
        raise InputError(f"expected no prompts for {model.name!r}, which reads none; drop --train.validation_prompts")

    def sample(step: int) -> None:
        if not prompts:
            return
        pipe, now = model.pipeline(student), plan()
        told: dict[int, dict[str, Any]] = {k: {"sigmas": now.sigmas[str(k)]} if now.sigmas else {} for k in now.steps}
        pipe.scheduler = type(now.scheduler).from_config(now.scheduler.config)
        with student.active(), _in_their_own_dtypes([student.module, *pipe.vae.children()]):
            columns = {
                f"{steps} step{'s' * (steps > 1)}": generate(
                    pipe,
                    prompts,
                    steps=steps,
                    guidance_scale=now.guidance_scale,
                    seed=seed,
                    **more,
                )
                for steps, more in told.items()
            }
        path = Path(folder) / "samples" / f"{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(path, columns, prompts)

    return sample


@contextmanager
def _in_their_own_dtypes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it each of the modules is given tensors in the dtype of its weights.

    A stock pipeline expects one dtype throughout. In training a teacher may be in half precision, beside a full student and
    an autoencoder that are not.
    """

    def cast(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        dtype = next(module.parameters()).dtype

        def own(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        # times stay as they are, as stock pipelines hand them to networks in half precision
        return tuple(own(v) for v in args), {name: v if name in TIMES else own(v) for name, v in kwargs.items()}

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(cast, with_kwargs=True).remove)
        yield


def finish(folder: str | Path, teacher: TeacherConfig, config: EvalConfig, export: ExportConfig | None = None) -> None:
    """The end of a run: on the demo teacher its table and picture grid, made with the exported files; then how to load them.

    The student is opened as any user would: a fresh stock pipeline with the export in `folder` loaded into it. Where `export`
    asks for it, all of that is uploaded.
    """
    folder = Path(folder)
    info = read_facts(folder)
    if teacher.path == "demo" and config.images:
        compare_on_the_demo(folder, [folder], config, config.steps.ints())
        write_card(folder, info, loading_lines(folder, info), folder)  # now that there are scores for it
    address = push(folder, export or ExportConfig())
    print(f"\nload it in stock Diffusers:\n\n{loading_lines(folder, info)}")
    if address:
        print(f"\nuploaded to {address}")


def finish_ladder(folder: str | Path, rungs: Sequence[Path], teacher: TeacherConfig, config: EvalConfig) -> None:
    """:func:`finish` for the rungs of a ladder, exports of one number of steps each: one table, one grid, all their cards.

    A rung that has been moved away since its training is left out.
    """
    folder, rungs = Path(folder), [rung for rung in rungs if (rung / FACTS).is_file()]
    if teacher.path == "demo" and config.images:
        compare_on_the_demo(folder, rungs, config)
    for rung in rungs:
        info = read_facts(rung)
        write_card(rung, info, loading_lines(rung, info), folder)
    print(f"\nload a rung in stock Diffusers, here that of {info['default_steps']}:\n\n{loading_lines(rung, info)}")


def compare_on_the_demo(
    folder: Path, exports: Sequence[Path], config: EvalConfig, steps: tuple[int, ...] | None = None
) -> None:
    """Table and grid of exports beside the demo teacher, at these steps or each at its own."""
    bare, *students = open_contenders("demo", [str(path) for path in exports])
    entries = []
    for student in students:
        student.name = STUDENT
        entries.append(Entry(student, steps or tuple(student.facts["steps"]), student.facts["guidance_scale"]))
    compare_with_teacher(folder, entries, bare, recipes_yardstick(config), REPOSITORY / config.results)
    print(f"pictures: {folder / 'grid.png'}   table: {folder / 'table.md'}")


def recipes_yardstick(config: EvalConfig) -> Yardstick:
    """What students of the demo teacher are measured with; real images are measured anew where no statistics were shipped."""
    judge = Judge.load(DEMO_JUDGE)
    try:
        reference = Reference.load(REPOSITORY / config.reference, JudgeFeatures(judge))
    except InputError as error:
        print(f"measuring real images anew, which takes a minute: {error}")
        reference = None
    return demo_yardstick(judge, (config.images,), reference=reference)
