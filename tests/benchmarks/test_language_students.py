"""Students beside one control a seed: what is run, what is not run again, and what the numbers of several seeds say."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from recipe_runs import ROOT, load_recipe, load_script, run_in_process
from scipy import stats

from stepdistill.config import parse
from stepdistill.errors import InputError

VERBS, NOUNS = ("opens", "closes", "reads", "writes", "makes"), ("file", "socket", "stream", "buffer", "list", "thread")
TINY = (
    "--teacher.layers 1 --teacher.width 64 --student.layers 1 --student.width 32 --vocabulary 300 --train.max_train_steps 3 "
    "--train.train_batch_size 4 --train.learning_rate 1e-2 --data.block_size 24 --data.held_out 0.2 --eval.max_tokens 300 "
    "--eval.new_tokens 4 --eval.samples 1 --teacher.fit_steps 6"
)
GKD = " --sft_steps 2 --method.max_new_tokens 5 --data.prompt_tokens 6"
TWO = "forward:--method.divergence.kind=forward_kl;reverse:--method.divergence.kind=reverse_kl"


@pytest.fixture(scope="module")
def students() -> Iterator[ModuleType]:
    """The script, which imports others by their bare names."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("language_students")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in ("language_students", "language_groups", "seed_spread"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inputs") / "text.txt"
    said = [f"The {a} {v} a {b} and {w} it." for a in NOUNS for b in NOUNS for v in VERBS for w in VERBS if a != b]
    file.write_text("\n\n".join(" ".join(said[i : i + 3]) for i in range(0, len(said), 13)))
    return file


