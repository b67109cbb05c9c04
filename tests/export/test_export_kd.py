"""`export RUN` for runs of classic distillation: the weights asked for, under what is known of them and no more."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_hub import FakeApi, uploaded
from language import gpt2, words
from mps import on_mps
from recipe_runs import load_recipe, run_in_process
from safetensors.torch import load_file
from torch import Tensor

from stepdistill import cli
from stepdistill.errors import ExportError, InputError
from stepdistill.export.rerun import export_run
from stepdistill.export.rerun_kd import recipe_of
from stepdistill.export.transformer import check_rounding, round_weights
from stepdistill.kd.language_model import LanguageModelKD

TRAIN = [
    "--train.max_train_steps", 3, "--train.train_batch_size", 4, "--train.learning_rate", "1e-2",
    "--train.checkpointing_steps", 2, "--eval.max_tokens", 100, "--eval.new_tokens", 2, "--eval.samples", 1,
    "--data.block_size", 16, "--data.held_out", "0.2",
]  # fmt: skip
DEMO = ["--teacher.layers", 1, "--teacher.width", 64, "--student.layers", 1, "--student.width", 32, "--vocabulary", 280]
CLASSIFIERS = [
    "--teacher.depths", "1,1", "--teacher.widths", "8,8", "--student.depths", "1,1", "--student.widths", "4,8", "--seeds", 2,
    "--teacher_steps", 2, "--train.max_train_steps", 2, "--train.train_batch_size", 4, "--train.learning_rate", "1e-2",
    "--data.resolution", 32, "--data.images", 12, "--data.labelled", 8, "--data.test_images", 8, "--temperatures", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    sentences = [f"The {a} {b} a {c} and {b} it." for a in ("file", "list") for b in ("opens", "keeps") for c in "xyz"]
    (folder / "text.txt").write_text("\n\n".join(sentence * (1 + i % 4) for i, sentence in enumerate(sentences * 4)))
    rows = [{"prompt": a, "completion": f"{b} {a}"} for a in "abcde" for b in "vwxyz"]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, seed, width in (("teacher", 0, 32), ("student", 1, 16)):
        gpt2(seed, width=width, vocabulary=30, eos_token_id=29, bos_token_id=29).save_pretrained(folder / name)
        words().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def language_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the demo, with an average of its student; tests don't write into it."""
    folder = tmp_path_factory.mktemp("lm") / "out"
    data = ["--data.path", inputs / "text.txt", "--output_dir", folder, "--train.ema_decay", "0.5"]
    run_in_process(load_recipe("lm_kd"), [*data, *DEMO, *TRAIN])
    return folder


@pytest.fixture(scope="module")
def adapter_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of GKD that trained an adapter on a checkpoint; tests don't write into it."""
    folder = tmp_path_factory.mktemp("gkd") / "out"
    paths = ["--teacher.path", inputs / "teacher", "--student.path", inputs / "student", "--student.kind", "lora"]
    more = ["--student.rank", 2, "--method.max_new_tokens", 2, "--control", "false", "--output_dir", folder]
    run_in_process(load_recipe("gkd"), [*paths, "--data.path", inputs / "pairs.jsonl", *more, *TRAIN])
    return folder


