"""The benchmark of distillation's steps: both sides call their networks on the same shapes and train as much, or it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kd_step
import kd_step_sides
import pytest
import torch
import yaml
from kd_step_setting import RESNETS
from kd_step_sides import CASES, Case
from torch.testing import assert_close

from stepdistill.config import parse
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--vocabulary", "40", "--batch", "2", "--block", "12", "--prompt", "3", "--new", "4", "--teacher", "2,64"),
    *("--student", "1,32", "--images", "2", "--resolution", "16", "--steps", "5"),
]
GIVEN, REPLAYED, PIXELS = [[2, 12]], [[2, 7]], [[2, 3, 16, 16]]
WRITTEN = [[2, 3], [2, 1], [2, 1], [2, 1], [2, 7]]  # the prompt, all but the last of what follows it, both together
CALLS = {  # of student and teacher
    "lm_kd": (GIVEN, GIVEN), "gkd, data's text": (GIVEN, GIVEN), "gkd, own text": (WRITTEN, REPLAYED),
    "distillm, data's text": (GIVEN, GIVEN), "distillm, own text": (WRITTEN, REPLAYED),
    "distillm, replayed": (REPLAYED, REPLAYED), "minillm": (WRITTEN, WRITTEN), "distilbert": (GIVEN, GIVEN),
    "tinybert, layers": (GIVEN, GIVEN), "tinybert, layers without attention": (GIVEN, GIVEN),
    "tinybert, answers": (GIVEN, GIVEN), "hinton": (PIXELS, PIXELS),
}  # fmt: skip


def options(*more: str) -> Any:
    return parse(kd_step.Benchmark, [*TINY, *more]).recipe


def trained(side: Any) -> list[torch.Tensor]:
    return [p for group in side.optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_sides_do_the_same_work(case: Case) -> None:
    sides = case.sides(options().setting())
    before = [[p.detach().clone() for p in trained(side)] for side in sides]
    assert_close(*before, rtol=0, atol=0, msg="both train the same numbers")
    seconds, seen = kd_step.turns(sides, 4)
    assert [len(values) for values in seconds] == [1, 1] and min(*seconds[0], *seconds[1]) > 0
    for calls in seen:
        assert (calls["student"], calls["teacher"]) == CALLS[case.name]
    for side, was in zip(sides, before, strict=True):
        moved = {i for i, (p, q) in enumerate(zip(trained(side), was, strict=True)) if not torch.equal(p, q)}
        assert moved == set(range(len(was))), "all that trains got a gradient"
        assert not any(p.requires_grad for p in side.models["teacher"].parameters())


def test_what_the_bare_side_reads() -> None:
    """Logits, hidden states, or those in the teacher's width: one gradient for each, of a mean's size."""
    wanted = {
        "lm_kd": [(2, 12, 40)], "minillm": [(2, 7, 40)], "distilbert": [(2, 12, 40), (2, 12, 64)],
        "tinybert, layers": [(2, 12, 64)] * 2, "tinybert, answers": [(2, 8)], "hinton": [(2, 48)],
    }  # fmt: skip
    for case in (c for c in CASES if c.name in wanted):
        gradients = case.bare(options().setting()).gradients
        assert [tuple(g.shape) for g in gradients] == wanted[case.name]
        assert all(0.2 < float(g.norm()) * g.numel() ** 0.5 < 2.0 for g in gradients)


def test_the_images_have_the_layouts_of_the_recipe() -> None:
    demo = yaml.safe_load((ROOT / "recipes" / "configs" / "hinton_demo.yaml").read_text())

    def words(values: tuple[int, ...]) -> str:
        return ",".join(map(str, values))

    assert words(RESNETS["teacher"][0]) == demo["teacher"]["depths"]
    for role, (_, widths) in RESNETS.items():
        assert words(widths) == demo[role]["widths"]


def test_sides_that_call_otherwise_are_not_compared() -> None:
    ours = {"student": [[2, 3], [2, 1], [2, 5]], "teacher": [[2, 5]]}
    found = kd_step.same_work("x", ours, {name: list(shapes) for name, shapes in ours.items()})
    assert found == {"student": {"calls": 3, "items": 18}, "teacher": {"calls": 1, "items": 10}}
    images = {"student": PIXELS, "teacher": PIXELS}
    assert kd_step.same_work("x", images, images)["teacher"] == {"calls": 1, "items": 2}
    for other in ({**ours, "teacher": [[2, 5], [2, 5]]}, {**ours, "student": [[2, 3], [2, 1], [2, 4]]}):
        with pytest.raises(RuntimeError, match="x: expected calls on the same shapes"):
            kd_step.same_work("x", ours, other)


def test_a_case_whose_sides_differ_stops_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "gkd, own text")
    longer = Case("gkd", "own text", case.method, lambda setting: case.bare(options("--new", "5").setting()))
    monkeypatch.setattr(kd_step, "CASES", (longer,))
    monkeypatch.setattr(kd_step.torch, "set_num_threads", lambda _: None)
    with pytest.raises(RuntimeError, match="gkd, own text: expected calls on the same shapes"):
        kd_step.main(parse(kd_step.Benchmark, [*TINY, "--output", str(tmp_path / "found.json")]))


def test_rows_say_what_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By a clock that ticks once for each look: every step then takes one tick."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(kd_step_sides.time, "process_time", lambda: float(next(ticks)))
    monkeypatch.setattr(kd_step.torch, "set_num_threads", lambda _: None)
    output = tmp_path / "found.json"
    kd_step.main(parse(kd_step.Benchmark, [*TINY, "--recipes", "gkd,hinton", "--output", str(output)]))
    assert next(ticks) == 3 * 2 * 2 * 5, "three cases, two looks at the clock in each of two sides' five steps"
    found = json.loads(output.read_text())
    assert [(r["network"], r["recipe"], r["kind"]) for r in found["rows"]] == [
        ("gkd, data's text", "gkd", "data's text"), ("gkd, own text", "gkd", "own text"), ("hinton", "hinton", ""),
    ]  # fmt: skip
    own = found["rows"][1]
    assert (own["what"], own["quantity"]) == ("ours / bare calls", "CPU time")
    assert (own["ratio"], own["values"], own["n"], own["interval"]) == (1.0, [1.0, 1.0], 2, None)
    assert own["found"] == {"student": {"calls": 5, "items": 26}, "teacher": {"calls": 1, "items": 14}}
    about = found["protocol"]
    assert about["threads"] == 1 and about["warmup"] == 3 and about["teacher"] == ["2", "64"]
    assert "output" not in about and found["environment"]["transformers"]
    assert "gkd, own text: 1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "gkd,nothing"], "got nothing; fix --recipes"), (["--recipes", ""], "got none; fix --recipes"),
        (["--teacher", "2"], "fix --teacher"), (["--student", "0,32"], "fix --student"),
        (["--new", "0"], "of at least 1"), (["--vocabulary", "4"], "--vocabulary of 5"), (["--batch", "65"], "up to 64"),
        (["--block", "3"], "--block of more than"), (["--steps", "3"], "fix --steps"),
        (["--resolution", "7"], "--resolution of at least 8"),
    ],
)  # fmt: skip
def test_sizes_that_measure_nothing(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(*arguments)


def test_layers_that_a_method_can_not_align() -> None:
    case = next(c for c in CASES if c.name == "tinybert, layers")
    with pytest.raises(InputError, match="expected a multiple of the student's 2 layers"):
        case.sides(options("--student", "2,32", "--teacher", "3,64").setting())
