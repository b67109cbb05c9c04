"""The rungs that lie in a run folder are of one teacher and one ladder, or the run does not begin."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from students import opened
from tiny import tiny_pipeline

from stepdistill.bench.options import check_student
from stepdistill.config import CommaList
from stepdistill.errors import InputError
from stepdistill.export.card import base_facts
from stepdistill.export.folder import FACTS, rung_folder, rung_folders, same_base
from stepdistill.export.progressive import check_rungs, progressive_sampling
from stepdistill.export.sampling import Sampling
from stepdistill.families import Model, TeacherConfig
from stepdistill.methods.progressive import ProgressiveConfig


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("v") / "sd", prediction_type="v_prediction")


def plans(model: Model, *rungs: int, **options: Any) -> dict[int, Sampling]:
    config = ProgressiveConfig(rungs=CommaList.parse(rungs), **options)
    return {steps: progressive_sampling(config, model, steps) for steps in config.ladder()}


def written(
    folder: Path, model: Model, path: Path, *rungs: int, of: tuple[int, ...] = (8, 4, 2), **options: Any
) -> Path:
    """A run folder with the facts of these rungs, of the ladder `of`."""
    for steps in rungs:
        trained = plans(model, *of, **options)[of[0]].trained
        facts = {"takes": "prompt", "weights": {}, "base_model": base_facts(model, TeacherConfig(str(path)))}
        rung = rung_folder(folder, steps)
        rung.mkdir(parents=True)
        (rung / FACTS).write_text(json.dumps({**facts, "trained": trained}))
    return folder


def change(rung: Path, how: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads((rung / FACTS).read_text())
    how(facts)
    (rung / FACTS).write_text(json.dumps(facts))


def test_the_same_ladder_may_go_on_wherever_it_and_its_teacher_lie(teacher: Path, tmp_path: Path) -> None:
    model = opened(teacher)
    check = check_rungs, model, TeacherConfig(str(teacher)), plans(model, 8, 4, 2)
    check_rungs(tmp_path / "new", *check[1:])
    run = written(tmp_path / "run", model, teacher, 8, 4)
    check_rungs(run, *check[1:])
    check_rungs(run.rename(tmp_path / "moved"), *check[1:])
    shutil.copytree(teacher, tmp_path / "another name")
    check_rungs(tmp_path / "moved", opened(tmp_path / "another name"), TeacherConfig("another name"), check[3])
    # an option that an older version did not know
    change(tmp_path / "moved" / "rungs" / "8", lambda facts: facts["trained"].pop("weighting"))
    check_rungs(tmp_path / "moved", *check[1:])


def test_rungs_of_another_teacher(teacher: Path, tmp_path: Path) -> None:
    model, own = opened(teacher), TeacherConfig(str(teacher))
    namesake = tiny_pipeline(tmp_path / "sd", prediction_type="v_prediction", seed=1)
    other = tiny_pipeline(tmp_path / "other", prediction_type="v_prediction", seed=2)
    for path, said in ((namesake, f"got 4 of sd with other weights, at {namesake}"), (other, "got 4 of other")):
        run = written(tmp_path / f"run-{path.name}", opened(path), path, 4)
        (run / FACTS).write_text("{}")  # the latest rung was exported once more, into the run folder
        with pytest.raises(
            InputError, match=f"expected rungs of sd alone in .*rungs', {said}; choose another --output_dir"
        ):
            check_rungs(run, model, own, plans(model, 8, 4, 2))
    change(tmp_path / "run-sd" / "rungs" / "4", lambda facts: facts.clear())
    with pytest.raises(InputError, match="got 4 of an unknown teacher"):
        check_rungs(tmp_path / "run-sd", model, own, plans(model, 8, 4, 2))


def test_rungs_of_another_ladder(teacher: Path, tmp_path: Path) -> None:
    model, own = opened(teacher), TeacherConfig(str(teacher))
    written(tmp_path, model, teacher, 8, of=(8, 4))
    with pytest.raises(InputError, match=r"sd with rungs \[8, 4, 2\] alone in .*, got 8 of sd with rungs \[8, 4\];"):
        check_rungs(tmp_path, model, own, plans(model, 8, 4, 2))
    with pytest.raises(InputError, match=r"with w_max 0, w_min 0 alone in .*, got 8 of sd with w_max 6.5, w_min 6.5; "):
        check_rungs(tmp_path, model, own, plans(model, 8, 4, w_min=0, w_max=0))
    check_rungs(tmp_path, model, own, plans(model, 8, 4))
    (tmp_path / "rungs" / "8").rename(tmp_path / "rungs" / "16")
    with pytest.raises(InputError, match=r"with \[8, 4\] steps alone in .*, got 16 of sd; .*move .*rungs' away"):
        check_rungs(tmp_path, model, own, plans(model, 8, 4))


def test_where_the_weights_are_not_known_the_place_decides() -> None:
    base = {"name": "sd", "path": "a/sd", "revision": None, "variant": None, "hash": {"float16": "1"}}
    other = {**base, "hash": {"float32": "2"}}
    assert same_base(base, other) and same_base(base, {k: v for k, v in base.items() if k != "hash"})
    for changes in ({"name": "x"}, {"path": "b/sd"}, {"revision": "r"}, {"variant": "fp16"}):
        assert not same_base(base, {**other, **changes})
        assert same_base(base, {**base, **changes})
    assert not same_base(base, {**base, "hash": {"float16": "2"}})


def test_the_harness_takes_no_rungs_of_two_teachers_for_a_ladder(teacher: Path, tmp_path: Path) -> None:
    run = written(tmp_path / "run", opened(teacher), teacher, 8, 4)
    check_student(str(run), ())
    change(run / "rungs" / "4", lambda facts: facts["base_model"].update(path="moved/sd"))
    check_student(str(run), ())
    change(run / "rungs" / "4", lambda facts: facts["base_model"].update(hash={"float32": "another"}))
    said = f"one teacher in --student {run}, got 8 of {teacher} and 4 of moved/sd; give one alone, e.g. {run}/rungs/4"
    with pytest.raises(InputError, match=said):
        check_student(str(run), ())
    assert len(rung_folders(run)) == 2
    check_student(str(run / "rungs" / "4"), ())