@pytest.fixture(scope="module")
def classifier_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, exported in half precision; tests don't write into it."""
    folder = tmp_path_factory.mktemp("hinton") / "out"
    run_in_process(load_recipe("hinton"), [*CLASSIFIERS, "--output_dir", folder, "--export.dtype", "bf16"])
    return folder


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stepdistill.json").read_text())


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def stopped(run: Path, folder: Path) -> Path:
    """The run as it was before its evaluation: config.yaml and checkpoints."""
    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    shutil.copy(run / "config.yaml", folder)
    return folder


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["language_run", "adapter_run"])
def test_the_finished_student_comes_back_with_its_results(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(kind)
    assert export_run(run, tmp_path / "again") == tmp_path / "again"
    assert_same(weights(run), weights(tmp_path / "again"))
    before, after = facts(run), facts(tmp_path / "again")
    same = (
        "task",
        "method",
        "title",
        "class",
        "base_model",
        "teacher",
        "student",
        "results",
        "details",
        "sections",
        "files",
    )
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    step = max(int(path.name) for path in (run / "checkpoints" / "student").iterdir())
    assert after["checkpoint"] == {"fit": "student", "step": step} and "checkpoint" not in before
    assert f"step {step} of the fit student" in card(tmp_path / "again")
    assert before["sections"]["Results"] in card(tmp_path / "again")
    for name in ("tokenizer.json", "config.json"):
        assert (run / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_into_its_own_folder_the_results_stay(language_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(language_run, tmp_path / "run"))
    for dtype in ("bf16", "fp32"):  # what is known of the weights outlives their rounding
        export_run(run, export={"dtype": dtype})
        assert facts(run)["results"] == facts(language_run)["results"]
        assert ("before its weights were rounded" in card(run)) == (dtype == "bf16")
    assert_same(weights(run), weights(language_run))
    assert (run / "metrics.jsonl").is_file() and (run / "config.yaml").is_file()


def test_another_step_has_no_results(language_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--output_dir for the weights of step 10"):
        export_run(language_run, checkpoint="10")
    export_run(language_run, tmp_path / "ten", "10")
    trained = load_file(language_run / "checkpoints" / "student" / "10" / "student.ema.safetensors")
    found = weights(tmp_path / "ten")
    assert torch.equal(found["transformer.h.0.mlp.c_fc.weight"], trained["transformer.h.0.mlp.c_fc.weight"])
    assert facts(tmp_path / "ten")["results"] == {} and "not known to be of these weights" in card(tmp_path / "ten")
    assert facts(tmp_path / "ten")["teacher"] == "demo"


@pytest.mark.parametrize(
    ("which", "fit", "width", "title"),
    [
        ("control", "control", 32, "Control group"),
        ("teacher", "teacher", 64, "Teacher"),
        ("8", "control", 32, "Control"),
    ],
)
def test_control_group_and_teacher_are_exported_as_what_they_are(
    language_run: Path, tmp_path: Path, which: str, fit: str, width: int, title: str
) -> None:
    with pytest.raises(InputError, match=f"--output_dir for '{fit}'"):
        export_run(language_run, checkpoint=which)
    export_run(language_run, tmp_path / "out", which)
    said, found = facts(tmp_path / "out"), weights(tmp_path / "out")
    trained = load_file(
        language_run / "checkpoints" / fit / str(said["checkpoint"]["step"]) / "student.ema.safetensors"
    )
    assert torch.equal(found["transformer.wte.weight"], trained["transformer.wte.weight"])
    assert found["transformer.wte.weight"].shape == (280, width)
    assert said["title"].startswith(title) and said["teacher"] is None and said["results"] == {}
    assert said["checkpoint"]["fit"] == fit and "- distillation" not in card(tmp_path / "out")


def test_a_run_that_was_stopped_says_what_is_missing(language_run: Path, tmp_path: Path, inputs: Path) -> None:
    run = stopped(language_run, tmp_path)
    export_run(run)
    assert_same(weights(run), weights(language_run))
    assert (run / "tokenizer.json").read_bytes() == (language_run / "tokenizer.json").read_bytes()
    assert facts(run)["results"] == {} and "None: the run had not come to its evaluation" in card(run)
    assert facts(run)["details"] == ["tokenizer: 280 tokens"]


def test_a_tokenizer_of_other_texts_is_refused(language_run: Path, tmp_path: Path, inputs: Path) -> None:
    run = stopped(language_run, tmp_path)
    (tmp_path / "text.txt").write_text((inputs / "text.txt").read_text() + "\n\nA new one, which was not there." * 9)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(inputs / "text.txt"), str(tmp_path / "text.txt")))
    with pytest.raises(InputError, match=r"texts that .* was trained on.* samples at .*checkpoint .*12 had \d+"):
        export_run(run)
    assert not (run / "model.safetensors").exists()


def test_a_run_without_its_student_names_what_there_is(language_run: Path, tmp_path: Path) -> None:
    run = stopped(language_run, tmp_path)
    shutil.rmtree(run / "checkpoints" / "student")
    with pytest.raises(InputError, match="'student', the student, .* got those of control, teacher alone; train on"):
        export_run(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="train first"):
        export_run(run)


def test_a_run_killed_in_training(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its teacher and student are checkpoints; the first is not needed but for its tokenizer."""
    original = LanguageModelKD.training_step

    def dying(method: Any, batch: Any) -> Any:
        if method.step == 2:
            raise KeyboardInterrupt
        return original(method, batch)

    monkeypatch.setattr(LanguageModelKD, "training_step", dying)
    paths = ["--teacher.path", inputs / "teacher", "--student.path", inputs / "student", "--control", "false"]
    data = ["--data.path", inputs / "pairs.jsonl", "--output_dir", tmp_path / "run"]
    with pytest.raises(KeyboardInterrupt):
        run_in_process(load_recipe("lm_kd"), [*paths, *data, *TRAIN])
    export_run(tmp_path / "run", tmp_path / "out")
    said = facts(tmp_path / "out")
    assert said["checkpoint"] == {"fit": "student", "step": 2} and said["results"] == {}
    assert (said["method"], said["base_model"], said["teacher"]) == (
        "lm_kd", str(inputs / "student"), str(inputs / "teacher"),
    )  # fmt: skip


def test_what_has_moved_is_said_by_its_flag(
    adapter_run: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped(adapter_run, tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(inputs), "/nowhere/at/all"))
    with pytest.raises(InputError, match="--teacher.path"):
        export_run(run)
    moved = ["--teacher.path", str(inputs / "teacher")]
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), *moved])
    assert "--student.path" in capsys.readouterr().err
    cli.main(["export", str(run), *moved, "--student.path", str(inputs / "student")])
    assert_same(weights(run), weights(adapter_run))
    assert facts(run)["teacher"] == str(inputs / "teacher") and facts(run)["method"] == "gkd"


def test_results_of_an_adapter_go_with_what_is_under_it(adapter_run: Path, inputs: Path, tmp_path: Path) -> None:
    gpt2(7, width=16, vocabulary=30, eos_token_id=29, bos_token_id=29).save_pretrained(tmp_path / "other")
    words().save_pretrained(tmp_path / "other")
    export_run(adapter_run, tmp_path / "out", student={"path": str(tmp_path / "other")})
    assert facts(tmp_path / "out")["results"] == {}
    assert facts(tmp_path / "out")["student"]["hash"] != facts(adapter_run)["student"]["hash"]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("language_run", "fp16"), ("adapter_run", "bf16"), ("classifier_run", "fp16")]
)
def test_half_precision(kind: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    import transformers

    run = request.getfixturevalue(kind)
    export_run(run, tmp_path / "full", export={"dtype": "fp32"})
    export_run(run, tmp_path / "half", export={"dtype": dtype})
    whole, half, wanted = weights(tmp_path / "full"), weights(tmp_path / "half"), getattr(torch, TORCH[dtype])
    assert whole.keys() == half.keys()
    for name, value in whole.items():
        assert torch.equal(half[name], value.to(wanted) if value.is_floating_point() else value), name
    said = facts(tmp_path / "half")
    assert said["verified"]["logits_differ_by"] == 0.0 and 0 < said["verified"]["rounding_moves_logits_by"] < 0.05
    assert said["student"]["dtype"] == dtype and said["results"] == facts(run)["results"]
    auto = (
        transformers.AutoModelForImageClassification if kind == "classifier_run" else transformers.AutoModelForCausalLM
    )
    assert auto.from_pretrained(tmp_path / "half").dtype == wanted


TORCH = {"fp16": "float16", "bf16": "bfloat16"}


def test_weights_that_a_precision_does_not_hold() -> None:
    model, probe = gpt2(0), {"input_ids": torch.arange(5)[None]}
    assert round_weights(model, torch.float32) is model
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 1e6
    assert check_rounding(model, round_weights(model, torch.bfloat16), probe, torch.bfloat16) < 0.02
    with pytest.raises(ExportError, match=r"float16 compute something else.*--export\.dtype"):
        check_rounding(model, round_weights(model, torch.float16), probe, torch.float16)
    broken = round_weights(model, torch.bfloat16)
    with torch.no_grad():
        broken.transformer.ln_f.bias[0] = torch.nan
    with pytest.raises(ExportError, match="move by nan"):
        check_rounding(model, broken, probe, torch.bfloat16)


def test_logits_are_compared_where_there_is_no_float64() -> None:
    model, probe = gpt2(0), {"input_ids": torch.arange(5)[None]}
    model.lm_head.register_forward_hook(lambda _layer, _given, logits: on_mps(logits))
    assert 0.0 < check_rounding(model, round_weights(model, torch.bfloat16), probe, torch.bfloat16) < 0.02


def test_a_classifier_s_student_is_that_of_the_method_s_own_temperature(classifier_run: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    assert {v.dtype for v in weights(classifier_run).values()} == {torch.bfloat16, torch.int64}
    run = stopped(classifier_run, tmp_path / "run")
    export_run(run)  # T=4-1 and T=1-1 were trained later
    trained = load_file(run / "checkpoints" / "T=4-0" / str(facts(run)["checkpoint"]["step"]) / "student.safetensors")
    assert facts(run)["student"]["dtype"] == "bf16"  # as config.yaml says
    assert_same(weights(run), {n: v.bfloat16() if v.is_floating_point() else v for n, v in trained.items()})
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (run, classifier_run))
    assert one == other and len(one["id2label"]) == 48
    assert AutoImageProcessor.from_pretrained(run).size == {"height": 32, "width": 32}
    assert facts(run)["results"] == {} and facts(run)["details"] == facts(classifier_run)["details"]


@pytest.mark.parametrize(
    ("fit", "title", "teacher"),
    [("T=1-1", "Distilled", "demo"), ("labelsalone-0", "Control group", None), ("teacher", "Teacher", None)],
)
def test_other_classifiers_of_a_run(classifier_run: Path, tmp_path: Path, fit: str, title: str, teacher: Any) -> None:
    export_run(classifier_run, tmp_path, fit, export={"dtype": "fp32"})
    (checkpoint,) = sorted((classifier_run / "checkpoints" / fit).iterdir(), key=lambda path: int(path.name))[-1:]
    assert_same(weights(tmp_path), load_file(checkpoint / "student.safetensors"))
    said = facts(tmp_path)
    assert said["title"].startswith(title) and said["teacher"] == teacher and said["results"] == {}


@pytest.mark.parametrize(("flag", "value"), [("formats", "diffusers,kohya"), ("verify", "full")])
def test_flags_of_other_recipes_are_refused(language_run: Path, tmp_path: Path, flag: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"--export\.dtype.* for a run of lm_kd.*got --export\.{flag}; drop it"):
        export_run(language_run, tmp_path / "out", export={flag: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [{}, None, {"kd_weight": 1.0, "flavour": 2}])
def test_a_config_of_another_version(method: Any) -> None:
    with pytest.raises(InputError, match="run of lm_kd, gkd, minillm, distillm, hinton, distilbert, tinybert, got"):
        recipe_of({"method": method})


def test_the_hub_is_asked_before_training_and_gets_no_path_of_this_machine(
    api: type[FakeApi], inputs: Path, tmp_path: Path
) -> None:
    paths = ["--teacher.path", inputs / "teacher", "--student.path", inputs / "student", "--control", "false"]
    data = ["--data.path", inputs / "pairs.jsonl", "--output_dir", tmp_path / "run", "--export.push_to_hub", "true"]
    api.fails = {"whoami": OSError("no login")}
    with pytest.raises(InputError, match="no login"):
        run_in_process(load_recipe("lm_kd"), [*paths, *data, *TRAIN])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    api.fails = {}
    run_in_process(load_recipe("lm_kd"), [*paths, *data, *TRAIN])
    first = uploaded(api)
    assert set(first) == set(facts(tmp_path / "run")["files"])
    for name, content in first.items():
        assert str(tmp_path).encode() not in content and str(inputs).encode() not in content, name
        assert content == (tmp_path / "run" / name).read_bytes() or name in ("README.md", "stepdistill.json")
    said = json.loads(first["stepdistill.json"])
    assert (said["teacher"], said["base_model"]) == ("PATH/TO/teacher", "PATH/TO/student")
    text = first["README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("ada/run")' in text and "teacher: PATH/TO/teacher" in text
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1]) and "| student, distilled |" in text
    assert str(inputs / "teacher") in card(tmp_path / "run")  # here it is a path that opens
    api.calls.clear()
    export_run(tmp_path / "run", export={"push_to_hub": True, "hub_model_id": "lab/x"})
    assert 'from_pretrained("lab/x")' in uploaded(api)["README.md"].decode()
    assert uploaded(api)["model.safetensors"] == first["model.safetensors"]


@pytest.mark.parametrize("name", ["gkd", "hinton"])
def test_the_hub_is_asked_first_in_all_recipes(api: type[FakeApi], tmp_path: Path, name: str) -> None:
    api.fails = {"whoami": OSError("no login")}
    more = CLASSIFIERS if name == "hinton" else [*DEMO, *TRAIN]
    with pytest.raises(InputError, match="no login"):
        run_in_process(load_recipe(name), [*more, "--output_dir", tmp_path / "run", "--export.push_to_hub", "true"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
