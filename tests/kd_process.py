"""Distillation in one process or in several: `[torchrun] kd_process.py FOLDER`, from the tests of kd/. A global batch of 8."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import encoders
import torch
from cloze import framed, sage
from language import END, FULL, llama, student, teacher, uneven
from toys import options

from stepdistill.kd.distilbert import DistilBERT, DistilBERTConfig, ShallowConfig
from stepdistill.kd.distillm import DistiLLM, DistiLLMConfig
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.gkd import GKD, GKDConfig
from stepdistill.kd.language_model import LanguageModelKD, LanguageModelKDConfig, NextToken
from stepdistill.kd.minillm import MiniLLM, MiniLLMConfig
from stepdistill.kd.networks import CausalLM
from stepdistill.kd.tinybert import TinyBERTConfig, TinyBERTLayers, TinyBERTPrediction, projection
from stepdistill.method import Method
from stepdistill.training.trainer import Trainer


def fit(folder: Path, method: Method, data: Any = None, **changes: Any) -> None:
    """Four steps; rows of other lengths, so that processes have other numbers of tokens."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    train = {
        "max_train_steps": 4,
        "train_batch_size": 8 // world,
        "adam_epsilon": 1e-2,
        "learning_rate": 3e-3,
        "seed": 3,
    }
    Trainer(options(**{**train, **changes}), folder).fit(method, data or uneven(prompt=4))


def tinybert(folder: Path) -> None:
    """A stage of layers, in which the head waits and a projection trains too, then the answers."""
    pupil, wise, config = encoders.student(), encoders.teacher(), TinyBERTConfig()
    for name, method in (
        ("layers", lambda: TinyBERTLayers(config, pupil, wise, projection(pupil, wise, 5))),
        ("answers", lambda: TinyBERTPrediction(config, pupil, wise)),
    ):
        fit(folder / name, method(), encoders.texts())


def untied() -> CausalLM:
    """A student whose embedding and head are two, as sharing weights out wants it."""
    return CausalLM(llama(1, tie_word_embeddings=False)).student(FULL)


def minillm() -> MiniLLM:
    """With all that needs more than a micro-batch of its own."""
    config = MiniLLMConfig(max_new_tokens=5, whitened=True, lm_weight=0.3)
    return MiniLLM(config, student(), teacher(), uneven(prompt=4), END)


def distillm() -> DistiLLM:
    """With all three kinds of steps, and a threshold that rises."""
    config = DistiLLMConfig(threshold=0.7, capacity=12, validate_every=2, tolerance=-10.0, max_new_tokens=5)
    return DistiLLM(config, student(), teacher(), uneven(prompt=4), uneven(count=10, prompt=2), END, 8)


def everything(folder: Path) -> None:
    """What 1 and 2 processes must agree on. With fsdp the second has half of the student, and whole logits."""
    kd = LanguageModelKDConfig(Divergence("jsd"), ce_weight=0.3)
    fit(folder / "kd", LanguageModelKD(kd, student(), teacher()), ema_decay=0.9)
    fit(folder / "plain", NextToken(student()))
    fit(folder / "gkd", GKD(GKDConfig(0.5, max_new_tokens=5), student(), teacher(), uneven(prompt=4), END))
    fit(folder / "minillm", minillm())
    fit(folder / "distillm", distillm(), max_train_steps=8, seed=5)
    masked, deep = framed(), sage(layers=4)
    triple = DistilBERT(DistilBERTConfig(), ShallowConfig().student(deep), deep, masked.share)
    fit(folder / "distilbert", triple, masked)
    fit(folder / "fsdp", LanguageModelKD(kd, untied(), teacher()), parallel="fsdp")
    tinybert(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    everything(Path(sys.argv[1]))
