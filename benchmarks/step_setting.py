"""What benchmarks/step_cost.py trains: pipelines from the demo's parts, noise as pictures, and a fit whose steps are timed."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from by_hand import ByHand, LADDByHand, LCMByHand, ProgressiveByHand
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.bench.latency import synchronise
from stepdistill.families.config import TeacherConfig
from stepdistill.method import Method, Phase
from stepdistill.methods.ladd import LADD, LADDConfig
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.methods.progressive import Progressive, ProgressiveConfig
from stepdistill.networks.lora import LoraSpec
from stepdistill.networks.network import Network
from stepdistill.randomness import StepRandom
from stepdistill.training.config import TrainConfig

SAMPLES = 64
RANK = 32
# what is trained: an adapter, a full student of progressive distillation in its first rung or its second, or either by LADD
LCM_LORA, FIRST_RUNG, SECOND_RUNG = "LCM-LoRA", "progressive, k = 5, guided", "progressive, k = 2"
LADD_FULL, LADD_LORA = "LADD, full", "LADD, LoRA"
# the demo's pipeline with another UNet: one so small that the loop shows, one so large that its weights do
UNETS: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 2},
    "demo": {},
    "wide": {"block_out_channels": (256, 512), "norm_num_groups": 32, "attention_head_dim": 8},
}


def clock() -> float:
    """Seconds of CPU time, or where there is an accelerator seconds after all its work is done."""
    if not torch.accelerator.is_available():
        return time.process_time()
    synchronise()
    return time.perf_counter()


def save_pipeline(folder: Path, unet: dict[str, Any], seed: int) -> str:
    """The demo's pipeline, with a UNet of this config where there is one; returns what `--teacher.path` would take."""
    if not unet:
        return "demo"
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from stepdistill.families.loading import DEMO_TEACHER

    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_TEACHER, safety_checker=None, use_safetensors=True)
    torch.manual_seed(seed)
    net = UNet2DConditionModel(
        **unet,
        sample_size=8,
        layers_per_block=1,
        cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipeline.register_modules(unet=net)
    pipeline.save_pretrained(folder)
    return str(folder)


def load(path: str) -> Any:
    """The model, where it computes."""
    from stepdistill import families

    model = families.load(TeacherConfig(path))
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


class Pictures:
    """Noise with captions: latents and embeddings as a cache holds them, or encoded anew on steps that `encodes` names."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self.encodes = model, lambda step: False
        side = model.resolution
        self.pixels = torch.rand((SAMPLES, 3, side, side), generator=torch.Generator().manual_seed(seed)) * 2 - 1
        self.prompts = [f"a red star number {i} left of a blue ring on plain white" for i in range(SAMPLES)]
        parts = [self.encode(range(i, i + 4)) for i in range(0, SAMPLES, 4)]  # few at once: peak memory is measured
        self.cached = tuple(torch.cat([part[i] for part in parts]).cpu() for i in range(3))

    def encode(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, std, prompt_embeds) of these pictures by the autoencoder and the text encoder."""
        mean, std = self.model.posterior(self.pixels[list(indices)])
        return mean, std, self.model.encode_prompts([self.prompts[i] for i in indices])["prompt_embeds"]

    def __len__(self) -> int:
        return SAMPLES

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        """As the data sets of stepdistill make one."""
        chosen = list(indices)
        mean, std, embeds = self.encode(chosen) if self.encodes(rng.step) else (v[chosen] for v in self.cached)
        x0 = mean + std * rng.to(mean.device).normal("posterior", mean.shape[1:])
        cond = {"prompt_embeds": embeds}
        return Batch(x0, cond, self.model.uncond(cond), rng)


class Turns(Method):
    """Trains as `method` does. Times each step from the end of the one before, and leaves `between(step)` out of it."""

    def __init__(self, method: Method, between: Callable[[int], None]) -> None:
        self.method, self.between = method, between
        self.seconds: list[float] = []
        self.began = math.nan  # the first step has no other before it

    def networks(self) -> dict[str, Network]:
        return self.method.networks()

    def phases(self) -> tuple[Phase, ...]:
        return self.method.phases()

    def watch(self, means: Mapping[str, float]) -> str:
        return self.method.watch(means)

    def after_step(self) -> None:
        self.method.after_step()
        self.seconds.append(clock() - self.began)
        self.between(self.step)
        self.began = clock()


def new_method(trained: str, model: Any, seed: int) -> LCM | Progressive | LADD:
    """What trains a student on this model's denoiser, with the method's default constants."""
    teacher, spec = model.denoiser, LoraSpec(RANK, RANK, tuple(model.denoiser.lora_targets))
    if trained == LCM_LORA:
        return LCM(LCMConfig(), teacher.with_lora(spec, seed=seed), teacher)
    if trained in (LADD_FULL, LADD_LORA):
        student = teacher.full_student() if trained == LADD_FULL else teacher.with_lora(spec, seed=seed)
        return LADD(LADDConfig(), student, teacher, model.latent_shape, model.conditions(model.examples), seed)
    ladder = Progressive(ProgressiveConfig(), teacher.full_student(), teacher)
    if trained == SECOND_RUNG:
        ladder.next_round()
    return ladder


class Setting:
    """A teacher, a student on it, and data: the same for the same arguments.

    Args:
        path: of the teacher, as :func:`save_pipeline` gives it.
        batch: images a step.
        seed: of the adapter, the data and the run.
        trained: `LCM_LORA`, `FIRST_RUNG`, `SECOND_RUNG`, `LADD_FULL` or `LADD_LORA`.
    """

    def __init__(self, path: str, batch: int, seed: int, trained: str = LCM_LORA) -> None:
        self.path, self.batch, self.seed, self.trained, self.model = path, batch, seed, trained, load(path)
        self.method = new_method(trained, self.model, seed)
        self.data = Pictures(self.model, seed)

    def loop(self) -> ByHand:
        """The loop written by hand, on this method's networks."""
        given = self.data.cached, self.model.encode_prompts([""])["prompt_embeds"], self.batch
        if isinstance(self.method, LADD):
            return LADDByHand(self.method, *given)
        return (
            LCMByHand(self.method, *given) if isinstance(self.method, LCM) else ProgressiveByHand(self.method, *given)
        )

    def by_hand(self) -> Iterator[float]:
        """Its steps; seconds of each."""
        return self.loop().steps(clock)

    def fit(self, steps: int, between: Callable[[int], None] = lambda step: None) -> list[float]:
        """Trains as recipes do, with `between(step)` after each step; seconds of each step without it, nan for the first."""
        from stepdistill.training.trainer import Trainer

        turns = Turns(self.method, between)
        config = TrainConfig(
            max_train_steps=steps, checkpointing_steps=steps, train_batch_size=self.batch, seed=self.seed, mixed_precision="no"
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, closing(Trainer(config, folder)) as trainer:
            trainer.fit(turns, self.data)
        return turns.seconds
