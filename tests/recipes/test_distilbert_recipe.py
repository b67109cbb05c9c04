"""The recipe for masked language models as users run it: files that stock Transformers opens, resumed, refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_runs import load_recipe, run_in_process
from safetensors.torch import load_file

from stepdistill.data.text import Example
from stepdistill.errors import InputError
from stepdistill.kd.distilbert import DistilBERT
from stepdistill.kd.layouts import train_masked_tokenizer

NOUNS = ("file", "socket", "stream", "buffer", "list", "module", "thread", "signal", "string", "number")
SMALL = ["--teacher.layers", 4, "--teacher.width", 32, "--vocabulary", 300, "--teacher.fit_steps", 3]
TRAIN = [
    "--train.max_train_steps", 3, "--train.train_batch_size", 4, "--train.learning_rate", "3e-3",
    "--train.checkpointing_steps", 2, "--data.block_size", 24, "--data.held_out", "0.2", "--eval.max_tokens", 300,
    "--eval.masks", 2,
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    draws = np.random.default_rng(0)
    lines = [
        f"The {draws.choice(NOUNS)} opens a {draws.choice(NOUNS)} and reads {draws.choice(NOUNS)} {i}."
        for i in range(90)
    ]
    (folder / "text.txt").write_text("\n\n".join(lines))
    tokenizer = train_masked_tokenizer([Example(line) for line in lines], 300, 24)
    from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 3}
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 2, "eos_token_id": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        roberta = RobertaForMaskedLM(RobertaConfig(vocab_size=300, max_position_embeddings=32, **sizes, **special))
        bert = BertForMaskedLM(BertConfig(vocab_size=300, max_position_embeddings=32, **sizes, **special))
    for model, name in ((roberta, "roberta"), (bert, "bert")):
        for part in (model, tokenizer):
            part.save_pretrained(folder / name)
    return folder


def given(inputs: Path, folder: Path, *more: Any) -> list[Any]:
    return ["--data.path", inputs / "text.txt", "--output_dir", folder, *TRAIN, *more]


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("run") / "out"
    arguments = given(inputs, folder, *SMALL, "--random", "true", "--train.validation_steps", 12)
    run_in_process(load_recipe("distilbert"), arguments)
    return folder, arguments


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stepdistill.json").read_text())


def test_what_a_run_leaves_behind(finished: Any) -> None:
    folder, _ = finished
    said = facts(folder)
    assert (said["class"], said["task"], said["base_model"]) == ("NomicBertForMaskedLM", "fill-mask", None)
    results = said["results"]
    names = {"before", "teacher", "random", "control", "student"}
    assert results["perplexity"].keys() == results["accuracy"].keys() == names and results["layers"] == [0, 3]
    assert said["verified"]["logits_differ_by"] == 0.0 and results["masks"] == 2 and results["masked_words"] > 20
    card = (folder / "README.md").read_text()
    assert 'pipeline_tag: "fill-mask"' in card and "AutoModelForMaskedLM.from_pretrained" in card
    assert "## What they guess" in card and "begun with its layers 0, 3 (from 0)" in card
    student = f"| student, distilled | {said['student']['parameters']:,} | {results['perplexity']['student']:.2f} |"
    assert student in card and "student from random weights, distilled" in card
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [("kd" in line) for line in lines] == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3
    assert lines[9]["kd"] < lines[3]["kd"], "the teacher's layers are nearer to it than random ones"
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"teacher", "random", "control", "student"}
    assert [p.name for p in (folder / "samples").iterdir()] == ["000012.txt"]


def fills_a_mask(folder: Path, kind: str) -> None:
    """As a stock model of two layers."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == kind and model.config.num_hidden_layers == 2
    found = pipeline("fill-mask", model=model, tokenizer=tokenizer)("The [MASK] opens a file", top_k=2)
    assert len(found) == 2 and all(0 < guess["score"] < 1 for guess in found)


def test_stock_transformers_opens_it_and_fills_a_mask(finished: Any) -> None:
    fills_a_mask(finished[0], "nomic_bert")


def test_of_a_bert_by_path_it_becomes_a_distilbert(inputs: Path, tmp_path: Path) -> None:
    more = ["--teacher.path", inputs / "bert", "--student.depth", 2, "--control", "false"]
    run_in_process(load_recipe("distilbert"), given(inputs, tmp_path / "out", *more))
    said = facts(tmp_path / "out")
    assert (said["class"], said["results"]["layers"]) == ("DistilBertForMaskedLM", [0, 2])
    assert said["verified"]["logits_differ_by"] == 0.0 and said["base_model"] == str(inputs / "bert")
    fills_a_mask(tmp_path / "out", "distilbert")


def test_a_run_that_died_in_its_last_fit_ends_as_one_that_did_not(
    inputs: Path, finished: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    recipe = load_recipe("distilbert")
    arguments = given(inputs, tmp_path / "out", *SMALL, "--random", "true", "--train.validation_steps", 12)
    original = DistilBERT.training_step

    def dying(method: Any, batch: Any) -> Any:
        if method.step == 11:
            raise KeyboardInterrupt
        return original(method, batch)

    monkeypatch.setattr(DistilBERT, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(recipe, arguments)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setattr(DistilBERT, "training_step", original)
    run_in_process(recipe, [*arguments, "--train.resume_from_checkpoint", "latest"])
    one, other = (load_file(f / "model.safetensors") for f in (finished[0], tmp_path / "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert facts(tmp_path / "out")["results"] == facts(finished[0])["results"]


def test_a_checkpoint_of_another_layout_by_path_with_layers_stated(inputs: Path, tmp_path: Path) -> None:
    more = ["--teacher.path", inputs / "roberta", "--student.layers", "1,2", "--method.kd_on", "masked"]
    run_in_process(load_recipe("distilbert"), given(inputs, tmp_path / "out", *more))
    said = facts(tmp_path / "out")
    assert (said["class"], said["results"]["layers"]) == ("RobertaForMaskedLM", [1, 2])
    assert said["base_model"] == said["teacher"] == str(inputs / "roberta")
    assert {p.name for p in (tmp_path / "out" / "checkpoints").iterdir()} == {"control", "student"}
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        < load_file(inputs / "roberta/model.safetensors").keys()
    )


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--student.layers", "0,4"], r"4 layers, 0 to 3.*--student\.layers"),
        (["--student.depth", 5], r"1 to 4 layers.*--student\.depth"),
        (["--student.layers", "a"], r"--student\.layers"),
        (["--vocabulary", 200], "--vocabulary"),
        (["--data.block_size", 2, "--data.prompt_tokens", 1], r"--data\.block_size"),
        (["--teacher.path", "{inputs}/roberta", "--data.block_size", 32], "31 positions"),
        (["--train.validation_prompts", "no mask"], r"--train\.validation_prompts"),
        (["--masking.share", 0], r"--masking\.share"),
    ],
)
def test_bad_input_names_the_fix_and_trains_nothing(inputs: Path, tmp_path: Path, more: list[Any], named: str) -> None:
    said = [str(word).format(inputs=inputs) for word in more]
    with pytest.raises(InputError, match=named):
        run_in_process(load_recipe("distilbert"), given(inputs, tmp_path / "out", *SMALL, *said))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
