"""Distils a masked language model into some of its own layers (DistilBERT, arXiv 1910.01108), beside a control group.

accelerate launch recipes/distilbert.py    # a small BERT layout; or --teacher.path PATH --data.path TEXT
"""

from dataclasses import dataclass, field
from pathlib import Path

from stepdistill.config import Parsed, run
from stepdistill.data.masked import MaskingConfig
from stepdistill.data.text import TextConfig
from stepdistill.export.config import NetworkExportConfig
from stepdistill.kd.distilbert import DistilBERTConfig, ShallowConfig
from stepdistill.kd.masked_evaluation import MaskedEvalConfig
from stepdistill.kd.pair import LMTeacherConfig
from stepdistill.training.config import TrainConfig


@dataclass
class Recipe:
    """vocabulary is of a demo's tokenizer; control: without teacher; random: from random weights, with the teacher."""

    teacher: LMTeacherConfig = field(default_factory=LMTeacherConfig)
    student: ShallowConfig = field(default_factory=ShallowConfig)
    data: TextConfig = field(default_factory=TextConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    method: DistilBERTConfig = field(default_factory=DistilBERTConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: NetworkExportConfig = field(default_factory=NetworkExportConfig)
    eval: MaskedEvalConfig = field(default_factory=MaskedEvalConfig)
    vocabulary: int = 2048
    control: bool = True
    random: bool = False
    output_dir: str = "out/distilbert"


def main(parsed: Parsed[Recipe]) -> None:
    from stepdistill.data.masked import Alphabet, MaskedRows, framed_blocks
    from stepdistill.data.text import open_texts
    from stepdistill.export.hub import check_hub
    from stepdistill.export.masked_lm import finish, writer
    from stepdistill.export.transformer import weights_hash
    from stepdistill.kd.distilbert import DistilBERT
    from stepdistill.kd.masked import MaskedToken
    from stepdistill.kd.masked_evaluation import MaskedExamination
    from stepdistill.kd.pair import MASKED, Pair
    from stepdistill.training.trainer import Trainer

    r = parsed.recipe
    trainer, seed, recompute = Trainer(r.train, r.output_dir, parsed.yaml), r.train.seed, r.train.gradient_checkpointing
    check_hub(r.export, r.output_dir)
    texts, window = open_texts(r.data), r.data.block_size
    pair = Pair(MASKED, r.teacher, None, texts.train, r.vocabulary, window, seed, trainer.device)
    data = MaskedRows(framed_blocks(texts.train, pair.tokenizer, window), Alphabet.of(pair.tokenizer), r.masking)
    exam = MaskedExamination(texts.held_out, pair.tokenizer, window, r.eval, r.masking, r.train.validation_prompts)
    teacher = pair.teacher(trains=True)  # in float32, for the students begin with its weights
    layers = r.student.chosen(teacher.depth)
    if steps := r.teacher.steps(r.train.max_train_steps):
        trainer.fit(MaskedToken(teacher), data, "teacher", steps=steps)
    else:
        trainer.teacher = weights_hash(teacher)
    teacher.frozen()
    students = {"student": r.student.student(teacher, recompute)}
    before = exam.scores({"before": students["student"]})
    if r.random:
        students["random"] = r.student.student(teacher, recompute, seed + 1)
        trainer.fit(DistilBERT(r.method, students["random"], teacher, data.share), data, "random")
    if r.control:
        students["control"] = r.student.student(teacher, recompute)
        trainer.fit(MaskedToken(students["control"]), data, "control")
    method = DistilBERT(r.method, students["student"], teacher, data.share)
    trainer.fit(method, data, "student", on_validate=writer(exam, students["student"], r.output_dir))
    if trainer.is_main:
        finish(r.output_dir, pair, exam, {"teacher": teacher, **students}, layers, before, r.export)


if __name__ == "__main__":
    run(Recipe, main, __doc__, demo=Path(__file__).parent / "configs" / "distilbert_demo.yaml")
