"""A teacher is asked once by the command line, and a run learns from its answers without it in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from language import gpt2, words
from recipe_runs import load_recipe, run_in_process

from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.kd.evaluation import Examination
from stepdistill.kd.language_model import LanguageModelKD
from stepdistill.kd.pair import Pair

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    documents = (" ".join(LETTERS[(i * j) % 26] for j in range(1, 30)) for i in range(1, 41))
    (folder / "text.txt").write_text("\n\n".join(documents))
    for name, seed, width in (("teacher", 0, 32), ("student", 1, 16)):
        gpt2(seed, width=width, vocabulary=30, eos_token_id=29, bos_token_id=29).save_pretrained(folder / name)
        words().save_pretrained(folder / name)
    ask(folder, folder / "cache")
    return folder


def ask(inputs: Path, folder: Path, *more: Any) -> None:
    given = ["--teacher.path", inputs / "teacher", "--data.path", inputs / "text.txt", "--data.block_size", 24]
    options = ["--data.held_out", "0.2", "--k", 30, "--stored", "fp32", "--output_dir", folder]
    cli.main([str(word) for word in ("cache-logits", *given, *options, *more)])


def arguments(inputs: Path, folder: Path, *more: Any) -> list[Any]:
    return [
        "--teacher.path", inputs / "teacher", "--student.path", inputs / "student", "--data.path", inputs / "text.txt",
        "--data.block_size", 24, "--data.held_out", "0.2", "--train.max_train_steps", 3, "--train.train_batch_size", 4,
        "--train.learning_rate", "1e-2", "--eval.new_tokens", 4, "--output_dir", folder, *more,
    ]  # fmt: skip


def results(folder: Path) -> Any:
    return json.loads((folder / "stepdistill.json").read_text())["results"]


def test_a_run_without_the_teacher_in_memory_is_the_run_with_it(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, happened = load_recipe("lm_kd"), []
    run_in_process(recipe, arguments(inputs, tmp_path / "live"))
    opened, step, examined = Pair.live_teacher, LanguageModelKD.training_step, Examination.perplexities
    monkeypatch.setattr(Pair, "live_teacher", lambda *a: (happened.append("opened"), opened(*a))[1])
    monkeypatch.setattr(LanguageModelKD, "training_step", lambda *a: (happened.append("step"), step(*a))[1])
    monkeypatch.setattr(Examination, "perplexities", lambda *a: (happened.append("measured"), examined(*a))[1])
    run_in_process(recipe, arguments(inputs, tmp_path / "cached", "--teacher.cache", inputs / "cache"))
    assert happened == ["measured", "step", "step", "step", "opened", "measured"]
    for name, value in results(tmp_path / "live")["perplexity"].items():
        assert results(tmp_path / "cached")["perplexity"][name] == pytest.approx(value, rel=1e-4)
    ask(inputs, tmp_path / "small", "--k", 4, "--stored", "fp16")
    said = capsys.readouterr().out
    # 25 of blocks of 24 tokens give 23 answers each; 4 x 4 + 2 bytes, and the shard's header
    assert "answers of" in said and f"bytes in {tmp_path / 'small'}" in said and "of all" not in said
    run_in_process(recipe, arguments(inputs, tmp_path / "few", "--teacher.cache", tmp_path / "small"))
    assert results(tmp_path / "few")["perplexity"]["teacher"] == results(tmp_path / "live")["perplexity"]["teacher"]


def test_a_teacher_that_is_not_measured_is_never_opened(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pair, "live_teacher", None)
    more = ["--teacher.cache", inputs / "cache", "--eval.teacher", "false"]
    run_in_process(load_recipe("lm_kd"), arguments(inputs, tmp_path / "out", *more))
    found = results(tmp_path / "out")
    assert found["perplexity"].keys() == {"before", "control", "student"} and "gap_closed" not in found
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| student, distilled |" in card and "| teacher |" not in card and "the teacher has" not in card


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--data.block_size", 16], r"another data \(block_size 24, here 16"),
        (["--data.held_out", "0.3"], r"another data \(held_out 0.2, here 0.3"),
        (["--teacher.path", "{inputs}/student"], r"another teacher \(path"),
        (["--teacher.path", "demo"], "drop --teacher.cache"),
        (["--teacher.fit_steps", 2], "drop --teacher.cache"),
        (["--teacher.cache", "{inputs}"], "nothing of that kind"),
        (["--method.divergence.temperature", 2], "--temperature"),
    ],
)
def test_what_a_cache_does_not_fit(inputs: Path, tmp_path: Path, more: list[Any], named: str) -> None:
    given = ["--teacher.cache", inputs / "cache", *(str(word).format(inputs=inputs) for word in more)]
    with pytest.raises(InputError, match=named):
        run_in_process(load_recipe("lm_kd"), arguments(inputs, tmp_path / "out", *given))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_on_policy_methods_say_that_they_need_the_teacher(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the teacher itself.*recipes/lm_kd\.py"):
        run_in_process(load_recipe("gkd"), arguments(inputs, tmp_path / "out", "--teacher.cache", inputs / "cache"))


def test_the_command_line_says_what_is_wrong(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, told in (
        (["--k", 31], "--k"),
        (["--data.block_size", 64], "--data.block_size"),
        (["--k", 4], "k 30, here 4"),
    ):
        folder = inputs / "cache" if told == "k 30, here 4" else tmp_path
        with pytest.raises(SystemExit) as stop:
            ask(inputs, folder, *more)
        assert stop.value.code == 2 and told in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        cli.main(["cache-logits", "--teacher.path", "x"])
    assert "--data.path, --output_dir" in capsys.readouterr().err
