"""`export RUN` for the recipes of BERT layouts, and of language models that read their own text: each fit as what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from fake_hub import FakeApi, uploaded
from recipe_runs import load_recipe, run_in_process
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.config import parse
from stepdistill.errors import InputError
from stepdistill.export.rerun import export_run
from stepdistill.export.rerun_kd import RECIPES, recipe_of

NOUNS = ("file", "socket", "stream", "buffer", "list", "module", "thread", "signal")
VERBS = {"files": ("opens", "reads", "closes"), "sockets": ("binds", "listens", "connects")}
TRAIN = [
    "--train.max_train_steps", 2, "--train.train_batch_size", 4, "--train.learning_rate", "3e-3", "--data.block_size", 24,
    "--data.held_out", "0.2", "--vocabulary", 300, "--train.ema_decay", "0.5", "--teacher.width", 32,
]  # fmt: skip
MASKED = ["--teacher.layers", 4, "--teacher.fit_steps", 1, "--eval.max_tokens", 200, "--eval.masks", 1]
STAGES = [
    "--teacher.layers", 2, "--teacher.fit_steps", 1, "--student.layers", 1, "--student.width", 16, "--stages.general", 1,
    "--stages.intermediate", 1, "--stages.fine_tuning", 1, "--task.length", 20, "--task.text_column", "sentence",
]  # fmt: skip
CAUSAL = [
    "--teacher.layers", 1, "--student.layers", 1, "--student.width", 16, "--teacher.fit_steps", 1, "--sft_steps", 1,
    "--method.max_new_tokens", 2, "--eval.max_tokens", 100, "--eval.new_tokens", 2, "--eval.samples", 1,
    "--data.prompt_tokens", 6,
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draws = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    lines = [f"The {draws.choice(NOUNS)} opens a {draws.choice(NOUNS)} and reads it, number {i}." for i in range(80)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    rows = [
        {"sentence": f"Then it {draws.choice(VERBS[kind])} a {draws.choice(NOUNS)}, {i}.", "label": kind}
        for i, kind in enumerate(sorted(VERBS) * 30)
    ]
    (folder / "task.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def trained(recipe: str, inputs: Path, folder: Path, *more: Any) -> Path:
    """A finished run."""
    task = ["--task.path", inputs / "task.jsonl"] if recipe == "tinybert" else []
    given = {"tinybert": STAGES, "distilbert": MASKED}.get(recipe, CAUSAL)
    places = ["--data.path", inputs / "text.txt", *task, "--output_dir", folder]
    run_in_process(load_recipe(recipe), [*places, *TRAIN, *given, *more])
    return folder


@pytest.fixture(scope="module")
def masked_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the demo, with a student from random weights; tests don't write into it."""
    return trained("distilbert", inputs, tmp_path_factory.mktemp("masked") / "out", "--random", "true")


@pytest.fixture(scope="module")
def staged_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the demo; tests don't write into it."""
    return trained("tinybert", inputs, tmp_path_factory.mktemp("staged") / "out")


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stepdistill.json").read_text())


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def checkpoint(run: Path, fit: str) -> Path:
    return max((run / "checkpoints" / fit).iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)


