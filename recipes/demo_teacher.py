"""Makes the small Stable Diffusion teacher that ships with stepdistill: judge, eye, text model, autoencoder, UNet.

Each stage is a run of its own under output_dir; `--resume true` goes on where a killed one was.
"""

from dataclasses import dataclass, field
from pathlib import Path

from stepdistill.config import Parsed, run, write_config
from stepdistill.training.config import TrainConfig


def _train(
    steps: int, batch: int, lr: float, warmup: int, ema_decay: float | None = None, seed: int = 0
) -> TrainConfig:
    return TrainConfig(
        max_train_steps=steps, train_batch_size=batch, learning_rate=lr, lr_scheduler="cosine", lr_warmup_steps=warmup,
        ema_decay=ema_decay, checkpointing_steps=250, seed=seed,
    )  # fmt: skip


@dataclass
class Recipe:
    """One section of training options a stage (decoder: further training of the autoencoder's decoder alone).

    Attributes:
        images: pictures of the world that judge, eye, text model and autoencoder train on.
        unet_images: and those that the UNet does.
        start: folder with teacher/, judge/ and eye/ to start from, e.g. stepdistill/demo; random weights by default.
        output_dir: run folder; `teacher/`, `judge/` and `eye/` in it are what ships.
    """

    judge: TrainConfig = field(default_factory=lambda: _train(6000, 64, 2e-3, 200))
    eye: TrainConfig = field(default_factory=lambda: _train(1500, 64, 2e-3, 100, seed=7))
    text: TrainConfig = field(default_factory=lambda: _train(2500, 128, 2e-3, 100))
    autoencoder: TrainConfig = field(default_factory=lambda: _train(5000, 16, 8e-4, 20))
    decoder: TrainConfig = field(default_factory=lambda: _train(2500, 16, 5e-4, 20))
    unet: TrainConfig = field(default_factory=lambda: _train(8500, 64, 1e-3, 200, ema_decay=0.999))
    images: int = 20_000
    unet_images: int = 32_000
    start: str | None = None
    resume: bool = False
    output_dir: str = "out/demo_teacher"


def main(parsed: Parsed[Recipe]) -> None:
    from stepdistill.demo import making, teacher

    recipe, out = parsed.recipe, Path(parsed.recipe.output_dir)
    start = Path(recipe.start) if recipe.start else None
    for config in (recipe.judge, recipe.eye, recipe.text, recipe.autoencoder, recipe.decoder, recipe.unet):
        config.resume_from_checkpoint = "latest" if recipe.resume else None
    judge = making.make_judge(recipe.judge, out / "judge", recipe.images, start)
    making.make_eye(recipe.eye, out / "eye", recipe.images, start)
    text = making.make_text(recipe.text, out / "text", recipe.images, start)
    vae = making.make_autoencoder(recipe.autoencoder, recipe.decoder, out / "autoencoder", recipe.images, judge, start)
    unet = making.make_unet(recipe.unet, out / "unet", recipe.unet_images, text, vae, start)
    teacher.save(out / "teacher", teacher.tokenizer(), text, vae, unet)
    write_config(parsed, out)


if __name__ == "__main__":
    run(Recipe, main, __doc__)
