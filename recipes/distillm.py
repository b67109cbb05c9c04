"""Distils a language model on text and its own, replayed (DistiLLM, arXiv 2402.03898), after a fine-tuning.

accelerate launch recipes/distillm.py    # small GPT-2 layouts; or --teacher.path PATH --student.path PATH --data.path PROMPTS
"""

from dataclasses import dataclass, field
from pathlib import Path

from stepdistill.config import Parsed, run
from stepdistill.data.text import TextConfig
from stepdistill.export.config import NetworkExportConfig
from stepdistill.kd.distillm import DistiLLMConfig
from stepdistill.kd.evaluation import EvalConfig
from stepdistill.kd.pair import LMStudentConfig, LMTeacherConfig
from stepdistill.training.config import TrainConfig


@dataclass
class Recipe:
    """sft_steps fine-tune the student first; control goes on with that for as long; vocabulary is of a demo."""

    teacher: LMTeacherConfig = field(default_factory=LMTeacherConfig)
    student: LMStudentConfig = field(default_factory=LMStudentConfig)
    data: TextConfig = field(default_factory=TextConfig)
    method: DistiLLMConfig = field(default_factory=DistiLLMConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: NetworkExportConfig = field(default_factory=NetworkExportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sft_steps: int = 0
    vocabulary: int = 2048
    control: bool = True
    output_dir: str = "out/distillm"


def main(parsed: Parsed[Recipe]) -> None:
    from stepdistill.export.language_run import LanguageRun
    from stepdistill.kd.distillm import DistiLLM
    from stepdistill.kd.language_model import NextToken
    from stepdistill.training.trainer import Trainer

    r = parsed.recipe
    trainer = Trainer(r.train, r.output_dir, parsed.yaml)
    lm = LanguageRun(r, trainer)
    prompted, judged = lm.prompted()
    student, teacher = lm.student(), lm.teacher(steps := r.teacher.steps(r.sft_steps))
    method = DistiLLM(r.method, student, teacher, prompted, judged, lm.end, r.train.max_train_steps)
    trainer.check(method)  # before other fits take their time
    if steps:
        trainer.fit(NextToken(teacher), lm.text, "teacher", steps=steps)
    teacher.frozen()
    if r.sft_steps:
        trainer.fit(NextToken(student), lm.text, "sft", steps=r.sft_steps)
    students = {"student": student}
    if r.control:
        students["control"] = lm.student().copy_from(student)
        trainer.fit(NextToken(students["control"]), lm.text, "control")
    trainer.fit(method, prompted, "student", on_validate=lm.writer(student))
    if trainer.is_main:
        own = lm.own_text(students, teacher, judged, r.method.max_new_tokens)
        lm.finish("distillm", {"teacher": teacher, **students}, own_text=own)


if __name__ == "__main__":
    run(Recipe, main, __doc__, demo=Path(__file__).parent / "configs" / "distillm_demo.yaml")
