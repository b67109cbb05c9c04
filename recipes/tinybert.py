"""Distils an encoder for a task in two stages (TinyBERT, arXiv 1909.10351), beside a control group without a teacher.

accelerate launch recipes/tinybert.py    # small BERT layouts; or --teacher.path PATH --task.path DATA (and --data.path TEXT)
"""

from dataclasses import dataclass, field
from pathlib import Path

from stepdistill.config import Parsed, run
from stepdistill.data.labelled_text import TaskConfig
from stepdistill.data.text import TextConfig
from stepdistill.export.config import NetworkExportConfig
from stepdistill.kd.augmentation import AugmentConfig
from stepdistill.kd.encoders import EncoderStudentConfig, StagesConfig
from stepdistill.kd.pair import LMTeacherConfig
from stepdistill.kd.tinybert import TinyBERTConfig
from stepdistill.training.config import TrainConfig


@dataclass
class Recipe:
    """data is general text, task the labelled one; vocabulary is of a demo's tokenizer; control: words and labels alone."""

    teacher: LMTeacherConfig = field(default_factory=LMTeacherConfig)
    student: EncoderStudentConfig = field(default_factory=EncoderStudentConfig)
    data: TextConfig = field(default_factory=TextConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    method: TinyBERTConfig = field(default_factory=TinyBERTConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: NetworkExportConfig = field(default_factory=NetworkExportConfig)
    vocabulary: int = 2048
    control: bool = True
    output_dir: str = "out/tinybert"


def main(parsed: Parsed[Recipe]) -> None:
    from stepdistill.data.labelled_text import open_task, text_rows
    from stepdistill.data.text import open_texts
    from stepdistill.export.hub import check_hub
    from stepdistill.export.text_classifier import finish
    from stepdistill.export.transformer import weights_hash
    from stepdistill.kd.attention import Shape
    from stepdistill.kd.augmentation import Kept, augmented, check_words
    from stepdistill.kd.encoders import Encoders
    from stepdistill.kd.masked import MaskedToken
    from stepdistill.kd.text_classifier import TextLabels
    from stepdistill.kd.tinybert import TinyBERTLayers, TinyBERTPrediction, projection
    from stepdistill.training.trainer import Trainer

    r = parsed.recipe
    trainer, seed, s = Trainer(r.train, r.output_dir, parsed.yaml), r.train.seed, r.stages
    check_hub(r.export, r.output_dir)
    task, length = open_task(r.task), r.task.length
    texts = task.apart_from(open_texts(r.data).train)
    place = (max(r.data.block_size, length), task.train.classes, seed, trainer.device)
    encoders = Encoders(r.teacher, r.student, s.fine_tuned, texts, r.vocabulary, *place)
    whole, masked = encoders.general(texts, r.data.block_size)
    labelled, test = (text_rows(part, encoders.tokenizer, length) for part in (task.train, task.test))
    teacher = encoders.teacher()
    lone = encoders.student(Shape.of(teacher).heads)
    student = encoders.classifier(lone)
    student.checkpoint_activations(r.train.gradient_checkpointing)
    shared = projection(student, teacher, seed)
    general = TinyBERTLayers(r.method, student, teacher, shared)  # says what does not fit before anything trains
    check_words(r.augment, encoders.tokenizer, teacher)
    if s.general or s.intermediate:
        trainer.check(general)
        general.probe(place[0])
    if steps := r.teacher.steps(r.train.max_train_steps):
        trainer.fit(MaskedToken(teacher), masked, "teacher", steps=steps)
    tuned = encoders.tuned(teacher.frozen())
    if not steps:
        trainer.teacher = weights_hash(teacher)
    if s.tuning:
        trainer.fit(TextLabels(tuned), labelled, "fine-tuning", steps=s.tuning)
    else:
        trainer.teacher |= weights_hash(tuned, "fine-tuned")
    tuned.frozen()
    if s.general:
        trainer.fit(general, whole, "general", steps=s.general)
    kept = Kept(trainer.folder / "augmented", weights_hash, trainer.rank, trainer.world, trainer.wait)
    data = augmented(r.augment, task.train, teacher, encoders.tokenizer, length, seed, kept)
    if s.intermediate:
        trainer.fit(TinyBERTLayers(r.method, student, tuned, shared), data, "intermediate", steps=s.intermediate)
    trainer.fit(TinyBERTPrediction(r.method, student, tuned), data, "prediction")
    models = {"teacher": tuned, "student": student}
    if r.control:
        if s.general:
            trainer.fit(MaskedToken(lone), masked, "control-general", steps=s.general)
        models["control"] = encoders.classifier(lone)
        trainer.fit(TextLabels(models["control"]), labelled, "control", steps=s.intermediate + r.train.max_train_steps)
    if trainer.is_main:
        told = {"general": s.general, "intermediate": s.intermediate, "prediction": r.train.max_train_steps}
        finish(r.output_dir, encoders, models, test, told, len(labelled), general.map, r.export)


if __name__ == "__main__":
    run(Recipe, main, __doc__, demo=Path(__file__).parent / "configs" / "tinybert_demo.yaml")
