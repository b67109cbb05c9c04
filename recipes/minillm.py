"""Distils a language model on what it and its teacher write (MiniLLM, arXiv 2306.08543), after a fine-tuning.

accelerate launch recipes/minillm.py    # small GPT-2 layouts; or --teacher.path PATH --student.path PATH --data.path PROMPTS
"""

from dataclasses import dataclass, field
from pathlib import Path

from stepdistill.config import Parsed, run
from stepdistill.data.text import TextConfig
from stepdistill.export.config import NetworkExportConfig
from stepdistill.kd.evaluation import EvalConfig
from stepdistill.kd.minillm import MiniLLMConfig
from stepdistill.kd.pair import LMStudentConfig, LMTeacherConfig
from stepdistill.training.config import TrainConfig


@dataclass
class Recipe:
    """sft_steps fine-tune the student first; control goes on with that for as long; vocabulary is of a demo."""

    teacher: LMTeacherConfig = field(default_factory=LMTeacherConfig)
    student: LMStudentConfig = field(default_factory=LMStudentConfig)
    data: TextConfig = field(default_factory=TextConfig)
    method: MiniLLMConfig = field(default_factory=MiniLLMConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: NetworkExportConfig = field(default_factory=NetworkExportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sft_steps: int = 0
    vocabulary: int = 2048
    control: bool = True
    output_dir: str = "out/minillm"


def main(parsed: Parsed[Recipe]) -> None:
    from stepdistill.data.text import open_texts
    from stepdistill.data.tokens import rows_of
    from stepdistill.export.hub import check_hub
    from stepdistill.export.language_model import finish, writer
    from stepdistill.export.transformer import weights_hash
    from stepdistill.kd.evaluation import Examination, own_text_divergence
    from stepdistill.kd.language_model import NextToken
    from stepdistill.kd.minillm import MiniLLM
    from stepdistill.kd.pair import CAUSAL, Pair
    from stepdistill.training.trainer import Trainer

    r = parsed.recipe
    trainer = Trainer(r.train, r.output_dir, parsed.yaml)
    check_hub(r.export, r.output_dir)
    texts = open_texts(r.data)
    window, place = r.data.block_size, (trainer.device, trainer.weight_dtype)
    pair = Pair(CAUSAL, r.teacher, r.student, texts.train, r.vocabulary, window, r.train.seed, *place)
    prompted, judged = (rows_of(t, pair.tokenizer, window, r.data.prompt) for t in (texts.train, texts.held_out))
    exam = Examination.of(texts.held_out, pair.tokenizer, window, r.eval, r.train.validation_prompts)
    student, end = pair.student(r.train.gradient_checkpointing), pair.tokenizer.eos_token_id
    teacher = pair.teacher(trains=(steps := r.teacher.steps(r.sft_steps)) > 0)
    method = MiniLLM(r.method, student, teacher, prompted, end)
    text = rows_of(texts.train, pair.tokenizer, window) if steps or r.sft_steps or r.control else prompted
    if steps:
        trainer.fit(NextToken(teacher), text, "teacher", steps=steps)
    else:
        trainer.teacher = weights_hash(teacher)
    teacher.frozen()
    if r.sft_steps:
        trainer.fit(NextToken(student), text, "sft", steps=r.sft_steps)
    students = {"student": student}
    if r.control:
        students["control"] = pair.student(r.train.gradient_checkpointing).copy_from(student)
        trainer.fit(NextToken(students["control"]), text, "control")
    trainer.fit(method, prompted, "student", on_validate=writer(exam, student, r.output_dir))
    if trainer.is_main:
        new = r.method.max_new_tokens
        own = {name: own_text_divergence(lm, teacher, judged, new, end) for name, lm in students.items()}
        finish(r.output_dir, "minillm", pair, exam, {"teacher": teacher, **students}, own_text=own, export=r.export)


if __name__ == "__main__":
    run(Recipe, main, __doc__, demo=Path(__file__).parent / "configs" / "minillm_demo.yaml")
