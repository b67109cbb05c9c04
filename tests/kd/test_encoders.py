"""Teachers and students of a task: whose weights are whose, what is refused; and texts made of others by a masked model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import bert
from torch.testing import assert_close
from toys import EXACT

from stepdistill.data.text import Example
from stepdistill.errors import InputError
from stepdistill.kd.attention import Shape
from stepdistill.kd.augmentation import AugmentConfig
from stepdistill.kd.encoders import Encoders, EncoderStudentConfig, StagesConfig
from stepdistill.kd.pair import LMTeacherConfig

TEXT = [Example(f"The file number {i} opens and the socket closes it again.") for i in range(40)]
CLASSES = ("files", "sockets")
CPU = torch.device("cpu")


def made(student: Any = None, tuned: str | None = None, window: int = 24, **teacher: Any) -> Encoders:
    config = LMTeacherConfig(**{"layers": 2, "width": 32, **teacher})
    chosen = EncoderStudentConfig(**{"layers": 1, "width": 16, **(student or {})})
    return Encoders(config, chosen, tuned, TEXT, 300, window, CLASSES, 0, CPU)


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return made()


@pytest.fixture(scope="module")
def saved(encoders: Encoders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained teacher, a fine-tuned one and a student as checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    teacher = encoders.teacher()
    parts = {"teacher": teacher, "tuned": encoders.classifier(teacher), "student": encoders.student(2)}
    for name, network in parts.items():
        network.module.save_pretrained(folder / name)
        encoders.tokenizer.save_pretrained(folder / name)
    return folder


def test_a_demo_has_heads_of_the_teachers_number_and_the_same_weights_each_time(encoders: Encoders) -> None:
    one, again = encoders.student(4), encoders.student(4)
    assert Shape.of(one) == Shape(1, 4, 16) and Shape.of(encoders.teacher()) == Shape(2, 1, 32)
    assert_close(dict(one.module.state_dict()), dict(again.module.state_dict()), **EXACT)
    twin = made({"layers": 2, "width": 32})
    weights, theirs = (network.module.state_dict() for network in (twin.student(1), twin.teacher()))
    assert weights.keys() == theirs.keys(), "of the teacher's shape, and yet not the teacher"
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    assert weights[name].shape == theirs[name].shape and not torch.equal(weights[name], theirs[name])
    assert Shape.of(made({"heads": 2}).student(4)).heads == 2
    with pytest.raises(InputError, match="--student.heads"):
        encoders.student(3)


@pytest.mark.parametrize(("heads", "wanted"), [(4, 64), (12, 72), (16, 64), (3, 66)])
def test_a_width_that_is_left_open_goes_with_the_teachers_heads(saved: Path, heads: int, wanted: int) -> None:
    """BERT's 12 heads do not divide 64."""
    for teacher in ({}, {"path": str(saved / "teacher")}):
        assert Shape.of(made({"width": None}, **teacher).student(heads)) == Shape(1, heads, wanted)


def test_a_classifier_has_the_layers_of_its_encoder_and_a_life_of_its_own(encoders: Encoders) -> None:
    teacher = encoders.teacher()
    tuned = encoders.tuned(teacher)
    own: Any = tuned.module
    given: Any = teacher.module
    assert tuned.classes == {0: "files", 1: "sockets"} and own.training
    for name, value in given.base_model.state_dict().items():
        assert_close(own.base_model.state_dict()[name], value, **EXACT)
    assert "fill" not in own.config.id2label and given.config.id2label != own.config.id2label
    with torch.no_grad():
        own.base_model.embeddings.word_embeddings.weight.add_(1.0)
    assert not torch.equal(
        own.base_model.embeddings.word_embeddings.weight, given.base_model.embeddings.word_embeddings.weight
    )
    again = encoders.classifier(teacher)
    assert_close(again.module.state_dict()["classifier.weight"], own.state_dict()["classifier.weight"], **EXACT)
    encoders.pair.seed = 1
    try:
        other = encoders.classifier(teacher).module.state_dict()["classifier.weight"]
    finally:
        encoders.pair.seed = 0
    assert not torch.equal(other, own.state_dict()["classifier.weight"]), "a head of the run's own seed"


@pytest.mark.parametrize("more", [-1, 1])
def test_a_classifier_of_other_layers_than_its_encoder_is_refused(encoders: Encoders, more: int) -> None:
    """Layers that it would leave out, and layers that would stay as they were drawn."""
    teacher = encoders.teacher()
    teacher.config.num_hidden_layers += more
    try:
        with pytest.raises(InputError, match=r"one with others, first .*layers?\.\d.*BERT layout"):
            encoders.classifier(teacher)
    finally:
        teacher.config.num_hidden_layers -= more