@pytest.fixture
def here(students: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Recipes run in this process, and their commands are kept."""
    made: list[list[str]] = []

    def train(words: list[str], **options: Any) -> None:
        assert options["check"], "a run that fails must not pass for one"
        made.append(words)
        run_in_process(load_recipe(Path(words[1]).stem), words[2:])

    monkeypatch.setattr(students, "subprocess", SimpleNamespace(run=train))  # `platform` calls the true one
    return made


def flags(text: Path, place: Path, **more: str) -> list[str]:
    settings = f"{TINY} --data.path {text}{more.pop('settings', '')}"
    given = {"seeds": "3,4", "variants": TWO, "settings": settings, "runs": str(place / "runs")}
    return [f"--{name}={value}" for name, value in {**given, "output": str(place / "out.json"), **more}.items()]


# -- numbers ---------------------------------------------------------------------------------------------------------------


def test_the_quantiles_of_students_distribution(students: ModuleType) -> None:
    spread = sys.modules["seed_spread"]
    for freedom in (1, 2, 3, 4, 5, 8, 9, 30):
        for share in (0.5, 0.9, 0.95, 0.99):
            wanted = stats.t.ppf(0.5 + share / 2, freedom)
            assert spread.t_quantile(freedom, share) == pytest.approx(wanted, rel=1e-9)


def test_differences_are_taken_within_a_seed(students: ModuleType) -> None:
    spread = sys.modules["seed_spread"]
    ours, theirs = [9.0, 19.1, 28.9], [10.0, 20.0, 30.0]  # seeds differ by 10, the two by 1
    found = spread.paired(ours, theirs)
    assert found["values"] == pytest.approx([-1.0, -0.9, -1.1]) and found["mean"] == pytest.approx(-1.0)
    assert found["std"] == pytest.approx(0.1) and found["exceeds_seed_noise"] is True
    test = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found["interval"] == pytest.approx([test.low, test.high], rel=1e-9)
    assert spread.paired(theirs, ours)["exceeds_seed_noise"] is True
    assert spread.paired([9.0, 21.0, 30.0], theirs)["exceeds_seed_noise"] is False
    assert spread.paired([9.0], [10.0]) == {
        "mean": -1.0, "std": None, "values": [-1.0], "interval": None, "exceeds_seed_noise": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match="argument 2"):
        spread.paired([1.0, 2.0], [1.0])


def test_a_mean_of_what_is_not_known_is_not_known(students: ModuleType) -> None:
    spread = sys.modules["seed_spread"].spread
    assert spread([1.0, None]) == {"mean": None, "std": None, "values": [1.0, None]}
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": math.sqrt(2), "values": [1.0, 3.0]}
    assert spread([2.0])["std"] is None


def control(perplexity: float, teacher: float = 20.0, **more: Any) -> dict[str, Any]:
    sizes = {"control": 5, "teacher": 9}
    return {"perplexity": {"control": perplexity, "teacher": teacher}, "parameters": sizes, **more}


def result(perplexity: float, teacher: float = 20.0, **more: Any) -> dict[str, Any]:
    numbers = {"perplexity": {"teacher": teacher, "student": perplexity}, "tokens": 7, "window": 24, "stride": 12}
    return {**numbers, **more}


def test_each_student_is_held_against_the_control_of_its_seed(students: ModuleType) -> None:
    found = students.collected([control(30.0), control(40.0)], {"a": [result(25.0), result(30.0)]})
    row = found["variants"]["a"]
    assert row["perplexity"]["values"] == [25.0, 30.0] and row["perplexity"]["mean"] == 27.5
    assert row["perplexity"]["minus_control"]["values"] == [-5.0, -10.0]
    assert row["gap_closed"]["values"] == [0.5, 0.5] and row["gap_closed"]["std"] == 0.0
    assert found["teacher"] == {"perplexity": 20.0} and found["control"]["perplexity"]["values"] == [30.0, 40.0]
    assert found["parameters"] == {"teacher": 9, "student": 5}
    assert found["measured"] == {"tokens": 7, "window": 24, "stride": 12}
    none = students.collected([control(19.0), control(40.0)], {"a": [result(25.0), result(30.0)]})
    assert none["variants"]["a"]["gap_closed"] == {"mean": None, "std": None, "values": [None, 0.5]}
    json.dumps(none, allow_nan=False)


def test_own_text_is_collected_where_it_was_measured(students: ModuleType) -> None:
    controls = [control(30.0, own_text_reverse_kl={"control": kl}) for kl in (0.4, 0.6)]
    runs = [result(25.0, own_text_reverse_kl={"student": kl}) for kl in (0.3, 0.4)]
    found = students.collected(controls, {"a": runs})
    own = found["variants"]["a"]["own_text_reverse_kl"]
    assert found["control"]["own_text_reverse_kl"]["mean"] == 0.5
    assert own["values"] == [0.3, 0.4] and own["minus_control"]["values"] == pytest.approx([-0.1, -0.2])


def test_runs_of_several_teachers_are_not_one_result(students: ModuleType) -> None:
    for controls, runs in (
        ([control(30.0), control(30.0, 21.0)], [result(25.0), result(25.0)]),
        ([control(30.0), control(30.0)], [result(25.0), result(25.0, 21.0)]),
    ):
        with pytest.raises(InputError, match="one teacher"):
            students.collected(controls, {"a": runs})


# -- commands --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "settings"), [("lm_kd", ""), ("gkd", "--method.lmbda 1"), ("lm_kd", TINY)])
def test_a_students_command_is_one_that_the_recipe_takes(
    students: ModuleType, tmp_path: Path, recipe: str, settings: str
) -> None:
    options = students.Benchmark(recipe=recipe, settings=settings, runs=str(tmp_path))
    words = students.command(options, tmp_path / "a", 7, ["--method.divergence.kind=reverse_kl"])
    assert words[:2] == [sys.executable, str(ROOT / "recipes" / f"{recipe}.py")]
    found = parse(load_recipe(recipe).Recipe, words[2:]).recipe
    demo = parse(load_recipe(recipe).Recipe, ["--config", str(ROOT / "recipes" / "configs" / f"{recipe}_demo.yaml")])
    assert found.train.seed == 7 and found.train.resume_from_checkpoint == "latest" and not found.control
    assert found.output_dir == str(tmp_path / "a") and found.teacher.path == str(tmp_path / "teacher" / "model")
    assert found.method.divergence.kind == "reverse_kl" and found.teacher.fit_steps == 0
    if settings != TINY:
        assert found.train.learning_rate == demo.recipe.train.learning_rate, "the demo's options hold"
        assert found.train.max_train_steps == demo.recipe.train.max_train_steps
    assert vars(found.method).get("lmbda", 1) == 1
    elsewhere = students.Benchmark(recipe=recipe, teacher="some/where")
    assert "--teacher.path=some/where" in students.command(elsewhere, tmp_path, 0, [])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seeds": ""}, "--seeds"), ({"seeds": "1,1"}, "--seeds"), ({"recipe": "nothing"}, "--recipe"),
        ({"variants": ";"}, "--variants"), ({"variants": "control:"}, "--variants"), ({"variants": "a:;a:"}, "--variants"),
        ({"variants": "../a:"}, "--variants"), ({"variants": "teacher:"}, "--variants"),
        ({"variants": "a:--train.learning_rate=1"}, "train.learning_rate in 'a'"),
        ({"variants": "a:;b:--student.width=32"}, "student.width in 'b'"),
        ({"variants": "a:--method.divergence.kind=kl"}, "kind"), ({"settings": "--nothing 1"}, "nothing"),
    ],
)  # fmt: skip
def test_bad_input_names_the_fix_and_trains_nothing(
    students: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], named: str
) -> None:
    monkeypatch.setattr(students, "train_teacher", lambda *_: pytest.fail("this trains"))
    given = {"runs": str(tmp_path / "runs"), **options}
    with pytest.raises(InputError, match=named):
        students.main(parse(students.Benchmark, [f"--{name}={value}" for name, value in given.items()]))
    assert not (tmp_path / "runs").exists()


# -- whole runs ------------------------------------------------------------------------------------------------------------


def results(place: Path) -> dict[str, Any]:
    return json.loads((place / "out.json").read_text())


@pytest.mark.slow
def test_two_variants_of_two_seeds_and_one_control_each(
    students: ModuleType, text: Path, tmp_path: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    students.main(parse(students.Benchmark, flags(text, tmp_path)))
    assert [Path(next(w for w in words if "output_dir" in w)).parts[-2:] for words in here] == [
        ("forward", "3"), ("reverse", "3"), ("forward", "4"), ("reverse", "4"),
    ]  # fmt: skip
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"teacher", "control", "forward", "reverse"}
    found = results(tmp_path)
    assert found["protocol"]["seeds"] == [3, 4] and found["protocol"]["tokens_seen"] == 3 * 4 * 24
    assert found["protocol"]["variants"]["reverse"] == ["--method.divergence.kind=reverse_kl"]
    assert found["parameters"]["teacher"] > found["parameters"]["student"] > 0 and found["environment"]["torch"]
    values = [found["variants"][name]["perplexity"]["values"] for name in ("forward", "reverse")]
    assert len({*values[0], *values[1]}) == 4 and "written to" in capsys.readouterr().out
    steps = [json.loads(line) for line in (tmp_path / "runs" / "teacher" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 6

    # a recipe's own control, of a run that trains one, is this control to the bit; its student comes later in the data
    words = students.command(students.Benchmark(**options_of(text, tmp_path)), tmp_path / "whole", 3, [])
    run_in_process(load_recipe("lm_kd"), [*words[2:], "--control=true"])
    whole = json.loads((tmp_path / "whole" / "stepdistill.json").read_text())["results"]["perplexity"]
    assert whole["control"] == found["control"]["perplexity"]["values"][0]
    assert whole["teacher"] == found["teacher"]["perplexity"]

    made, before = len(here), (tmp_path / "out.json").read_text()
    students.main(parse(students.Benchmark, flags(text, tmp_path)))
    assert len(here) == made and (tmp_path / "out.json").read_text() == before, "nothing is done again"
    (tmp_path / "runs" / "reverse" / "4" / "stepdistill.json").unlink()
    (tmp_path / "runs" / "control" / "4" / "control.json").unlink()
    students.main(parse(students.Benchmark, flags(text, tmp_path)))
    assert len(here) == made + 1 and (tmp_path / "out.json").read_text() == before, "what is missing goes on"
    with pytest.raises(InputError, match=r"learning_rate: 0.01 -> 0.02.*--runs"):
        students.main(parse(students.Benchmark, flags(text, tmp_path, settings=" --train.learning_rate 2e-2")))
    with pytest.raises(InputError, match=r"divergence.beta: 0.5 -> 0.4.*--runs"):
        students.main(parse(students.Benchmark, flags(text, tmp_path, variants=f"{TWO} --method.divergence.beta=0.4")))
    assert len(here) == made + 1


def options_of(text: Path, place: Path) -> dict[str, Any]:
    """What `flags` gives, for the dataclass."""
    return {"settings": f"{TINY} --data.path {text}", "runs": str(place / "runs")}


def test_the_control_of_gkd_is_the_recipes_own(
    students: ModuleType, text: Path, tmp_path: Path, here: list[list[str]]
) -> None:
    one = {"recipe": "gkd", "seeds": "3", "variants": "gkd:", "settings": f"{GKD} --teacher.fit_steps 5"}
    students.main(parse(students.Benchmark, flags(text, tmp_path, **one)))
    found = results(tmp_path)
    steps = (tmp_path / "runs" / "teacher" / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 5, "its own number, once: students take it as it is"
    assert found["protocol"]["sft_steps"] == 2 and found["protocol"]["tokens_seen"] == 5 * 4 * 24
    assert found["variants"]["gkd"]["perplexity"]["minus_control"]["exceeds_seed_noise"] is None
    options = students.Benchmark(recipe="gkd", settings=f"{TINY} --data.path {text}{GKD}", runs=str(tmp_path / "runs"))
    words = students.command(options, tmp_path / "whole", 3, [])
    run_in_process(load_recipe("gkd"), [*words[2:], "--control=true"])
    whole = json.loads((tmp_path / "whole" / "stepdistill.json").read_text())["results"]
    assert [whole["perplexity"]["control"]] == found["control"]["perplexity"]["values"]
    assert [whole["own_text_reverse_kl"]["control"]] == found["control"]["own_text_reverse_kl"]["values"]
    table = load_script("benchmarks", "table").language_students(tmp_path / "out.json")
    assert "KL on own text" in table and "2 steps of fine-tuning and 3 steps" in table


@pytest.mark.slow
def test_the_command_line_from_nothing_and_again(text: Path, tmp_path: Path) -> None:
    """Recipes in processes of their own, from another folder, with paths relative to it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = flags(text, tmp_path, seeds="3", variants="one:", runs="runs", output="out.json")
    command = [sys.executable, str(ROOT / "benchmarks" / "language_students.py"), *words]
    said = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        said.append(((tmp_path / "out.json").read_text(), "step 3/3" in done.stderr))
    assert said[0][0] == said[1][0] and [trained for _, trained in said] == [True, False]


# -- the table -------------------------------------------------------------------------------------------------------------


def written(students: ModuleType, place: Path, collect: Callable[[], dict[str, Any]], **about: Any) -> str:
    facts = {"recipe": "lm_kd", "seeds": [3, 4], "learning_rate": 1e-3, "sft_steps": 0, "steps": 5, "batch": 2}
    results = {**collect(), "protocol": {**facts, "tokens_seen": 1234, **about}}
    results["environment"] = {"torch": "T", "accelerator": "none"}
    (place / "results.json").write_text(json.dumps(results))
    table: str = load_script("benchmarks", "table").language_students(place / "results.json")
    return table


def test_the_table_says_what_is_clear_and_what_is_not(students: ModuleType, tmp_path: Path) -> None:
    groups = {"forward_kl": [result(25.0), result(35.01)], "none": [result(25.0), result(45.0)]}
    text = written(students, tmp_path, lambda: students.collected([control(30.0), control(40.0)], groups))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:6]]
    assert rows[2][:3] == ["teacher", "9", "20.00"] and rows[3][:3] == ["control", "5", "35.00 ± 7.07"]
    assert rows[4][:4] == ["forward kl", "5", "30.00 ± 7.08", "-5.00"]  # 30.005, -4.995
    assert rows[4][4:6] == ["[-5.06, -4.93]", "yes"] and rows[4][6].startswith("37.5% ± 17.7%")
    assert rows[5][3:6] == ["+0.00", "[-63.53, +63.53]", "no"]
    assert "seeds 3, 4" in text and "1,234 tokens" in text and "7 held-out tokens, window 24, stride 12" in text
    assert "fine-tuning" not in text and "own text" not in text


def test_the_table_of_one_seed(students: ModuleType, tmp_path: Path) -> None:
    text = written(students, tmp_path, lambda: students.collected([control(19.0)], {"a": [result(25.0, stride=None)]}))
    cells = [cell.strip() for cell in text.splitlines()[4].strip("|").split("|")]
    assert cells[2:] == ["25.00", "+6.00", "", "one seed", "none"] and "of the answers" in text


def test_recipes_of_one_control_share_a_table(students: ModuleType, tmp_path: Path) -> None:
    def collect() -> dict[str, Any]:
        return students.collected([control(30.0), control(40.0)], {"student": [result(25.0), result(35.0)]})

    written(students, tmp_path, collect, recipe="gkd")
    file = (tmp_path / "results.json").rename(tmp_path / "gkd.json")
    table = load_script("benchmarks", "student_tables").own_text_students
    assert "| gkd, student |" in table(file) and "minillm" not in table(file)
    other = json.loads(file.read_text())
    (tmp_path / "minillm.json").write_text(json.dumps(other))
    assert "| minillm " in table(file) and "`recipes/gkd.py`, `minillm.py`" in table(file)
    other["control"]["perplexity"]["mean"] += 1.0
    (tmp_path / "minillm.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="one control group"):
        table(file)
