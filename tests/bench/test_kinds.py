"""Which kind of model is where, which flags belong to it, and what is refused by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from stepdistill import cli
from stepdistill.bench.kinds import CLASSIFIER, LANGUAGE, PIPELINE, kind_of, kind_of_all
from stepdistill.bench.model_options import ModelOptions, add_model_arguments, check_flags
from stepdistill.bench.options import add_arguments
from stepdistill.errors import InputError


def config(folder: Path, *architectures: str, **more: Any) -> str:
    folder.mkdir(exist_ok=True)
    given = {**({"architectures": list(architectures)} if architectures else {}), **more}
    (folder / "config.json").write_text(json.dumps(given))
    return str(folder)


def flags(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    add_model_arguments(parser)
    return vars(parser.parse_args(words))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("GPT2LMHeadModel", LANGUAGE),
        ("LlamaForCausalLM", LANGUAGE),
        ("XLNetLMHeadModel", LANGUAGE),
        ("ReformerModelWithLMHead", LANGUAGE),
        ("ResNetForImageClassification", CLASSIFIER),
        ("DeiTForImageClassificationWithTeacher", CLASSIFIER),
        ("PerceiverForImageClassificationLearned", CLASSIFIER),
    ],
)
def test_classes_by_transformers_own_tables(tmp_path: Path, name: str, kind: str) -> None:
    assert kind_of(config(tmp_path, name), "--teacher") == kind


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("BertForMaskedLM",), "got BertForMaskedLM"),
        (("MineForCausalLM",), "got MineForCausalLM"),  # the end of a name says nothing
        (("ResNetModel",), "got ResNetModel"),
        ((), "got no `architectures` in its config.json"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, names: tuple[str, ...], found: str) -> None:
    with pytest.raises(InputError, match=f"image classifier of Transformers in --student .*{found}"):
        kind_of(config(tmp_path, *names, model_type="x"), "--student")


def test_what_is_none_of_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert kind_of(str(tmp_path), "--teacher") is None  # no config
    assert kind_of(config(tmp_path / "unet", _class_name="UNet2DModel"), "--teacher") is None
    pipe = config(tmp_path / "pipe", "GPT2LMHeadModel")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    assert [kind_of(path, "--teacher") for path in (pipe, "./none", "a.safetensors", "a/b/c", "demo")] == [None] * 5
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(InputError, match="expected JSON in config.json of --teacher unet"):
        kind_of("unet", "--teacher")


def test_hub_ids_are_looked_up_in_the_cache_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(tmp_path, "GPT2LMHeadModel")
    cached = {("org/lm", "config.json"): str(tmp_path / "config.json"), ("org/sd", "model_index.json"): "x"}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda path, file: cached.get((path, file)))
    asked: list[str] = []

    def download(path: str, file: str) -> str:
        asked.append(path)
        if path != "org/new":
            raise OSError("no such file")
        return str(tmp_path / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("stepdistill.families.loading.hub_is_reachable", lambda: True)
    assert [kind_of(path, "--teacher") for path in ("org/lm", "org/sd")] == [LANGUAGE, None] and asked == []
    assert kind_of("org/new", "--teacher", network=False) is None and asked == []
    assert [kind_of(path, "--teacher") for path in ("org/new", "org/pipe")] == [LANGUAGE, None]
    monkeypatch.setattr("stepdistill.families.loading.hub_is_reachable", lambda: False)
    assert kind_of("org/new", "--teacher") is None and asked == ["org/new", "org/pipe"]


def test_one_kind_a_bench(tmp_path: Path) -> None:
    lm, other, vision, nothing = (
        config(tmp_path / "lm", "GPT2LMHeadModel"),
        config(tmp_path / "other", "LlamaForCausalLM"),
        config(tmp_path / "vision", "ViTForImageClassification"),
        str(tmp_path),
    )
    assert kind_of_all(lm, [other]) == LANGUAGE and kind_of_all(vision, []) == CLASSIFIER
    assert kind_of_all(nothing, [nothing]) == kind_of_all("demo", []) == kind_of_all(None, [lm]) == PIPELINE
    with pytest.raises(InputError, match="got a language model at --teacher .* and an image classifier at --student"):
        kind_of_all(lm, [other, vision])
    with pytest.raises(InputError, match="got a language model at --teacher .* and no language model or classifier"):
        kind_of_all(lm, [nothing])
    with pytest.raises(
        InputError, match="got no language model .* at --teacher demo and a language model at --student"
    ):
        kind_of_all("demo", [lm])


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (LANGUAGE, ["--steps", "4"], "flags for language models, as --teacher is one, got --steps; drop it"),
        (LANGUAGE, ["--batch_sizes", "1"], "got --batch_sizes; drop it"),
        (LANGUAGE, ["--data", "x"], "got --data; give --data.path instead"),
        (LANGUAGE, ["--prompts", "x"], "got --prompts; give --data.path instead"),
        (LANGUAGE, ["--save_images"], "got --save_images; drop it"),
        (LANGUAGE, ["--data.resolution", "8"], "got --data.resolution; drop it"),
        (CLASSIFIER, ["--guidance", "1"], "flags for image classifiers, as --teacher is one, got --guidance"),
        (CLASSIFIER, ["--eval.stride", "8"], "got --eval.stride; drop it"),
        (CLASSIFIER, ["--data.block_size", "8"], "got --data.block_size; drop it"),
        (CLASSIFIER, ["--resolution", "64"], "got --resolution; give --data.resolution instead"),
        (CLASSIFIER, ["--num_images", "64"], "got --num_images; give --data.test_images instead"),
        (
            PIPELINE,
            ["--data.path", "x"],
            "as --teacher has no config.json of a .*, got --data.path; give --data instead",
        ),
        (PIPELINE, ["--eval.max_tokens", "9"], "got --eval.max_tokens; drop it"),
    ],
)
def test_flags_of_another_kind(kind: str, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_flags(flags("--teacher", "x", *words), kind)


def test_flags_of_their_own(tmp_path: Path) -> None:
    words = ["--teacher", "a", "--student", "b", "--output_dir", str(tmp_path), "--dtype", "bf16", "--seed", "3"]
    text = ["--data.path", "t", "--data.held_out", "1", "--eval.stride", "4"]
    found = ModelOptions.read(flags(*words, *text), LANGUAGE)
    assert found.data == {"path": "t", "held_out": 1.0} and found.exam == {"stride": 4}
    assert (found.repeats, found.dtype, found.seed) == (10, "bf16", 3)
    found = ModelOptions.read(flags(*words, "--data.test_images", "9", "--repeats", "2"), CLASSIFIER)
    assert (found.batch_sizes, found.repeats, found.data) == ((1, 32), 2, {"test_images": 9})
    assert ModelOptions.read(flags(*words, "--batch_sizes", "8,2"), CLASSIFIER).batch_sizes == (8, 2)
    check_flags(
        flags("--teacher", "x", "--batch_sizes", "1", "--steps", "2", "--data", "y", "--repeats", "2"), PIPELINE
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student", "a"], "got the teacher at --student a"),
        (["--student", "b", "--student", "b"], "each student once"),
        (["--repeats", "0"], "1 or more, got --repeats 0"),
        (["--output_dir", __file__], "expected a folder, got a file"),
    ],
)
def test_wrong_flags(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelOptions.read(flags("--teacher", "a", *words), LANGUAGE)


def test_the_command_refuses_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--teacher", "demo", "--data.path", "x"])
    assert stop.value.code == 2 and "got --data.path; give --data instead" in " ".join(capsys.readouterr().err.split())