def stopped(run: Path, folder: Path) -> Path:
    """The run as it was before its evaluation: config.yaml and checkpoints."""
    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    shutil.copy(run / "config.yaml", folder)
    return folder


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_comes_back(run: Path, folder: Path, fit: str) -> None:
    """Export of the finished run is what its end wrote, and of the stopped one the same weights without results."""
    export_run(run, folder / "again")
    before, after = facts(run), facts(folder / "again")
    kept = ("task", "method", "title", "class", "base_model", "teacher", "student", "results", "details", "sections")
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}
    assert after["checkpoint"]["fit"] == fit and before["results"]
    assert_same(weights(run), weights(folder / "again"))
    early = stopped(run, folder / "early")
    export_run(early)
    assert_same(weights(run), weights(early))
    assert (early / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert facts(early)["results"] == {} and "None: the run had not come" in (early / "README.md").read_text()
    assert set(facts(early)["details"]) <= set(before["details"])


@pytest.mark.parametrize(("kind", "fit"), [("masked_run", "student"), ("staged_run", "prediction")])
def test_the_student_comes_back(kind: str, fit: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert_comes_back(request.getfixturevalue(kind), tmp_path, fit)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["minillm", "distillm"])
def test_students_that_read_their_own_text_come_back(recipe: str, inputs: Path, tmp_path: Path) -> None:
    run = trained(recipe, inputs, tmp_path / "run", "--export.dtype", "bf16")
    assert {value.dtype for value in weights(run).values()} == {torch.bfloat16} and facts(run)["method"] == recipe
    assert_comes_back(run, tmp_path, "student")
    for fit in ("sft", "control", "teacher"):
        export_run(run, tmp_path / fit, fit)
        assert facts(tmp_path / fit)["teacher"] is None and facts(tmp_path / fit)["results"] == {}


@pytest.mark.slow
def test_a_student_of_prompts_alone_comes_back(inputs: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say what the {noun} does, {i}:"} for noun in NOUNS for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    alone = [
        "--teacher.fit_steps",
        0,
        "--sft_steps",
        0,
        "--control",
        "false",
        "--data.path",
        tmp_path / "prompts.jsonl",
    ]
    run = trained("minillm", inputs, tmp_path / "run", *alone)
    early = stopped(run, tmp_path / "early")
    export_run(early)
    assert_same(weights(run), weights(early))


MASKED_TITLE, CLASSIFIER_TITLE = "Distilled masked language model", "Text classifier amid its distillation, "
UNTAUGHT = "Control group of a distillation, trained without a teacher"


@pytest.mark.parametrize(
    ("kind", "fit", "made", "title", "taught"),
    [
        pytest.param(
            "masked_run",
            "teacher",
            "NomicBertForMaskedLM",
            "Teacher, trained for a distillation",
            False,
            marks=pytest.mark.slow,
        ),
        pytest.param("masked_run", "control", "NomicBertForMaskedLM", UNTAUGHT, False, marks=pytest.mark.slow),
        ("masked_run", "random", "NomicBertForMaskedLM", f"{MASKED_TITLE}, begun with random weights", True),
        ("staged_run", "teacher", "NomicBertForMaskedLM", "Teacher, trained for a distillation", False),
        (
            "staged_run",
            "fine-tuning",
            "NomicBertForSequenceClassification",
            "Teacher, fine-tuned for a distillation",
            False,
        ),
        ("staged_run", "general", "NomicBertForSequenceClassification", f"{CLASSIFIER_TITLE}after general text", True),
        pytest.param(
            "staged_run",
            "intermediate",
            "NomicBertForSequenceClassification",
            f"{CLASSIFIER_TITLE}before the task",
            True,
            marks=pytest.mark.slow,
        ),
        ("staged_run", "control-general", "NomicBertForMaskedLM", UNTAUGHT, False),
        pytest.param(
            "staged_run", "control", "NomicBertForSequenceClassification", UNTAUGHT, False, marks=pytest.mark.slow
        ),
    ],
)
def test_other_fits_are_exported_as_what_they_are(
    kind: str, fit: str, made: str, title: str, taught: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(kind)
    with pytest.raises(InputError, match=f"--output_dir for '{fit}'"):
        export_run(run, checkpoint=fit)
    export_run(run, tmp_path, fit)
    said, found = facts(tmp_path), getattr(transformers, made).from_pretrained(tmp_path).state_dict()
    assert (said["class"], said["teacher"], said["results"]) == (made, "demo" if taught else None, {})
    assert said["task"] == ("fill-mask" if made.endswith("MaskedLM") else "text-classification")
    assert (
        said["title"].startswith(title) and said["base_model"] is None and said["verified"]["logits_differ_by"] == 0.0
    )
    averaged = load_file(checkpoint(run, fit) / "student.ema.safetensors")
    shared = found.keys() & averaged.keys()
    assert len(shared) > 10 and all(torch.equal(found[name], averaged[name]) for name in shared)
    telling = [line for line in said["details"] if line.startswith(("classes", "begun"))]
    begun = ["begun with its layers 0, 3 (from 0), its embeddings and its head"] * (
        kind == "masked_run" and fit == "control"
    )
    assert telling == (begun or ["classes: files, sockets"] * made.endswith("Classification"))


@pytest.mark.parametrize("kind", ["masked_run", "staged_run"])
def test_a_tokenizer_of_other_texts_is_refused(
    kind: str, inputs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = stopped(request.getfixturevalue(kind), tmp_path / "run")
    (tmp_path / "text.txt").write_text((inputs / "text.txt").read_text() + "\n\nA new one, which was not there." * 9)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(inputs / "text.txt"), str(tmp_path / "text.txt")))
    with pytest.raises(InputError, match=r"texts that .* was trained on.* samples at .*checkpoint .* had \d+"):
        export_run(run)
    assert not (run / "model.safetensors").exists()


def test_a_student_made_of_its_teacher_has_no_path(masked_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--teacher\.path alone.*made from its teacher.*drop it"):
        export_run(masked_run, tmp_path / "out", student={"path": "elsewhere"})


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_all_recipes_are_told_apart(name: str) -> None:
    recipe = load_recipe(name)
    demo = Path(recipe.__file__).parent / "configs" / f"{name}_demo.yaml"
    assert recipe_of(yaml.safe_load(parse(recipe.Recipe, ["--config", str(demo)]).yaml)) == name


def test_every_recipe_with_networks_of_transformers_is_known() -> None:
    folder = Path(load_recipe("lm_kd").__file__).parent
    using = {path.stem for path in folder.glob("*.py") if "NetworkExportConfig" in path.read_text()}
    assert using == set(RECIPES)


@pytest.mark.parametrize("name", ["minillm", "distillm", "distilbert", "tinybert"])
def test_the_hub_is_asked_before_training(api: type[FakeApi], inputs: Path, tmp_path: Path, name: str) -> None:
    api.fails = {"whoami": OSError("no login")}
    with pytest.raises(InputError, match="no login"):
        trained(name, inputs, tmp_path / "run", "--export.push_to_hub", "true")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["masked_run", "staged_run"])
def test_half_precision_and_the_hub(
    kind: str, api: type[FakeApi], inputs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(kind)
    export_run(run, tmp_path / "half", export={"dtype": "bf16", "push_to_hub": True, "hub_model_id": "lab/x"})
    found, sent = weights(tmp_path / "half"), uploaded(api)
    assert (
        set(sent) == set(facts(tmp_path / "half")["files"]) and 'from_pretrained("lab/x")' in sent["README.md"].decode()
    )
    for name, value in weights(run).items():
        assert torch.equal(found[name], value.bfloat16() if value.is_floating_point() else value), name
    for name, content in sent.items():
        assert str(tmp_path).encode() not in content and str(inputs).encode() not in content, name
    assert facts(tmp_path / "half")["results"] == facts(run)["results"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["distilbert", "tinybert"])
def test_a_run_uploads_no_path_of_this_machine(
    recipe: str, api: type[FakeApi], masked_run: Path, staged_run: Path, inputs: Path, tmp_path: Path
) -> None:
    """Teachers by path: the masked model, and of the task the classifier that was fine-tuned from it."""
    run = masked_run if recipe == "distilbert" else staged_run
    fits = {"teacher": "--teacher.path"} | ({"fine-tuning": "--stages.fine_tuned"} if recipe == "tinybert" else {})
    paths: list[Any] = []
    for fit, flag in fits.items():
        export_run(run, tmp_path / "teachers" / fit, fit)
        paths += [flag, tmp_path / "teachers" / fit]
    more = ["--teacher.fit_steps", 0, *(["--stages.fine_tuning", 0] if recipe == "tinybert" else [])]
    made = trained(
        recipe, inputs, tmp_path / "run", *paths, *more, "--export.push_to_hub", "true", "--export.dtype", "fp16"
    )
    for name, content in uploaded(api).items():
        assert str(tmp_path).encode() not in content, name
    assert facts(made)["student"]["dtype"] == "fp16" and facts(made)["teacher"] == str(
        tmp_path / "teachers" / "teacher"
    )
    assert_comes_back(made, tmp_path, "prediction" if recipe == "tinybert" else "student")
