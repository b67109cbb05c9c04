"""TinyBERT's recipe: a classifier that stock Transformers opens; killed and resumed, from checkpoints, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_runs import load_recipe, run_in_process
from safetensors.torch import load_file

from stepdistill.data.text import Example
from stepdistill.errors import InputError
from stepdistill.kd.augmentation import Copies
from stepdistill.kd.layouts import train_masked_tokenizer
from stepdistill.kd.tinybert import TinyBERTLayers

VERBS = {"files": ("opens", "reads", "closes"), "sockets": ("binds", "listens", "connects")}
SMALL = [
    "--teacher.layers", 2, "--teacher.width", 32, "--teacher.fit_steps", 2, "--student.layers", 1, "--student.width", 16,
    "--stages.general", 3, "--stages.intermediate", 2, "--stages.fine_tuning", 12, "--vocabulary", 300,
    "--train.max_train_steps", 3, "--train.train_batch_size", 4, "--train.learning_rate", "3e-3", "--data.block_size", 24,
    "--data.held_out", "0.2", "--task.length", 20, "--task.text_column", "sentence", "--train.checkpointing_steps", 2,
]  # fmt: skip
STAGES = {"teacher", "fine-tuning", "general", "intermediate", "prediction", "control-general", "control"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draws = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)

    def sentence(kind: str, number: int) -> str:
        return f"Then it {draws.choice(VERBS[kind])} and {draws.choice(VERBS[kind])} number {number}."

    kinds = [str(draws.choice(sorted(VERBS))) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(sentence(kind, i) for i, kind in enumerate(kinds)))
    rows = [{"sentence": sentence(kind, 200 + i), "label": kind} for i, kind in enumerate(kinds)]
    (folder / "task.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def given(inputs: Path, folder: Path, *more: Any) -> list[Any]:
    places = ["--data.path", inputs / "text.txt", "--task.path", inputs / "task.jsonl", "--output_dir", folder]
    return [*places, *SMALL, *more]


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stepdistill.json").read_text())


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    run_in_process(load_recipe("tinybert"), given(inputs, folder, "--augment.copies", 1, "--train.ema_decay", "0.5"))
    return folder


def test_what_a_run_leaves_behind(finished: Path) -> None:
    said = facts(finished)
    results = said["results"]
    assert said["class"] == "NomicBertForSequenceClassification"
    assert said["method"] == "tinybert" and said["base_model"] is None
    assert results["accuracy"].keys() == {"teacher", "control", "student"} and results["layers"] == [0, 2]
    assert results["classes"] == ["files", "sockets"] and "gap_closed" in results
    assert results["steps"] == {"general": 3, "intermediate": 2, "prediction": 3}
    assert said["verified"]["logits_differ_by"] == 0.0
    assert {p.name for p in (finished / "checkpoints").iterdir()} == STAGES
    lines = metrics(finished)
    assert [("hidden" in line, "prediction" in line, "accuracy" in line) for line in lines] == (
        [(False, False, False)] * 2 + [(False, False, True)] * 12 + [(True, False, False)] * 5
        + [(False, True, True)] * 3 + [(False, False, False)] * 3 + [(False, False, True)] * 5
    )  # fmt: skip
    card = (finished / "README.md").read_text()
    assert 'pipeline_tag: "text-classification"' in card and "AutoModelForSequenceClassification" in card
    shown = results["accuracy"]["student"]
    assert f"| student, distilled | {results['parameters']['student']:,} | {shown:.1%} +-" in card


def test_stock_transformers_opens_it_without_a_projection(finished: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(finished),
        AutoTokenizer.from_pretrained(finished),
    )
    assert model.config.num_attention_heads == 1 and model.config.label2id == {"files": 0, "sockets": 1}
    answer = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")("Then it opens number 5.")
    assert answer[0]["label"] in ("files", "sockets")
    last = sorted(
        (finished / "checkpoints" / "prediction").iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1
    )[-1]
    trained = load_file(last / "student.ema.safetensors")
    assert torch.equal(model.state_dict()["classifier.weight"], trained["classifier.weight"])
    assert not [name for name in load_file(finished / "model.safetensors") if "layers.weight" in name]


def test_killed_in_the_task_s_layers_it_ends_as_if_it_had_not_been(
    inputs: Path, finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    recipe = load_recipe("tinybert")
    arguments = given(inputs, tmp_path / "out", "--augment.copies", 1, "--train.ema_decay", "0.5")
    original = TinyBERTLayers.training_step

    def dying(method: Any, batch: Any) -> Any:
        if method.step == 18:  # the second step of stage 2a
            raise KeyboardInterrupt
        return original(method, batch)

    monkeypatch.setattr(TinyBERTLayers, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(recipe, arguments)
    monkeypatch.setattr(TinyBERTLayers, "training_step", original)
    run_in_process(recipe, [*arguments, "--train.resume_from_checkpoint", "latest"])
    one, other = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert facts(tmp_path / "out")["results"] == facts(finished)["results"]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in metrics(tmp_path / "out")] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in metrics(finished)
    ]


def test_texts_with_words_replaced_are_made_once(inputs: Path, finished: Path, monkeypatch: Any) -> None:
    (kept,) = (finished / "augmented").iterdir()
    assert json.loads((kept / "about.json").read_text())["options"]["copies"] == 1

    def again(*_: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(Copies, "make", again)
    before = load_file(finished / "model.safetensors")
    more = ["--augment.copies", 1, "--train.ema_decay", "0.5", "--train.resume_from_checkpoint", "latest"]
    run_in_process(load_recipe("tinybert"), given(inputs, finished, *more))
    after = load_file(finished / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_checkpoints_of_one_tokenizer(inputs: Path, finished: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(finished)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32}
    more = {"num_hidden_layers": 3, "max_position_embeddings": 24, "pad_token_id": tokenizer.pad_token_id}
    BertForMaskedLM(BertConfig(**shape, **more)).save_pretrained(tmp_path / "teacher")
    names = {"id2label": {0: "files", 1: "sockets"}, "label2id": {"files": 0, "sockets": 1}}
    BertForSequenceClassification(BertConfig(**shape, **more, **names)).save_pretrained(tmp_path / "tuned")
    for name in ("teacher", "tuned"):
        tokenizer.save_pretrained(tmp_path / name)
    places = [
        "--teacher.path", tmp_path / "teacher", "--stages.fine_tuned", tmp_path / "tuned", "--stages.fine_tuning", 0,
        "--teacher.fit_steps", 0, "--method.layers", "2", "--control", "false",
    ]  # fmt: skip
    run_in_process(load_recipe("tinybert"), given(inputs, tmp_path / "out", *places))
    said = facts(tmp_path / "out")
    assert said["class"] == "BertForSequenceClassification", "beside a checkpoint the student is a BERT"
    assert said["results"]["layers"] == [0, 2] and said["results"]["accuracy"].keys() == {"teacher", "student"}
    assert {p.name for p in (tmp_path / "out" / "checkpoints").iterdir()} == {"general", "intermediate", "prediction"}
    assert "fine-tuned" in (tmp_path / "out" / "README.md").read_text()
    others = {
        "teacher": BertForMaskedLM(BertConfig(**shape, **more)),
        "tuned": BertForSequenceClassification(BertConfig(**shape, **more, **names)),
    }
    again = given(inputs, tmp_path / "out", *places, "--train.resume_from_checkpoint", "latest")
    for name, other in others.items():
        (tmp_path / name).rename(tmp_path / "kept")
        for part in (other, tokenizer):
            part.save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match="expected the teacher"):
            run_in_process(load_recipe("tinybert"), again)
        shutil.rmtree(tmp_path / name)
        (tmp_path / "kept").rename(tmp_path / name)
    run_in_process(load_recipe("tinybert"), again)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--teacher.layers", 3, "--student.layers", 2], "--method.layers"),
        (["--student.layers", 3], "--student.layers"),
        (["--teacher.width", 64, "--student.heads", 4], "--method.attention_weight 0"),
        (["--student.width", 15, "--student.heads", 2], "--student.heads"),
        (["--train.gradient_checkpointing", "true"], "gradient_checkpointing false"),
        (["--task.text_column", "text"], "--task.text_column"),
        (["--task.path", "{inputs}/nowhere.jsonl"], "--task.path"),
        (["--stages.fine_tuning", 0], "--stages.fine_tuned"),
        (["--stages.fine_tuned", "{inputs}/nowhere"], "--stages.fine_tuned"),
        (["--train.parallel", "fsdp"], "--train.parallel ddp"),
    ],
)
def test_bad_input_names_the_fix_and_trains_nothing(inputs: Path, tmp_path: Path, more: list[Any], named: str) -> None:
    words = [str(word).format(inputs=inputs) for word in more]
    with pytest.raises(InputError, match=named):
        run_in_process(load_recipe("tinybert"), given(inputs, tmp_path / "out", *words))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_words_that_cannot_be_replaced_are_known_before_anything_trains(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda _tokenizer: False))
    with pytest.raises(InputError, match=r"slow one; give --augment\.copies 0"):
        run_in_process(load_recipe("tinybert"), given(inputs, tmp_path / "out", "--augment.copies", 1))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_attention_without_scores_is_known_before_a_teacher_is_fine_tuned(inputs: Path, tmp_path: Path) -> None:
    """MPNet's does not go through Transformers' interface."""
    from transformers import MPNetConfig, MPNetForMaskedLM

    tokenizer = train_masked_tokenizer([Example("the file opens")], 300, 24)
    config = MPNetConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2,
        max_position_embeddings=40, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    for part in (MPNetForMaskedLM(config), tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match=r"MPNetForMaskedLM .* --method\.attention_weight 0"):
        run_in_process(load_recipe("tinybert"), given(inputs, tmp_path / "out", "--teacher.path", tmp_path / "teacher"))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
