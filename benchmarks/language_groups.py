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
    from stepdistill.export.language_run import LanguageRun
    from stepdistill.kd.language_model import NextToken
    from stepdistill.kd.pair import LMStudentConfig
    from stepdistill.training.trainer import Trainer

    layout = replace(parsed.recipe.teacher, path="demo")
    config = replace(parsed.recipe, teacher=layout, student=LMStudentConfig())
    trainer = Trainer(config.train, folder, parsed.yaml)
    lm = LanguageRun(config, trainer)
    teacher = lm.pair.teacher(trains=True)
    steps = layout.steps(before_distillation(config) or config.train.max_train_steps)
    trainer.fit(NextToken(teacher), lm.text, steps=steps)
    trainer.close()
    for part in (teacher.frozen().module, lm.pair.tokenizer):  # the tokenizer last: with it the folder is whole
        part.save_pretrained(str(folder / "model"))


def before_distillation(config: Any) -> int:
    """Steps that fine-tune the student first, where the recipe has them."""
    return int(vars(config).get("sft_steps", 0))


def train_control(folder: Path, parsed: Parsed[Any]) -> None:
    """The control group as the recipe trains it, on the batches that students without a control in their run see."""
    from stepdistill.export.language_run import LanguageRun
    from stepdistill.kd.language_model import NextToken
    from stepdistill.kd.networks import sizes
    from stepdistill.training.trainer import Trainer

    r = parsed.recipe
    trainer = Trainer(r.train, folder, parsed.yaml)
    lm = LanguageRun(r, trainer)
    student, teacher = lm.student(), lm.pair.teacher()
    if first := before_distillation(r):
        trainer.fit(NextToken(student), lm.text, "sft", steps=first)
    trainer.fit(NextToken(student), lm.text, CONTROL)
    trainer.close()
    models = {CONTROL: student, "teacher": teacher}
    found: dict[str, Any] = {"perplexity": lm.exam.perplexities(models), "parameters": sizes(models)}
    if new := vars(r.method).get("max_new_tokens"):  # a recipe of the student's own text
        _, judged = lm.prompted()
        found["own_text_reverse_kl"] = lm.own_text({CONTROL: student}, teacher, judged, new)
    (folder / FOUND).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
