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
    from stepdistill.data.text import open_texts
    from stepdistill.data.tokens import rows_of
    from stepdistill.export.hub import check_hub
    from stepdistill.export.language_model import finish, writer
    from stepdistill.export.transformer import weights_hash
    from stepdistill.kd.evaluation import Examination
    from stepdistill.kd.language_model import LanguageModelKD, NextToken
    from stepdistill.kd.pair import CAUSAL, Pair
    from stepdistill.training.trainer import Trainer

    r = parsed.recipe
    trainer = Trainer(r.train, r.output_dir, parsed.yaml)
    check_hub(r.export, r.output_dir)
    texts = open_texts(r.data)
    window, place = r.data.block_size, (trainer.device, trainer.weight_dtype)
    pair = Pair(CAUSAL, r.teacher, r.student, texts.train, r.vocabulary, window, r.train.seed, *place)
    data = rows_of(texts.train, pair.tokenizer, window)
    exam = Examination.of(texts.held_out, pair.tokenizer, window, r.eval, r.train.validation_prompts)
    students = {"student": pair.student(r.train.gradient_checkpointing)}
    taught: Any = data
    if r.teacher.cache:
        taught = pair.cached(data, r.data)
        teacher, trainer.teacher = taught.teacher, taught.teacher.hashes
    else:
        teacher = pair.teacher(trains=(steps := r.teacher.steps(r.train.max_train_steps)) > 0)
        if steps:
            trainer.fit(NextToken(teacher), data, "teacher", steps=steps)
        else:
            trainer.teacher = weights_hash(teacher)
        teacher.frozen()
    before = exam.perplexities({"before": students["student"]})
    method = LanguageModelKD(r.method, students["student"], teacher)
    if r.control:
        students["control"] = pair.student(r.train.gradient_checkpointing)
        trainer.fit(NextToken(students["control"]), data, "control")
    trainer.fit(method, taught, "student", on_validate=writer(exam, students["student"], r.output_dir))
    if trainer.is_main:
        teacher = pair.live_teacher() if r.teacher.cache else teacher  # a cache has nothing to say of other text
        finish(r.output_dir, "lm_kd", pair, exam, {"teacher": teacher, **students}, before, export=r.export)


if __name__ == "__main__":
    run(Recipe, main, __doc__, demo=Path(__file__).parent / "configs" / "lm_kd_demo.yaml")
