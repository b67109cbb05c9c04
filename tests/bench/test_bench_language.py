"""`stepdistill bench` of language models: closed forms, oracles, and a comparison from the command line to its files."""

from __future__ import annotations

import csv
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import built, gpt2, llama, uneven, words
from mps import on_mps
from torch.testing import assert_close

from stepdistill import cli
from stepdistill.bench import language as module
from stepdistill.bench.language import perplexities, token_losses, units
from stepdistill.bench.model_options import ModelOptions
from stepdistill.bench.rows import Results, Value
from stepdistill.data.text import Example
from stepdistill.data.tokens import TokenRows, conversations, windows
from stepdistill.errors import InputError
from stepdistill.kd.evaluation import perplexity
from stepdistill.kd.networks import CausalLM

VOCABULARY = 30
LETTERS = "abcdefghij"
TEXTS = [" ".join(LETTERS[(i * k) % 10] for k in range(1, 3 + i % 7)) for i in range(60)]


def model(seed: int, **changes: Any) -> Any:
    return gpt2(seed, vocabulary=VOCABULARY, bos_token_id=29, eos_token_id=29, **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher, copy (the same weights), uniform (a head of zeros), and a text of 60 documents."""
    folder = tmp_path_factory.mktemp("models")
    uniform = model(2, width=8)
    with torch.no_grad():
        uniform.transformer.wte.weight.zero_()  # tied: all logits are 0
    for name, network in (("teacher", model(1)), ("uniform", uniform)):
        network.save_pretrained(folder / name)
        words().save_pretrained(folder / name)
    shutil.copytree(folder / "teacher", folder / "copy")
    (folder / "text.txt").write_text("\n\n".join(TEXTS))
    return folder


def command(place: Path, out: Path, *words: str, students: tuple[str, ...] = ("copy", "uniform")) -> list[str]:
    named = [word for name in students for word in ("--student", str(place / name))]
    usual = [
        "--data.path",
        str(place / "text.txt"),
        "--data.held_out",
        "1",
        "--data.block_size",
        "16",
        "--repeats",
        "6",
    ]
    return ["bench", "--teacher", str(place / "teacher"), *named, "--output_dir", str(out), *usual, *words]


def test_a_comparison_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    cli.main(command(place, out, "--eval.new_tokens", "5"))
    assert {path.name for path in out.iterdir()} == {"results.json", "results.csv", "results.md", "report.html"}
    found = json.loads((out / "results.json").read_text())
    teacher, copy, uniform = (row["values"] for row in found["rows"])
    assert [row["name"] for row in found["rows"]] == ["teacher", "copy", "uniform"] and found[
        "kind"
    ] == "language model"
    # uniform over V entries: exp(log V)
    assert uniform["perplexity"]["value"] == pytest.approx(VOCABULARY, rel=1e-6)
    assert uniform["perplexity"]["interval"] == pytest.approx([VOCABULARY] * 2, rel=1e-6)
    assert copy["perplexity_ratio"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert copy["perplexity"] == teacher["perplexity"] and "perplexity_ratio" not in teacher
    ratio = VOCABULARY / teacher["perplexity"]["value"]
    assert uniform["perplexity_ratio"]["value"] == pytest.approx(ratio, rel=1e-6)
    low, high = teacher["perplexity"]["interval"]
    assert low < teacher["perplexity"]["value"] < high
    # the same text by the recipe's own measure
    rows = windows([Example(text) for text in TEXTS], words(), 16, 8, 20_000)
    assert teacher["perplexity"]["value"] == pytest.approx(perplexity(CausalLM(model(1)).frozen(), rows), rel=1e-6)
    count = sum(len(text.split()) + 1 for text in TEXTS) - 1
    protocol = found["protocol"]
    assert (protocol["tokens"], protocol["window"], protocol["stride"]) == (count, 16, 8)
    assert protocol["bootstrap"] == {"units": "documents", "count": 60, "resamples": 1000}
    assert protocol["generation"] == {"prompt_tokens": 4, "new_tokens": 5, "batch": 1}
    rows_of = found["rows"]
    assert rows_of[0]["parameters"] == sum(p.numel() for p in model(1).parameters()) == rows_of[0]["bytes"] / 4
    assert rows_of[0]["weights"] == rows_of[1]["weights"] != rows_of[2]["weights"]
    for row in rows_of:
        seconds, values = row["seconds"], row["values"]
        assert len(seconds["forward"]) == len(seconds["generation"]) == 6
        middle = np.median(seconds["generation"])
        assert values["tokens_per_second"]["value"] == pytest.approx(5 / middle)
        assert values["forward_ms"]["value"] == pytest.approx(1000 * np.median(seconds["forward"]))
    faster = np.array(rows_of[0]["seconds"]["generation"]) / rows_of[2]["seconds"]["generation"]
    assert uniform["times_faster"]["value"] == pytest.approx(np.median(faster)) and "times_faster" not in teacher
    table, printed = (out / "results.md").read_text(), capsys.readouterr().out
    assert "window of 16 tokens that moves by 8; bootstrap over 60 documents" in table and table in printed
    assert "- copy: 1.000 [1.000, 1.000] x the teacher's perplexity, 1 x its parameters, " in table
    lines = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [float(lines[0][f"perplexity_{end}"]) for end in ("low", "high")] == [low, high]
    assert lines[1]["perplexity_ratio_high"] == "1.0" and lines[0]["perplexity_ratio"] == ""
    page = (out / "report.html").read_text()
    assert "30.00 [30.00, 30.00]" in page and "--page: #ffffff" in page and "http" not in page.replace("http-equiv", "")


def test_quality_alone_and_older_results(place: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    words_ = command(place, tmp_path, "--skip_latency", "--eval.max_tokens", "100", students=())
    for old in ({"schema": 3, "quality": []}, {"kind": "image classifier"}, []):
        (tmp_path / "results.json").write_text(json.dumps(old))
        with pytest.raises(SystemExit) as stop:
            cli.main(words_)
        assert stop.value.code == 2 and json.loads((tmp_path / "results.json").read_text()) == old
        assert "give another --output_dir, or --overwrite" in " ".join(capsys.readouterr().err.split())
    cli.main([*words_, "--overwrite"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["rows"][0]["seconds"] == {} and set(found["rows"][0]["values"]) == {"perplexity"}
    assert found["protocol"]["tokens"] == 99
    cli.main([*words_, "--seed", "1"])  # of the same kind: replaced
    kept = (tmp_path / "results.json").read_text()
    assert json.loads(kept)["protocol"]["seed"] == 1
    with pytest.raises(InputError, match="got those of language models in .*results.json"):
        Results.read(tmp_path / "results.json")

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "perplexities", stopped)
    with pytest.raises(KeyboardInterrupt):
        cli.main(words_)
    assert (tmp_path / "results.json").read_text() == kept
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        cli.main(words_)
    assert "expected one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "4"], "got --steps; drop it"),
        (["--data.block_size", "64"], "32 positions of teacher, got 64; lower --data.block_size"),
        (["--eval.new_tokens", "29"], "32 positions of teacher, got 33; lower --eval.new_tokens"),
        (["--eval.stride", "16"], "fix --eval.stride"),
        (["--eval.max_tokens", "1"], "fix --eval.max_tokens"),
        (["--data.held_out", "1.5"], "fix --data.held_out"),
        (["--data.path", "./none.txt"], "got nothing there; give --data.path"),
    ],
)
def test_mistakes(place: Path, tmp_path: Path, given: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(command(place, tmp_path / "out", *given, students=()))
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_other_tokenizers_are_refused(place: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(place / "teacher", tmp_path / "other")
    other = words()
    other.add_tokens(["new"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        cli.main([*command(place, tmp_path / "out", students=()), "--student", str(tmp_path / "other")])
    assert "expected one tokenizer for student and teacher" in " ".join(capsys.readouterr().err.split())


def exam(place: Path, **changes: Any) -> module.LanguageExam:
    given = {"path": str(place / "text.txt"), "block_size": 16, **changes.pop("data", {})}
    options = ModelOptions(
        "language model",
        str(place / "teacher"),
        (),
        given,
        changes.pop("exam", {}),
        "fp32",
        (1,),
        1,
        0,
        True,
        "",
        False,
    )
    return module.LanguageExam(options, {"teacher": str(place / "teacher")}, torch.device("cpu"))


def test_what_is_measured_on_is_what_training_held_out(place: Path) -> None:
    from stepdistill.data.text import TextConfig, open_texts

    config = TextConfig(str(place / "text.txt"), block_size=16, held_out=0.3)
    found = exam(place, data={"held_out": 0.3})
    assert found.examples == open_texts(config).held_out and 0 < len(found.examples) < 60
    assert found.held_out == 0.3 and exam(place, data={"held_out": 0.5}).held_out == 0.5
    assert len(exam(place, data={"held_out": 1.0}).examples) == 60


def test_generation_fills_the_window_by_default_and_never_ends_early(place: Path) -> None:
    found = exam(place, data={"held_out": 1.0})
    assert (found.prompt_tokens, found.new) == (4, 28)
    lm = found.networks["teacher"]
    with torch.no_grad():  # a model that says nothing but the end of the text
        lm.module.transformer.ln_f.bias.copy_(100 * lm.module.transformer.wte.weight[29])
    found._write(lm, torch.tensor([[1, 2, 3]]))
    found.new = 3
    found._write(lm, torch.tensor([[1, 2, 3]]))


def test_a_prompt_is_no_longer_than_the_text_it_is_of(place: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"a {letter}", "completion": "b"} for letter in LETTERS]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = exam(place, data={"path": str(tmp_path / "pairs.jsonl"), "held_out": 1.0, "prompt_tokens": 12})
    assert found.prompt_tokens == len(found._longest) == 4 and found.new == 28


def test_numbers_that_are_none(place: Path) -> None:
    found = exam(place, data={"held_out": 1.0})
    with torch.no_grad():
        found.networks["teacher"].module.transformer.ln_f.bias.fill_(math.nan)
    with pytest.raises(InputError, match="finite log-probabilities from teacher, got others in fp32; try --dtype"):
        found.measure()


def test_too_few_entries_for_the_tokenizer(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "teacher", tmp_path / "teacher")
    small = gpt2(1, vocabulary=29, bos_token_id=28, eos_token_id=28)
    small.save_pretrained(tmp_path / "teacher")
    shutil.copy(place / "text.txt", tmp_path)
    with pytest.raises(InputError, match="in teacher, got 29 entries, too few for token 29"):
        exam(tmp_path, data={"held_out": 1.0})


def test_prompts_alone_have_no_perplexity(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"a {letter}"}) + "\n" for letter in LETTERS))
    with pytest.raises(InputError, match="got prompts alone; give --data.path"):
        exam(place, data={"path": str(file), "held_out": 1.0})


@pytest.mark.parametrize("build", [lambda: gpt2(3), lambda: llama(3, "gemma2")])
def test_losses_of_tokens_are_written_out(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row without padding, by a plain log-softmax; in forwards and chunks of any size; a head that is plain or not."""
    network = built(3, build)
    lm, rows = CausalLM(network).frozen(), uneven(10, prompt=3)
    wanted = []
    for row in rows.rows:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            logs = network(ids).logits[0].double().log_softmax(1)
        wanted += [-logs[i - 1, row.ids[i]] for i in range(1, len(row.ids)) if row.learned[i]]
    assert lm.is_factored
    for at_once, chunk, explained in ((4096, 512, True), (1, 3, True), (30, 7, False)):
        monkeypatch.setattr(module, "AT_ONCE", at_once)
        monkeypatch.setattr(module, "CHUNK", chunk)
        lm.explained = explained
        found = token_losses(lm, rows)
        assert found.dtype == torch.float64
        assert_close(found, torch.stack(wanted), atol=1e-5, rtol=1e-5)


def test_losses_of_a_model_in_half_precision_are_taken_in_full() -> None:
    """Of its logits as they are: log-sum-exp and difference are not rounded to 8 bits once more."""
    lm, row = CausalLM(gpt2(3).bfloat16()).frozen(), uneven(1).rows[0]
    lm.explained = False
    ids = torch.tensor([row.ids])
    logs = lm(ids, torch.ones_like(ids))[0].double().log_softmax(1)
    wanted = torch.stack([-logs[i - 1, row.ids[i]] for i in range(1, len(row.ids))])
    assert_close(token_losses(lm, TokenRows([row], 39)), wanted, atol=1e-5, rtol=1e-5)


def test_units_are_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """a b <end> c <end> d e f <end>: eight targets of three documents, of which the first token is none."""
    examples, tokenizer = [Example("a b"), Example("c"), Example("d e f")], words()
    monkeypatch.setattr(module, "FEW", 3)
    for size, stride in ((4, 2), (9, 3)):
        rows = windows(examples, tokenizer, size, stride)
        owner, what = units(examples, tokenizer, rows)
        assert (owner.tolist(), what) == ([0, 0, 1, 1, 2, 2, 2, 2], "documents")
    owner, what = units(examples, tokenizer, windows(examples, tokenizer, 4, 2, most=6))
    assert (owner.tolist(), what) == ([0, 0, 1, 1, 2], "documents")
    monkeypatch.setattr(module, "FEW", 4)
    owner, what = units(examples, tokenizer, windows(examples, tokenizer, 4, 2))
    assert (owner.tolist(), what) == ([0, 0, 0, 1, 1, 2, 2, 3], "windows")
    empty = [Example(""), *examples]
    monkeypatch.setattr(module, "FEW", 3)
    assert units(empty, tokenizer, windows(empty, tokenizer, 4, 2))[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_units_of_answers_are_conversations() -> None:
    examples = [Example(prompt="a b", completion="c"), Example(prompt="d", completion="e f g")]
    owner, what = units(examples, words(), conversations(examples, words(), 16))
    assert (owner.tolist(), what) == ([0, 0, 1, 1, 1, 1], "conversations")


def test_perplexities_of_two_units() -> None:
    """exp of a mean over tokens, and a ratio whose interval is of the same units for both."""
    owner = np.array([0, 1, 1, 1])
    losses = {"teacher": np.array([2.0, 1.0, 1.0, 1.0]), "a": np.array([1.0, 0.5, 0.5, 0.5])}
    losses["b"] = losses["teacher"] + 0.25
    found = perplexities(losses, owner, seed=0)
    assert found["teacher"] == {"perplexity": Value(pytest.approx(math.exp(1.25)), pytest.approx((math.e, math.e**2)))}
    assert found["a"]["perplexity_ratio"].value == pytest.approx(math.exp(-0.625))
    assert found["a"]["perplexity_ratio"].interval == pytest.approx((math.exp(-1), math.exp(-0.5)))
    # whatever is drawn, the difference is the same
    assert found["b"]["perplexity_ratio"].interval == pytest.approx((math.exp(0.25),) * 2)
    alone = perplexities({"teacher": losses["teacher"]}, np.zeros(4, dtype=int), seed=0)
    assert alone["teacher"]["perplexity"] == Value(pytest.approx(math.exp(1.25)), None)
    huge = perplexities({"teacher": np.full(4, 1e4)}, owner, seed=0)["teacher"]["perplexity"]
    assert math.isfinite(huge.value) and huge.value == math.exp(700)


def test_losses_are_taken_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, rows, original = CausalLM(gpt2(1)).frozen(), uneven(), CausalLM.__call__
    lm.explained = False
    wanted = token_losses(lm, rows)
    monkeypatch.setattr(CausalLM, "__call__", lambda *given: on_mps(original(*given)))
    found = token_losses(lm, rows)
    assert found.dtype == torch.float64 and torch.equal(found, wanted)


def test_a_text_that_begins_with_the_end_is_not_taken_for_padding(tmp_path: Path) -> None:
    """Transformers warns once a process, where a mask is missing; it drops ours before it looks."""
    log, said = logging.getLogger("transformers.modeling_utils"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    network = model(1, pad_token_id=29)
    network.save_pretrained(tmp_path / "teacher")
    words().save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(" ".join(["<end>", *LETTERS * 3]))
    log.addHandler(handler)
    type(log).warning_once.cache_clear()  # type: ignore[attr-defined]
    try:
        one = exam(tmp_path, data={"held_out": 1.0})
        assert one._longest[0] == 29
        one._seconds()
        assert said == [] and not log.filters
        type(log).warning_once.cache_clear()  # type: ignore[attr-defined]
        network(torch.tensor([[29, 1]]))
        assert "attention_mask" in said[0], "of others it is still said"
    finally:
        log.removeHandler(handler)
