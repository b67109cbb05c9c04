"""Distils a causal language model on text (arXiv 1503.02531), beside a control group that sees the same text without a teacher.

accelerate launch recipes/lm_kd.py    # small GPT-2 layouts; or --teacher.path PATH --student.path PATH --data.path TEXT
stepdistill cache-logits              # asks a teacher once; then --teacher.cache DIR instead of its forward in each step
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepdistill.config import Parsed, run
from stepdistill.data.text import TextConfig
from stepdistill.export.config import NetworkExportConfig
from stepdistill.kd.evaluation import EvalConfig
from stepdistill.kd.language_model import LanguageModelKDConfig
from stepdistill.kd.pair import LMStudentConfig, LMTeacherConfig
from stepdistill.training.config import TrainConfig


@dataclass
class Recipe:
    """vocabulary is of a demo's tokenizer; control trains a student without teacher too; output_dir is the run folder."""

    teacher: LMTeacherConfig = field(default_factory=LMTeacherConfig)
    student: LMStudentConfig = field(default_factory=LMStudentConfig)
    data: TextConfig = field(default_factory=TextConfig)
    method: LanguageModelKDConfig = field(default_factory=LanguageModelKDConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: NetworkExportConfig = field(default_factory=NetworkExportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    vocabulary: int = 2048
    control: bool = True
    output_dir: str = "out/lm_kd"


def main(parsed: Parsed[Recipe]) -> None:
    from stepdistill.export.language_run import LanguageRun
    from stepdistill.kd.language_model import LanguageModelKD, NextToken
    from stepdistill.training.trainer import Trainer

    r = parsed.recipe
    trainer = Trainer(r.train, r.output_dir, parsed.yaml)
    lm = LanguageRun(r, trainer)
    students = {"student": lm.student()}
    taught: Any = lm.text
    if r.teacher.cache:
        taught = lm.pair.cached(lm.text, r.data)
        teacher, trainer.teacher = taught.teacher, taught.teacher.hashes
    else:
        teacher = lm.teacher(steps := r.teacher.steps(r.train.max_train_steps))
        if steps:
            trainer.fit(NextToken(teacher), lm.text, "teacher", steps=steps)
        teacher.frozen()
    before = lm.exam.perplexities({"before": students["student"]})
    method = LanguageModelKD(r.method, students["student"], teacher)
    if r.control:
        students["control"] = lm.student()
        trainer.fit(NextToken(students["control"]), lm.text, "control")
    trainer.fit(method, taught, "student", on_validate=lm.writer(students["student"]))
    if trainer.is_main:
        if r.teacher.cache and r.eval.teacher:
            teacher = lm.pair.live_teacher()  # a cache has nothing to say of other text
        lm.finish("lm_kd", {"teacher": teacher, **students}, before=before)


if __name__ == "__main__":
    run(Recipe, main, __doc__, demo=Path(__file__).parent / "configs" / "lm_kd_demo.yaml")
