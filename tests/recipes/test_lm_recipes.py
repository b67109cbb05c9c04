"""The recipes for language models as users run them: files that stock Transformers opens, resumed, continued, refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import gpt2, words
from recipe_runs import load_recipe, run_in_process
from safetensors.torch import load_file

from stepdistill.errors import ExportError, InputError
from stepdistill.export import transformer
from stepdistill.kd.language_model import LanguageModelKD

VERBS = ("opens", "closes", "reads", "writes", "makes", "finds", "keeps", "sends", "takes", "gives")
NOUNS = ("file", "socket", "stream", "buffer", "list", "module", "thread", "signal", "string", "number")
DEMO = ["--teacher.layers", 1, "--teacher.width", 64, "--student.layers", 1, "--student.width", 32, "--vocabulary", 300]
TRAIN = [
    "--train.max_train_steps", 3, "--train.train_batch_size", 4, "--train.learning_rate", "1e-2",
    "--train.checkpointing_steps", 2,
    "--data.block_size", 24, "--data.held_out", "0.2", "--eval.max_tokens", 300, "--eval.new_tokens", 4,
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    draws = np.random.default_rng(0)

    def sentence() -> str:
        return f"The {draws.choice(NOUNS)} {draws.choice(VERBS)} a {draws.choice(NOUNS)} and {draws.choice(VERBS)} it."

    (folder / "text.txt").write_text("\n\n".join(" ".join(sentence() for _ in range(3)) for _ in range(60)))
    letters = [chr(97 + i) for i in range(26)]
    rows = [
        {"prompt": " ".join(draws.choice(letters, 2)), "completion": " ".join(draws.choice(letters, 3))}
        for _ in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps({'prompt': row['prompt']})}\n" for row in rows))
    turns = (
        ({"role": "user", "content": r["prompt"]} for r in rows),
        ({"role": "assistant", "content": r["completion"]} for r in rows),
    )
    (folder / "chat.jsonl").write_text(
        "".join(f"{json.dumps({'messages': pair})}\n" for pair in zip(*turns, strict=True))
    )
    for name, seed, width in (("teacher", 0, 32), ("student", 1, 16)):
        gpt2(seed, width=width, vocabulary=30, eos_token_id=29, bos_token_id=29).save_pretrained(folder / name)
        words(template=True).save_pretrained(folder / name)
    return folder


def given(inputs: Path, folder: Path, *more: Any) -> list[Any]:
    return ["--data.path", inputs / "text.txt", "--output_dir", folder, *DEMO, *TRAIN, *more]


def checkpoints(inputs: Path, folder: Path, data: str, *more: Any) -> list[Any]:
    paths = ["--teacher.path", inputs / "teacher", "--student.path", inputs / "student", "--data.path", inputs / data]
    return [*paths, "--output_dir", folder, *TRAIN, *more]


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("run") / "out"
    arguments = given(inputs, folder, "--train.validation_steps", 4, "--train.ema_decay", "0.5")
    run_in_process(load_recipe("lm_kd"), arguments)
    return folder, arguments


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stepdistill.json").read_text())


def test_what_a_run_leaves_behind(finished: Any) -> None:
    folder, _ = finished
    said = facts(folder)
    found = said["results"]["perplexity"]
    assert found.keys() == {"before", "teacher", "control", "student"} and found["student"] < found["before"]
    gap = (found["control"] - found["student"]) / (found["control"] - found["teacher"])
    assert said["results"]["gap_closed"] == pytest.approx(gap) or (found["teacher"] >= found["control"])
    assert said["verified"]["logits_differ_by"] == 0.0 and said["results"]["stride"] == 12
    assert said["student"]["kind"] == "full" and said["base_model"] is None
    card = (folder / "README.md").read_text()
    assert 'library_name: "transformers"' in card and "window 24, stride 12" in card and "## What they write" in card
    assert f"| student, distilled | {said['student']['parameters']:,} | {found['student']:.2f} |" in card
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6 + 3 + 3 and [("kd" in line) for line in lines] == [False] * 9 + [True] * 3
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"teacher", "control", "student"}
    assert [p.name for p in (folder / "samples").iterdir()] == ["000012.txt"]
    assert (folder / "config.yaml").is_file()


def test_stock_transformers_opens_it_and_continues_text(finished: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = finished
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("naïve — 北京")["input_ids"]) == "naïve — 北京"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    text = tokenizer("The file", return_tensors="pt")
    assert model.generate(**text, max_new_tokens=3, do_sample=False).shape[1] <= text["input_ids"].shape[1] + 3
    trained = load_file(folder / "checkpoints" / "student" / "12" / "student.ema.safetensors")
    assert torch.equal(model.state_dict()["transformer.wte.weight"], trained["transformer.wte.weight"]), (
        "the average is saved"
    )


def test_a_finished_run_resumed_is_the_same_run(finished: Any) -> None:
    folder, arguments = finished
    kept, metrics, said = load_file(folder / "model.safetensors"), (folder / "metrics.jsonl").read_text(), facts(folder)
    run_in_process(load_recipe("lm_kd"), [*arguments, "--train.resume_from_checkpoint", "latest"])
    after = load_file(folder / "model.safetensors")
    assert kept.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in kept.items())
    assert (folder / "metrics.jsonl").read_text() == metrics and facts(folder)["results"] == said["results"]


def test_a_run_that_died_in_its_last_fit_ends_as_one_that_did_not(
    inputs: Path, finished: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    recipe, arguments = (
        load_recipe("lm_kd"),
        given(inputs, tmp_path / "out", "--train.validation_steps", 4, "--train.ema_decay", "0.5"),
    )
    original = LanguageModelKD.training_step

    def dying(method: Any, batch: Any) -> Any:
        if method.step == 11:
            raise KeyboardInterrupt
        return original(method, batch)

    monkeypatch.setattr(LanguageModelKD, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(recipe, arguments)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setattr(LanguageModelKD, "training_step", original)
    run_in_process(recipe, [*arguments, "--train.resume_from_checkpoint", "latest"])
    one, other = (load_file(f / "model.safetensors") for f in (finished[0], tmp_path / "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert facts(tmp_path / "out")["results"] == facts(finished[0])["results"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpoints_by_path_with_answers_alone(inputs: Path, tmp_path: Path, kind: str) -> None:
    more = ["--student.kind", kind, "--student.rank", 2, "--train.gradient_checkpointing", "true"]
    run_in_process(load_recipe("lm_kd"), checkpoints(inputs, tmp_path / "out", "chat.jsonl", *more))
    said = facts(tmp_path / "out")
    assert said["results"]["stride"] is None and said["student"]["kind"] == kind
    assert said["base_model"] == str(inputs / "student")
    assert {p.name for p in (tmp_path / "out" / "checkpoints").iterdir()} == {"control", "student"}, (
        "the teacher is as it was"
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (inputs / "student", tmp_path / "out"))
    assert before.keys() == after.keys(), "an adapter is merged into the weights"
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "transformer.h.0.attn.c_attn.weight" in moved
    assert ("transformer.wte.weight" in moved) == (kind == "full")


def test_a_run_goes_on_with_its_own_teacher_alone(inputs: Path, tmp_path: Path) -> None:
    recipe, arguments = load_recipe("lm_kd"), checkpoints(inputs, tmp_path / "out", "pairs.jsonl")
    run_in_process(recipe, arguments)
    gpt2(5, width=32, vocabulary=30, eos_token_id=29, bos_token_id=29).save_pretrained(tmp_path / "other")
    words(template=True).save_pretrained(tmp_path / "other")
    more = ["--teacher.path", tmp_path / "other", "--train.resume_from_checkpoint", "latest"]
    with pytest.raises(InputError, match="--teacher.path"):
        run_in_process(recipe, [*arguments, *more])


def test_gkd_from_documents_and_from_prompts_alone(inputs: Path, tmp_path: Path) -> None:
    recipe = load_recipe("gkd")
    more = ["--sft_steps", 2, "--method.max_new_tokens", 5, "--data.prompt_tokens", 6]
    run_in_process(recipe, given(inputs, tmp_path / "demo", *more))
    said = facts(tmp_path / "demo")
    assert said["results"]["own_text_reverse_kl"].keys() == {"student", "control"}
    assert all(0 < value < math.inf for value in said["results"]["own_text_reverse_kl"].values())
    assert "on their own text" in (tmp_path / "demo" / "README.md").read_text()
    alone = ["--method.lmbda", 1, "--control", "false", "--method.max_new_tokens", 5]
    run_in_process(recipe, checkpoints(inputs, tmp_path / "prompts", "prompts.jsonl", *alone))
    assert facts(tmp_path / "prompts")["results"]["perplexity"] == {}
    assert (tmp_path / "prompts" / "model.safetensors").is_file()


def test_minillm_from_documents_and_from_prompts_alone(inputs: Path, tmp_path: Path) -> None:
    recipe = load_recipe("minillm")
    run_in_process(recipe, given(inputs, tmp_path / "demo", "--sft_steps", 2, "--method.max_new_tokens", 5))
    said = facts(tmp_path / "demo")
    assert said["results"]["own_text_reverse_kl"].keys() == {"student", "control"} and "gap_closed" in said["results"]
    assert "by policy gradients" in (tmp_path / "demo" / "README.md").read_text()
    alone = ["--control", "false", "--method.max_new_tokens", 5, "--method.importance_weights", "exact"]
    run_in_process(recipe, checkpoints(inputs, tmp_path / "prompts", "prompts.jsonl", *alone))
    assert (tmp_path / "prompts" / "model.safetensors").is_file()


def test_distillm_from_documents_and_what_it_refuses(inputs: Path, tmp_path: Path) -> None:
    recipe = load_recipe("distillm")
    more = ["--method.max_new_tokens", 5, "--method.threshold", 0.9, "--method.capacity", 4]
    run_in_process(recipe, given(inputs, tmp_path / "demo", "--sft_steps", 2, *more))
    lines = [json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("written") for line in lines) and "replayed" in (tmp_path / "demo" / "README.md").read_text()
    with pytest.raises(InputError, match="completion"):
        run_in_process(recipe, checkpoints(inputs, tmp_path / "prompts", "prompts.jsonl", *more))


@pytest.mark.parametrize("name", ["gkd", "minillm", "distillm"])
def test_students_that_write_are_not_shared_out_which_is_said_before_anything_trains(
    inputs: Path, tmp_path: Path, name: str
) -> None:
    more = ["--sft_steps", 2, "--method.max_new_tokens", 5, "--train.parallel", "fsdp"]
    with pytest.raises(InputError, match="expected whole weights to write text with, .*; use --train.parallel ddp"):
        run_in_process(load_recipe(name), given(inputs, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--student.kind", "lora"], "--student.path"),
        (["--student.path", "{inputs}/student"], "--teacher.fit_steps|--data.path|positions|block"),
        (["--data.path", "{inputs}/nowhere"], "nothing there"),
        (["--vocabulary", 100], "--vocabulary"),
        (["--data.block_size", 40000], "--data.block_size"),
        (["--eval.stride", 24], "--eval.stride"),
        (["--method.divergence.kind", "kl"], "kind"),
        (["--teacher.layers", 0], "--teacher.layers"),
    ],
)
def test_bad_input_names_the_fix_and_trains_nothing(inputs: Path, tmp_path: Path, more: list[Any], named: str) -> None:
    words_given = [str(word).format(inputs=inputs) for word in more]
    if "--student.path" in words_given:
        words_given += ["--data.block_size", "64"]
    with pytest.raises(InputError, match=named):
        run_in_process(load_recipe("lm_kd"), given(inputs, tmp_path / "out", *words_given))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_other_tokenizers_are_refused(inputs: Path, tmp_path: Path) -> None:
    other = words()
    other.add_tokens(["<extra>"])
    gpt2(1, vocabulary=31, eos_token_id=29).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="one tokenizer"):
        run_in_process(
            load_recipe("lm_kd"),
            checkpoints(inputs, tmp_path / "out", "pairs.jsonl", "--student.path", tmp_path / "other"),
        )


def test_an_export_that_computes_something_else_does_not_count(finished: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = {"input_ids": torch.arange(5)[None]}
    assert transformer.compare(folder, model, ids, "text-generation") == 0.0
    with torch.no_grad():
        model.transformer.ln_f.weight[0] += 1e-3
    with pytest.raises(ExportError, match="differ by"):
        transformer.compare(folder, model, ids, "text-generation")
    with pytest.raises(ExportError, match="does not open"):
        transformer.compare(tmp_path, model, ids, "text-generation")
