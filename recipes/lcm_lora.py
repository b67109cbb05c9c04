"""LCM-LoRA (arXiv 2311.05556): an adapter that lets a Stable Diffusion model sample in 1-8 steps.

accelerate launch recipes/lcm_lora.py     # the demo teacher; or --config recipes/configs/lcm_lora_sd15.yaml --data.path FOLDER
"""

from dataclasses import dataclass, field
from pathlib import Path

from stepdistill import families
from stepdistill.bench.config import EvalConfig
from stepdistill.config import Parsed, run
from stepdistill.data.images import DataConfig, open_images
from stepdistill.export.config import ExportConfig
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.networks.lora import StudentConfig
from stepdistill.training.config import TrainConfig

DEMO = Path(__file__).resolve().parent / "configs" / "lcm_lora_demo.yaml"


@dataclass
class Recipe:
    """output_dir is the run folder: adapter, scheduler, model card, metrics, checkpoints, samples."""

    teacher: families.TeacherConfig = field(default_factory=families.TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: LCMConfig = field(default_factory=LCMConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output_dir: str = "out/lcm_lora"


def main(parsed: Parsed[Recipe]) -> None:
    from stepdistill.bench.finish import finish, sampler
    from stepdistill.data.latents import cache_latents
    from stepdistill.export.student import export_student
    from stepdistill.training.trainer import Trainer

    r = parsed.recipe
    trainer = Trainer(r.train, r.output_dir, parsed.yaml)
    images = open_images(r.data)
    model = families.load(r.teacher, trainer.weight_dtype).to(trainer.device)
    student = model.denoiser.with_lora(r.student.spec(model.denoiser.lora_targets), seed=r.train.seed)
    student.checkpoint_activations(r.train.gradient_checkpointing)
    method = LCM(r.method, student, teacher=model.denoiser)
    size, folder = r.data.resolution or model.resolution, r.data.cache_folder()
    data = cache_latents(model, images, size, folder, r.data.encode_batch_size, main=trainer.is_main, wait=trainer.wait)

    samples = sampler(model, student, r.method, r.train.validation_prompts, r.output_dir)
    trainer.fit(method, data, on_validate=samples)
    if trainer.is_main:
        samples(trainer.step)
        export_student(r.output_dir, model, student, r.teacher, r.method, r.export)
        finish(r.output_dir, r.teacher, r.method, r.eval)


if __name__ == "__main__":
    run(Recipe, main, __doc__, demo=DEMO)
