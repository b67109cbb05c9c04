"""Distils an image classifier (Hinton et al., arXiv 1503.02531): ResNet-34 to ResNet-18, several temperatures, a control group.

accelerate launch recipes/hinton.py    # one object of the demo world; or --data.path FOLDER, or --data.path cifar10
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from stepdistill.config import CommaList, Parsed, run
from stepdistill.data.labelled import LabelledConfig
from stepdistill.export.config import NetworkExportConfig
from stepdistill.kd.classifiers import ClassifierConfig
from stepdistill.kd.hinton import HintonConfig
from stepdistill.training.config import TrainConfig


@dataclass
class Recipe:
    """temperatures are tried beside the method's own, whose first student is exported; control: as many see labels alone."""

    teacher: ClassifierConfig = field(default_factory=lambda: ClassifierConfig(depths=CommaList.parse("3,4,6,3")))
    student: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: LabelledConfig = field(default_factory=LabelledConfig)
    method: HintonConfig = field(default_factory=HintonConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: NetworkExportConfig = field(default_factory=NetworkExportConfig)
    teacher_steps: int | None = None
    temperatures: CommaList = field(default_factory=lambda: CommaList.parse("1,4"))
    seeds: int = 3
    control: bool = True
    output_dir: str = "out/hinton"


def main(parsed: Parsed[Recipe]) -> None:
    from stepdistill.data.labelled import open_labelled
    from stepdistill.errors import InputError
    from stepdistill.export.classifier import finish, fit_name, group_name
    from stepdistill.export.hub import check_hub
    from stepdistill.export.transformer import weights_hash
    from stepdistill.kd.classifiers import accuracy, open_classifier
    from stepdistill.kd.hinton import HardLabels, Hinton
    from stepdistill.training.trainer import Trainer

    r = parsed.recipe
    temperatures = sorted({r.method.temperature, *r.temperatures.floats()})
    groups = [(t, replace(r.method, temperature=t)) for t in temperatures]  # refuses those that are none
    if r.seeds < 1:
        raise InputError(f"expected seeds >= 1, got {r.seeds}; fix --seeds")
    trainer = Trainer(r.train, r.output_dir, parsed.yaml)
    check_hub(r.export, r.output_dir)
    images, test = open_labelled(r.data)
    few, seed, place = images.first(r.data.labelled), r.train.seed, (images.classes, trainer.device)
    teacher = open_classifier(r.teacher, "teacher", seed, *place)
    if steps := r.teacher.steps(r.train.max_train_steps, r.teacher_steps):
        trainer.fit(HardLabels(teacher), images, "teacher", steps=steps)
    else:
        trainer.teacher = weights_hash(teacher)
    teacher.frozen()
    scores: dict[str, list[float]] = {}
    for number in range(r.seeds):
        for temperature, config in [(None, None)] * r.control + groups:
            student = open_classifier(r.student, "student", seed + 1 + number, *place)
            method = HardLabels(student) if config is None else Hinton(config, student, teacher)
            trainer.fit(method, few, fit_name(temperature, number))
            scores.setdefault(group_name(temperature), []).append(accuracy(student, test))
            if temperature == r.method.temperature and number == 0:
                exported = student
    if trainer.is_main:
        seen = {"teacher": len(images), "student": len(few)}
        finish(r.output_dir, (r.teacher, r.student), teacher, exported, scores, test, seen, r.export)


if __name__ == "__main__":
    run(Recipe, main, __doc__, demo=Path(__file__).parent / "configs" / "hinton_demo.yaml")