def test_general_text_whole_and_with_words_masked(encoders: Encoders) -> None:
    whole, masked = encoders.general(TEXT, 24)
    assert [row.ids for row in whole.rows] == [row.ids for row in masked.rows] and len(whole.rows[0].ids) == 24


def test_checkpoints(encoders: Encoders, saved: Path) -> None:
    places = {"path": str(saved / "teacher")}
    found = made({"path": str(saved / "student")}, str(saved / "tuned"), **places)
    teacher, student = found.teacher(), found.student(1)
    assert Shape.of(student) == Shape(1, 2, 16)
    assert_close(dict(teacher.module.state_dict()), dict(encoders.teacher().module.state_dict()), **EXACT)
    assert found.tuned(teacher).classes == {0: "files", 1: "sockets"}
    named = found.tuned(teacher).module.state_dict()["classifier.weight"]
    assert_close(named, encoders.classifier(encoders.teacher()).module.state_dict()["classifier.weight"], **EXACT)


def test_a_student_is_laid_out_as_a_demos_teacher_or_as_a_bert_beside_a_checkpoint(
    encoders: Encoders, saved: Path
) -> None:
    assert encoders.teacher().config.model_type == encoders.student(2).config.model_type == "nomic_bert"
    assert made(path=str(saved / "teacher")).student(2).config.model_type == "bert"


def test_checkpoints_that_do_not_fit(encoders: Encoders, saved: Path, tmp_path: Path) -> None:
    teacher = {"path": str(saved / "teacher")}
    with pytest.raises(InputError, match="--task.length"):
        made({"path": str(saved / "student")}, window=25, layers=2).student(1)
    tuned = str(saved / "tuned")
    with pytest.raises(InputError, match="--stages.fine_tuned"):
        Encoders(LMTeacherConfig(**teacher), EncoderStudentConfig(), tuned, TEXT, 300, 24, ("one", "two"), 0, CPU)
    with pytest.raises(InputError, match=r"--stages.fine_tuned"):  # answers would be of the other class
        Encoders(LMTeacherConfig(**teacher), EncoderStudentConfig(), tuned, TEXT, 300, 24, CLASSES[::-1], 0, CPU)
    bert(0, layers=1, vocab_size=300, classes=CLASSES).save_pretrained(tmp_path)
    encoders.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="shape"):
        made(None, str(tmp_path), **teacher).teacher()
    other = made(None, None)
    other.tokenizer.add_tokens(["<more>"])
    other.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="one tokenizer"):
        made({"path": str(tmp_path)}, None, **teacher).student(1)


@pytest.mark.parametrize("tuned", [False, True])
def test_positions_that_begin_after_the_padding_are_counted(encoders: Encoders, tmp_path: Path, tuned: bool) -> None:
    """RoBERTa's: one more token would have no position."""
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

    shape = {
        "vocab_size": len(encoders.tokenizer),
        "hidden_size": 16,
        "num_attention_heads": 1,
        "intermediate_size": 16,
    }
    config = RobertaConfig(**shape, num_hidden_layers=1, max_position_embeddings=26, pad_token_id=1)
    config.id2label, config.label2id = dict(enumerate(CLASSES)), {name: i for i, name in enumerate(CLASSES)}
    (RobertaForSequenceClassification if tuned else RobertaForMaskedLM)(config).save_pretrained(tmp_path)
    encoders.tokenizer.save_pretrained(tmp_path)

    def opened(window: int) -> None:
        if tuned:
            made(None, str(tmp_path), window=window)
        else:
            made({"path": str(tmp_path)}, window=window).student(1)

    opened(24)
    with pytest.raises(InputError, match="fit in the 24 positions"):
        opened(25)


def test_a_checkpoint_without_names_takes_the_tasks(encoders: Encoders, tmp_path: Path) -> None:
    model = bert(0, layers=2, width=32, heads=1, vocab_size=300, classes=("LABEL_0", "LABEL_1"))
    model.save_pretrained(tmp_path)
    encoders.tokenizer.save_pretrained(tmp_path)
    found = made(None, str(tmp_path))
    assert found.tuned(found.teacher()).classes == {0: "files", 1: "sockets"}


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (EncoderStudentConfig, {"layers": 0}, "--student.layers"), (EncoderStudentConfig, {"heads": 0}, "--student.heads"),
        (StagesConfig, {"general": -1}, "--stages.general"), (StagesConfig, {"fine_tuning": 0}, "--stages.fine_tuned"),
        (AugmentConfig, {"copies": -1}, "--augment.copies"), (AugmentConfig, {"share": 0.0}, "--augment.share"),
        (AugmentConfig, {"candidates": 0}, "--augment.candidates"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(config: Any, change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        config(**change)


def test_how_long_the_teacher_learns_the_task() -> None:
    assert StagesConfig().tuning == 300 and StagesConfig(fine_tuned="x").tuning == 0
    assert StagesConfig(fine_tuned="x", fine_tuning=5).tuning == 5
