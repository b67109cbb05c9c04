"""Adversarial diffusion distillation (ADD, arXiv 2311.17042): a student of 1-4 steps, judged by its decoded pictures.

accelerate launch recipes/add.py     # the demo teacher; or --teacher.path PATH --data.path FOLDER (or prompts.txt)
"""

from dataclasses import dataclass, field
from pathlib import Path

from stepdistill import families
from stepdistill.bench.config import EvalConfig
from stepdistill.config import Parsed, run
from stepdistill.data.config import DataConfig
from stepdistill.export.config import ExportConfig
from stepdistill.methods.add import ADD, ADDConfig
from stepdistill.networks.lora import StudentConfig
from stepdistill.training.config import TrainConfig


@dataclass
class Recipe:
    """output_dir is the run folder: weights, scheduler, model card, metrics, checkpoints, samples."""

    teacher: families.TeacherConfig = field(default_factory=families.TeacherConfig)
    eye: families.EyeConfig = field(default_factory=families.EyeConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: ADDConfig = field(default_factory=ADDConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output_dir: str = "out/add"


def main(parsed: Parsed[Recipe]) -> None:
    from stepdistill.bench.finish import finish, sampler
    from stepdistill.data.latents import cache_latents
    from stepdistill.data.open import open_source
    from stepdistill.export.hub import check_hub
    from stepdistill.export.ladd import add_sampling
    from stepdistill.export.student import export_student
    from stepdistill.training.trainer import Trainer

    r = parsed.recipe
    trainer = Trainer(r.train, r.output_dir, parsed.yaml)
    check_hub(r.export, r.output_dir)
    source = open_source(r.data)
    eye = families.open_eye(r.eye, r.method.taps).to(trainer.device)
    model = families.load(r.teacher, trainer.weight_dtype).to(trainer.device)
    trainer.teacher = model.denoiser_hash()
    student = model.denoiser.student(r.student, r.train.seed)
    model.checkpoint_activations(student, r.train.gradient_checkpointing)
    method = ADD(r.method, student, model.denoiser, eye, model.decode, *model.example(), r.train.seed)
    plan = add_sampling(r.method, model)
    samples = sampler(model, student, lambda: plan, r.train.validation_prompts, r.output_dir)
    data = cache_latents(model, source, r.data, rank=trainer.rank, world=trainer.world, wait=trainer.wait)
    trainer.fit(method, data, on_validate=samples)
    if trainer.is_main:
        samples(trainer.step)
        export_student(r.output_dir, model, student, r.teacher, plan, r.export)
        finish(r.output_dir, r.teacher, r.eval, r.export)


if __name__ == "__main__":
    run(Recipe, main, __doc__, demo=Path(__file__).parent / "configs" / "add_demo.yaml")
