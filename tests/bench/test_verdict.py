"""The answer in words: by intervals alone, with N and floor, and nothing ranked that can't be told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from invented import MAIN, invented

from stepdistill.bench.rows import TEACHER, Cell, Quality, Results, Speed, Value
from stepdistill.bench.verdict import answers, enough, faster, floor_sentence, verdicts

N, FLOOR, SPREAD = 2000, 2.0, 0.1  # 5 standard deviations above the floor is 2.5
OWN = 6.0  # the teacher's distance: 4 above the floor


def student(steps: int, fd: float, half: float, model: str = "s", **values: Value) -> Quality:
    """A row whose difference to the teacher has an interval of fd - OWN +- half."""
    against = Value(fd - OWN, (fd - OWN - half, fd - OWN + half))
    return Quality(Cell(model, steps, 1.0), N, float(steps), {"fd": Value(fd), **values}, against)


def results(*rows: Quality, floor: bool = True, teacher_fd: float = OWN, speed: Any = (), **values: Value) -> Results:
    half = 1.96 * SPREAD
    real = {str(N): {"fd": {"value": FLOOR, "interval": [FLOOR - half, FLOOR + half]}}} if floor else {}
    main = Quality(MAIN, N, 100.0, {"fd": Value(teacher_fd), **values})
    return Results([main, *rows], {"real": real}, teacher=MAIN, speed=list(speed))


@pytest.mark.parametrize(
    ("fd", "half", "kind"),
    [(6.4, 0.5, "indistinguishable"), (6.5, 0.5, "indistinguishable"), (6.4, 0.3, "worse"), (5.6, 0.3, "better")],
)
def test_what_an_interval_says(fd: float, half: float, kind: str) -> None:
    (found,) = verdicts(results(student(4, fd, half)))
    assert found.kind == kind and found.n == N
    assert found.ratio == pytest.approx((fd - FLOOR) / 4)
    assert found.difference == pytest.approx(fd - OWN)


def test_sentences_give_the_share_of_the_teachers_own_distance() -> None:
    table = results(student(8, 6.12, 0.2), student(4, 6.8, 0.2), student(2, 30.0, 2.0), student(1, 5.6, 0.2))
    assert [v.sentence(MAIN) for v in verdicts(table)] == [
        "8 steps at guidance 1: indistinguishable from the teacher at 50 steps at N = 2,000: "
        "distance +3.0 % (95 % interval -2.0 % to +8.0 %)",
        "4 steps at guidance 1: distinguishable from the teacher at 50 steps at N = 2,000 and worse: "
        "distance +20 % (95 % interval +15 % to +25 %)",
        "2 steps at guidance 1: distinguishable from the teacher at 50 steps at N = 2,000 and worse: "
        "7 times the teacher's distance (95 % interval 6.5 to 7.5)",
        "1 step at guidance 1: distinguishable from the teacher at 50 steps at N = 2,000 and better: "
        "distance -10 % (95 % interval -15 % to -5.0 %)",
    ]


@pytest.mark.parametrize(
    "table",
    [
        results(student(4, 6.1, 0.2), floor=False),
        results(student(4, 6.1, 0.2), teacher_fd=2.4),
        results(student(4, 2.4, 0.2)),
    ],
)
def test_no_percentage_where_one_of_them_is_near_the_floor(table: Results) -> None:
    (found,) = verdicts(table)
    assert found.ratio is None and "times" not in found.span()
    assert found.span().startswith("distance ") and found.span().count("%") == 1  # that of the interval


def test_few_images_make_nobody_good() -> None:
    """An interval that would hide a doubled distance says nothing, and its student is not called good enough."""
    unresolved, resolved = (
        student(2, 6.5, 3.6),
        student(4, 6.4, 3.5),
    )  # up to +4.1 and +3.9, against 4.0 above the floor
    table = results(resolved, unresolved)
    assert [v.resolved for v in verdicts(table)] == [True, False]
    assert "N = 2,000 is too few images to tell it from" in verdicts(table)[1].sentence(MAIN)
    best = enough(table)
    assert best is not None and best.cell.steps == 4
    (answer,) = answers(results(unresolved))
    assert answer.enough is None and answer.short == "too few images to say"


def test_a_teacher_at_the_floor_is_met_within_what_clears_the_floor() -> None:
    near = replace(student(4, 2.3, 0.1), against=Value(0.1, (-0.2, 0.49)))
    far = replace(near, against=Value(0.1, (-0.2, 0.51)))
    assert [verdicts(results(row, teacher_fd=2.2))[0].resolved for row in (near, far)] == [True, False]


def test_without_a_floor_an_interval_must_end_below_the_teachers_distance() -> None:
    rows = [student(4, 6.0, half) for half in (5.9, 6.1)]
    assert [verdicts(results(row, floor=False))[0].resolved for row in rows] == [True, False]


def test_enough_is_the_fewest_steps_and_ranks_nobody() -> None:
    same = [student(4, 6.2, 0.4, "first"), student(4, 5.9, 0.4, "second"), student(8, 5.0, 0.4, "second")]
    best = enough(results(*same, student(2, 7.0, 0.4)))
    assert best is not None and best.cell == Cell("first", 4, 1.0)  # though the second's number is lower
    assert enough(results(student(2, 7.0, 0.4))) is None
    better = enough(results(student(2, 5.0, 0.4), same[0]))
    assert better is not None and better.kind == "better" and better.cell.steps == 2
    assert enough(results(*same), model="second").cell.model == "second"  # type: ignore[union-attr]


def timed(cell: Cell, *seconds: float, batch: int = 1) -> Speed:
    return Speed(cell, batch, seconds, {}, 1.0)


def test_faster_is_a_ratio_of_medians_at_one_batch_size() -> None:
    quick, slow = Cell("s", 4, 1.0), Cell("s", 8, 1.0)
    speed = [
        timed(MAIN, 1.0, 9.0, 2.0),
        timed(quick, 0.2),
        timed(slow, 4.0),
        timed(MAIN, 8.0, batch=4),
        timed(quick, 1.0, batch=4),
    ]
    table = results(student(4, 6.0, 0.2), student(8, 6.0, 0.2), student(2, 6.0, 0.2), speed=speed)
    assert faster(table, quick) == pytest.approx(10.0) and faster(table, quick, 4) == pytest.approx(8.0)
    assert faster(table, Cell("s", 2, 1.0)) is None and faster(table, slow, 4) is None
    ends = [v.sentence(MAIN).rpartition(")")[2] for v in verdicts(table)]
    assert ends == [", 10.0x faster", ", 2.0x slower", ""]


def test_what_the_distance_misses_is_said() -> None:
    """A collapse that keeps the distance: other quantities, whose intervals are apart, speak up."""
    teacher = {"recall": Value(0.9, (0.88, 0.92)), "kid": Value(0.1), "diversity": Value(4.0, (3.9, 4.1))}
    ours = {
        "recall": Value(0.4, (0.38, 0.42)),
        "kid": Value(9.0),  # no interval: nothing is said of it
        "diversity": Value(4.3, (4.2, 4.4)),  # too much is as wrong as too little
        "rms_to_teacher": Value(0.3, (0.29, 0.31)),
    }
    table = results(student(4, 6.0, 0.2, **ours), **teacher, rms_to_teacher=Value(0.0, (0.0, 0.0)))
    (answer,) = answers(table)
    assert answer.enough is None and answer.short == "not at 4 steps"
    (found,) = answer.verdicts
    assert found.kind == "indistinguishable" and found.falls_short and not found.as_good
    assert found.losses == ("recall 0.40, not 0.90", "diversity 4.3, not 4")
    assert found.sentence(MAIN).endswith("; but recall 0.40, not 0.90, diversity 4.3, not 4")
    whole = {"recall": Value(0.9, (0.88, 0.92)), "diversity": Value(4.0, (3.9, 4.1))}
    (answer,) = answers(results(student(4, 6.0, 0.2, **ours), student(8, 6.0, 0.2, **whole), **teacher))
    assert answer.short == "8 steps" and answer.text.endswith("; 4 steps distinguishable")
    overlapping = {"recall": Value(0.87, (0.85, 0.89)), "diversity": Value(4.0, (3.9, 4.1))}
    assert verdicts(results(student(4, 6.0, 0.2, **overlapping), **teacher))[0].losses == ()
    higher = {"recall": Value(0.99, (0.98, 1.0))}
    assert verdicts(results(student(4, 6.0, 0.2, **higher), **teacher))[0].losses == ()


def test_answers_of_a_whole_sweep() -> None:
    found = answers(invented())
    assert [(a.name, a.short) for a in found] == [
        ("lcm", "4 steps"),
        ("progressive", "not at 1, 2, 4 or 8 steps"),
        ("teacher, undistilled", "not at 1, 2, 4 or 8 steps"),
    ]
    assert found[0].headline == (
        "lcm: 4 steps at guidance 1: indistinguishable from the teacher at 50 steps at N = 1,200: "
        "distance +3.3 % (95 % interval -8.8 % to +15 %), 15.0x faster; 1 and 2 steps distinguishable"
    )
    assert found[1].headline == (
        "progressive: distinguishable from the teacher at 50 steps at N = 1,200, and worse: 1, 2, 4 and 8 steps; "
        "the nearest is 8 steps at guidance 1: distance +20 % (95 % interval +7.2 % to +33 %), 9.5x faster"
    )
    assert [v.cell.steps for v in found[0].verdicts] == [8, 4, 2, 1]
    assert all(v.cell.steps < 50 for v in found[2].verdicts)  # at its own steps the teacher is no shortcut


def test_a_teacher_that_needs_no_student_is_found() -> None:
    early = student(8, 6.1, 0.2, TEACHER)
    found = answers(results(student(4, 9.0, 0.2), early))
    assert [a.short for a in found] == ["not at 4 steps", "8 steps"]
    assert "1 step," not in found[0].text


def test_more_steps_that_are_worse_are_not_hidden() -> None:
    other = student(4, 9.0, 0.2)
    rows = [student(2, 9.0, 0.2), student(4, 6.0, 0.2), replace(other, cell=Cell("s", 4, 7.0)), student(8, 9.0, 0.2)]
    (answer,) = answers(results(*rows))
    assert answer.text.endswith("; 2 and 8 steps distinguishable")  # 4 are, at the guidance that is named


def test_one_step() -> None:
    (answer,) = answers(results(student(1, 9.0, 0.2)))
    assert answer.short == "not at 1 step"
    (answer,) = answers(results(student(1, 6.0, 0.2)))
    assert answer.short == "1 step" and "distinguishable;" not in answer.text


def test_the_largest_number_of_images_is_judged() -> None:
    few = replace(student(4, 6.0, 0.1), n=10)
    table = results(few, student(4, 9.0, 0.5))
    assert [v.kind for v in verdicts(table)] == ["worse"]
    assert [v.kind for v in verdicts(table, 10)] == ["indistinguishable"]


def test_nothing_is_said_without_a_teacher_or_a_difference() -> None:
    alone = replace(results(student(4, 6.0, 0.2)), teacher=None)
    assert verdicts(alone) == [] and answers(alone) == [] and enough(alone) is None and faster(alone, MAIN) is None
    assert verdicts(Results([], {}, teacher=MAIN)) == []
    without = replace(student(4, 6.0, 0.2), against=None)
    assert answers(results(without)) == []
    with pytest.raises(ValueError, match="with its interval"):
        verdicts(results(replace(without, against=Value(0.0))))


def test_the_floor_in_words() -> None:
    table = results()
    assert floor_sentence(table, N) == "The floor: 2,000 real images score 2, with a standard deviation of 0.1."
    assert floor_sentence(table, 10).startswith("No floor was measured at N = 10")
