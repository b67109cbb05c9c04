"""The groups beside the students of benchmarks/language_students.py: one teacher for all, and a control a seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepdistill.config import Parsed

CONTROL, FOUND = "control", "control.json"


def train_teacher(folder: Path, parsed: Parsed[Any]) -> None:
    """The teacher of the recipe's demo with its tokenizer, for the recipe's number of steps, at the demo's rate."""
    from stepdistill.data.text import open_texts
    from stepdistill.data.tokens import rows_of
    from stepdistill.kd.language_model import NextToken
    from stepdistill.kd.pair import CAUSAL, LMStudentConfig, Pair
    from stepdistill.training.trainer import Trainer

    config = parsed.recipe
    layout = replace(config.teacher, path="demo")
    steps = layout.steps(before_distillation(config) or config.train.max_train_steps)
    texts, window = open_texts(config.data), config.data.block_size
    trainer = Trainer(config.train, folder, parsed.yaml)
    pair = Pair(
        CAUSAL, layout, LMStudentConfig(), texts.train, config.vocabulary, window, config.train.seed, trainer.device
    )
    teacher = pair.teacher(trains=True)
    trainer.fit(NextToken(teacher), rows_of(texts.train, pair.tokenizer, window), steps=steps)
    trainer.close()
    for part in (teacher.frozen().module, pair.tokenizer):  # the tokenizer last: with it the folder is whole
        part.save_pretrained(str(folder / "model"))


def before_distillation(config: Any) -> int:
    """Steps that fine-tune the student first, where the recipe has them."""
    return int(vars(config).get("sft_steps", 0))


def train_control(folder: Path, parsed: Parsed[Any]) -> None:
    """The control group as the recipe trains it, on the batches that students without a control in their run see."""
    from stepdistill.data.text import open_texts
    from stepdistill.data.tokens import rows_of
    from stepdistill.kd.evaluation import Examination, own_text_divergence
    from stepdistill.kd.language_model import NextToken
    from stepdistill.kd.networks import sizes
    from stepdistill.kd.pair import CAUSAL, Pair
    from stepdistill.training.trainer import Trainer

    r = parsed.recipe
    trainer = Trainer(r.train, folder, parsed.yaml)
    texts, window = open_texts(r.data), r.data.block_size
    pair = Pair(
        CAUSAL,
        r.teacher,
        r.student,
        texts.train,
        r.vocabulary,
        window,
        r.train.seed,
        trainer.device,
        trainer.weight_dtype,
    )
    data = rows_of(texts.train, pair.tokenizer, window)
    exam = Examination.of(texts.held_out, pair.tokenizer, window, r.eval)
    student, teacher = pair.student(r.train.gradient_checkpointing), pair.teacher()
    if first := before_distillation(r):
        trainer.fit(NextToken(student), data, "sft", steps=first)
    trainer.fit(NextToken(student), data, CONTROL)
    trainer.close()
    models = {CONTROL: student, "teacher": teacher}
    found: dict[str, Any] = {"perplexity": exam.perplexities(models), "parameters": sizes(models)}
    if new := vars(r.method).get("max_new_tokens"):  # a recipe of the student's own text
        judged = rows_of(texts.held_out, pair.tokenizer, window, r.data.prompt)
        end = pair.tokenizer.eos_token_id
        found["own_text_reverse_kl"] = {CONTROL: own_text_divergence(student, teacher, judged, new, end)}
    (folder / FOUND).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
