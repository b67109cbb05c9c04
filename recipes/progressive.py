"""Progressive distillation (arXiv 2202.00512): a ladder of students, each of half the steps, down to 1.

accelerate launch recipes/progressive.py   # the demo teacher; or --config recipes/configs/progressive_sd2.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path

from stepdistill import families
from stepdistill.bench.config import EvalConfig
from stepdistill.config import Parsed, run
from stepdistill.data.config import DataConfig
from stepdistill.export.config import ExportConfig
from stepdistill.methods.progressive import ProgressiveConfig
from stepdistill.networks.lora import StudentConfig
from stepdistill.training.config import TrainConfig


@dataclass
class Recipe:
    """output_dir is the run folder; each rung has a folder of its own in it, rungs/8 for the student of 8 steps.

    Attributes:
        guidance_steps: optimizer steps of the guidance distillation (arXiv 2210.03142) before the ladder; 0 leaves it out:
            the first rung's teacher then makes two evaluations a step.
    """

    teacher: families.TeacherConfig = field(default_factory=families.TeacherConfig)
    student: StudentConfig = field(default_factory=lambda: StudentConfig(kind="full"))
    data: DataConfig = field(default_factory=DataConfig)
    method: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output_dir: str = "out/progressive"
    guidance_steps: int = 0


def main(parsed: Parsed[Recipe]) -> None:
    from stepdistill.bench.finish import finish_ladder, sampler
    from stepdistill.data.latents import cache_latents
    from stepdistill.data.open import open_source
    from stepdistill.export.folder import rung_folder
    from stepdistill.export.progressive import check_rungs, progressive_sampling
    from stepdistill.export.student import export_student
    from stepdistill.methods.guidance_distill import GuidanceDistill
    from stepdistill.methods.progressive import Progressive
    from stepdistill.training.trainer import Trainer

    r, w = parsed.recipe, parsed.recipe.method.guidance()
    trainer = Trainer(r.train, r.output_dir, parsed.yaml)
    source = open_source(r.data)
    model = families.load(r.teacher, trainer.weight_dtype).to(trainer.device)
    trainer.teacher = model.denoiser_hash()
    student = model.denoiser.student(r.student, r.train.seed, embed_guidance=w.w_min < w.w_max)
    r.method.check(student, model.denoiser)
    student.checkpoint_activations(r.train.gradient_checkpointing)
    plans = {n: progressive_sampling(r.method, model, n, student.takes_guidance) for n in r.method.ladder()}
    check_rungs(r.output_dir, model, r.teacher, plans)
    data = cache_latents(model, source, r.data, rank=trainer.rank, world=trainer.world, wait=trainer.wait)
    if r.guidance_steps:
        trainer.fit(GuidanceDistill(w, student, model.denoiser), data, name="guidance", steps=r.guidance_steps)
        model.set_aside(student)
    method = Progressive(r.method, student, teacher=None if r.guidance_steps else model.denoiser)
    samples = sampler(model, student, lambda: plans[method.steps], r.train.validation_prompts, r.output_dir)

    def rung(_: int) -> None:
        if trainer.is_main:
            samples(trainer.step)
            place = rung_folder(r.output_dir, method.steps)
            export_student(place, model, student, r.teacher, plans[method.steps], r.export, r.output_dir)
        model.set_aside(student)  # a full student is the teacher of the next rung

    trainer.fit(method, data, name="ladder", on_validate=samples, on_round=rung)
    if trainer.is_main:
        finish_ladder(r.output_dir, [rung_folder(r.output_dir, n) for n in plans], r.teacher, r.eval)


if __name__ == "__main__":
    run(Recipe, main, __doc__, demo=Path(__file__).parent / "configs" / "progressive_demo.yaml")
