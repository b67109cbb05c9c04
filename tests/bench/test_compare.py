"""Two files side by side: what can be told apart, what can't, and rules that fail only for a reason they can name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from invented import invented

from stepdistill.bench.compare import Pair, compare, differences, median
from stepdistill.bench.rows import TEACHER, Cell, Quality, Results, Speed, Value
from stepdistill.bench.rules import Rule, failed, parse_rule, parse_rules, undecided
from stepdistill.errors import InputError

CELL = Cell("s", 4, 1.0)
HERE = {"machine": "x86_64", "cpus": 2, "threads": 1, "accelerator": "none", "torch": "2.6"}


def row(fd: float = 10.0, half: float | None = 1.0, cell: Cell = CELL, n: int = 100, **values: Value) -> Quality:
    value = Value(fd, None if half is None else (fd - half, fd + half))
    return Quality(cell, n, 4.0, {"fd": value, **values})


def results(*rows: Quality, seconds: float | None = None, **changes: Any) -> Results:
    protocol = {"features": {"name": "f", "hash": "1"}, "prompts": {"source": "a.txt", "hash": "p"}}
    calls = tuple((seconds or 0) * (1 + 0.001 * i) for i in range(-4, 5))
    speed = [] if seconds is None else [Speed(CELL, 1, calls, {}, 4.0)]
    return Results(list(rows), **{"protocol": protocol, "speed": speed, "environment": HERE, **changes})


@pytest.mark.parametrize(
    ("key", "a", "b", "said"),
    [
        ("fd", Value(10.0, (9.0, 11.0)), Value(12.0, (10.5, 13.0)), "indistinguishable"),
        ("fd", Value(10.0, (9.0, 11.0)), Value(12.0, (11.0, 13.0)), "indistinguishable"),
        ("fd", Value(10.0, (9.0, 11.0)), Value(13.0, (12.0, 14.0)), "worse"),
        ("fd", Value(10.0, (9.0, 11.0)), Value(7.0, (6.0, 8.0)), "better"),
        ("recall", Value(0.5, (0.4, 0.6)), Value(0.8, (0.7, 0.9)), "better"),
        ("recall", Value(0.8, (0.7, 0.9)), Value(0.5, (0.4, 0.6)), "worse"),
        ("diversity", Value(0.5, (0.4, 0.6)), Value(0.8, (0.7, 0.9)), "differs"),
        ("seconds", Value(1.0, (0.9, 1.1)), Value(2.0, (1.9, 2.1)), "worse"),
        ("fd", Value(10.0), Value(12.0, (11.0, 13.0)), "no interval"),
        ("fd", Value(10.0), Value(10.0), "equal"),
        ("fd", None, Value(10.0), "missing"),
        ("fd", Value(10.0), None, "missing"),
    ],
)
def test_nothing_is_ranked_unless_intervals_are_apart(key: str, a: Value | None, b: Value | None, said: str) -> None:
    assert Pair(CELL, CELL, 100, key, a, b).verdict() == said


def test_cells_meet_by_model_steps_guidance_and_number() -> None:
    others = [Cell("s", 8, 1.0), Cell("s", 4, 2.0), Cell(TEACHER, 4, 1.0)]
    a = results(row(1.0), row(2.0, n=50), *(row(3.0 + i, cell=cell) for i, cell in enumerate(others)))
    b = results(*(row(r.values["fd"].value * 2, cell=r.cell, n=r.n) for r in reversed(a.quality)))
    found = compare(a, b)
    assert [(p.cell, p.size, p.a and p.a.value) for p in found.pairs] == [
        (r.cell, r.n, r.values["fd"].value) for r in a.quality
    ]
    assert all(p.a and p.b and p.b.value == 2 * p.a.value for p in found.pairs)
    assert found.warnings == []


def test_quantities_of_either_file_are_shown() -> None:
    found = compare(results(row(kid=Value(0.1))), results(row(recall=Value(0.5))))
    assert [(p.key, p.a is None, p.b is None) for p in found.pairs] == [
        ("fd", False, False), ("kid", False, True), ("recall", True, False),
    ]  # fmt: skip


def test_one_student_each_is_the_same_student_by_another_name() -> None:
    teacher, renamed = Cell(TEACHER, 4, 1.0), Cell("new", 4, 1.0)
    a, b = results(row(), row(cell=teacher)), results(row(9.0, cell=renamed), row(cell=teacher))
    found = compare(a, b)
    assert [(p.cell.model, p.other.model) for p in found.pairs] == [("s", "new"), (TEACHER, TEACHER)]
    assert found.only_a == found.only_b == () and "s / new" in found.text()
    two = results(row(cell=renamed), row(cell=Cell("newer", 4, 1.0)))
    assert compare(results(row(), row(cell=Cell("t", 4, 1.0))), two).pairs == ()  # which would be which?
    found = compare(a, two)
    assert found.pairs == () and len(found.only_a) == 2 and len(found.only_b) == 2
    assert compare(results(row(cell=teacher)), b).only_b == ("new, 4 steps, guidance 1 (N = 100)",)


def test_what_only_one_file_has_is_said() -> None:
    a, b = results(row(), row(n=50), seconds=1.0), results(row(), row(n=60))
    assert compare(a, b).warnings == [
        "Only in the first: s, 4 steps, guidance 1 (N = 50), s, 4 steps, guidance 1 (batch 1)",
        "Only in the second: s, 4 steps, guidance 1 (N = 60)",
    ]


def test_protocols_that_differ_are_named_key_by_key() -> None:
    a = results(
        row(), protocol={"features": {"name": "f", "hash": "1"}, "seeds": {"noise": 0}, "n": 3, "real": {"1": {}}}
    )
    b = results(row(), protocol={"features": {"name": "f", "hash": "2"}, "seeds": {"noise": 0}, "m": 4, "real": {}})
    found = compare(a, b)
    assert found.changed == ("features.hash: 1 -> 2", "n: 3 -> none", "m: none -> 4")
    assert "The protocols differ" in found.warnings[0] and "features.hash: 1 -> 2" in found.text()
    moved = results(
        row(), protocol={"features": {"name": "f", "hash": "1"}, "prompts": {"source": "b.txt", "hash": "p"}}
    )
    assert compare(results(row()), moved).changed == ()  # the same prompts from another place
    assert differences({"a": 1}, {"a": {"b": 1}}) == ["a: 1 -> {'b': 1}"]


def test_machines_that_differ_matter_to_seconds_only() -> None:
    there = {**HERE, "threads": 8, "torch": "2.7"}
    timed = compare(results(row(), seconds=1.0), results(row(), seconds=1.0, environment=there))
    assert timed.machine == ("threads: 1 -> 8",)
    assert compare(results(row()), results(row(), environment=there)).machine == ()


def test_side_by_side_in_words() -> None:
    a = results(row(10.0, recall=Value(0.5)), seconds=2.0)
    text = compare(a, results(row(14.0, recall=Value(0.25)), seconds=1.0)).text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[2][4:] == ["Frechet distance", "10 [9, 11]", "14 [13, 15]", "+40.0%", "worse"]
    assert lines[3][4:] == ["recall", "0.50", "0.25", "-50.0%", "no interval"]
    assert lines[4][3:6] == ["1", "s / image", "2 [1.99, 2.01]"] and lines[4][7:] == ["-50.0%", "better"]
    assert compare(results(), results(row())).text().splitlines()[-1] == "No cell is in both files."


def test_the_median_is_held_by_order_statistics() -> None:
    """With n = 9 the second and the eighth hold it: 2 (1 + 9) / 2^9 = 0.039; with the third, 0.18."""
    found = median(Speed(CELL, 2, tuple(float(x) for x in [9, 1, 8, 2, 7, 3, 6, 4, 5]), {}, 1.0))
    assert found == Value(2.5, (1.0, 4.0))  # an image
    for few in ([3.0], [5.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]):
        assert median(Speed(CELL, 1, tuple(few), {}, 1.0)).interval == (min(few), max(few))
    for n in range(6, 60):
        found = median(Speed(CELL, 1, tuple(float(i) for i in range(n)), {}, 1.0))
        assert found.interval is not None
        low = int(found.interval[0])
        outside = [2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in (low, low + 1)]
        assert outside[0] <= 0.05 < outside[1]  # covers 95 %, and the next narrower one doesn't


def test_the_median_interval_covers() -> None:
    draws = np.random.default_rng(0).exponential(1.0, (2000, 12))
    spans = [median(Speed(CELL, 1, tuple(row), {}, 1.0)).interval for row in draws]
    share = np.mean([span is not None and span[0] <= math.log(2) <= span[1] for span in spans])
    assert 0.945 < share < 0.975  # by the binomial 1 - 2 (1 + 12 + 66) / 2^12 = 0.961


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("fd>+5%", Rule("fd", ">", 0.05, True)),
        (" recall < -0.05 ", Rule("recall", "<", -0.05, False)),
        ("seconds>+10%", Rule("seconds", ">", 0.1, True)),
        ("accuracy/shape<-2.5%", Rule("accuracy/shape", "<", -0.025, True)),
        ("kid>+1e-3", Rule("kid", ">", 0.001, False)),
        ("fd>-.5 %", Rule("fd", ">", -0.005, True)),
    ],
)
def test_rules_are_read(text: str, rule: Rule) -> None:
    found = parse_rule(text)
    assert (found.key, found.side, found.relative) == (rule.key, rule.side, rule.relative)
    assert found.amount == pytest.approx(rule.amount)
    assert parse_rule(str(found)) == found


def test_several_rules() -> None:
    assert [str(rule) for rule in parse_rules("fd>+5%, recall<-0.05,seconds>+10%")] == [
        "fd>+5%",
        "recall<-0.05",
        "seconds>+10%",
    ]


@pytest.mark.parametrize(
    "text", ["", "fd", "fd>5%", "fd>=+5%", "fd>+", "fd+5%", ">+5%", "fd>+5%%", "fd>+nan", "fd>+5 kg", "fd>+5%,"]
)
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(InputError, match="--fail_if: expected a quantity, > or < and a signed amount"):
        parse_rules(text)


def test_unknown_quantities_are_no_rule() -> None:
    with pytest.raises(InputError, match="--fail_if: .*got 'fid'"):
        parse_rule("fid>+5%")


@pytest.mark.parametrize(
    ("rule", "a", "b", "past"),
    [
        ("fd>+5%", 100.0, 105.1, True),
        ("fd>+5%", 100.0, 104.9, False),
        ("fd>+5%", 100.0, 50.0, False),
        ("fd<-5%", 100.0, 94.9, True),
        ("fd<-5%", 100.0, 95.1, False),
        ("fd>+5", 100.0, 105.1, True),
        ("fd>+5", 100.0, 104.9, False),
        ("fd>-10%", 100.0, 91.0, True),
        ("fd>-10%", 100.0, 89.0, False),
        ("kid>+50%", -0.1, -0.04, True),  # a share of the magnitude
        ("kid>+50%", -0.1, -0.06, False),
        ("fd>+5%", 0.0, 0.1, True),
        ("fd>+5%", 0.0, 0.0, False),
    ],
)
def test_what_is_past_a_rule(rule: str, a: float, b: float, past: bool) -> None:
    before, after = results(row(a, half=None, kid=Value(a))), results(row(b, half=None, kid=Value(b)))
    assert bool(failed([parse_rule(rule)], before, after)) == past


def test_an_overlap_may_be_chance_and_is_no_failure() -> None:
    rule, a = [parse_rule("fd>+5%")], results(row(10.0, half=1.0))
    for fd, fails in ((10.2, False), (11.9, False), (12.1, True)):
        b = results(row(fd, half=1.0))
        assert bool(failed(rule, a, b)) == fails
        assert bool(undecided(rule, a, b)) == (fd == 11.9)
    assert failed(rule, a, b) == [
        "fd>+5%: Frechet distance of s, 4 steps, guidance 1, N = 100 went from 10 to 12.1 +21.0%"
    ]
    assert "the intervals overlap: not a failure" in undecided(rule, a, results(row(11.9)))[0]


def test_without_an_interval_the_value_counts() -> None:
    rule = [parse_rule("fd>+5%")]
    assert failed(rule, results(row(10.0, half=None)), results(row(11.0, half=9.0)))
    assert not undecided(rule, results(row(10.0, half=None)), results(row(11.0, half=9.0)))


def test_a_demand_for_more_is_not_met_by_an_overlap() -> None:
    """fd>-10%: at least a tenth less. Two files that say the same don't fulfil it, however wide their intervals."""
    same = results(row(10.0, half=5.0))
    assert failed([parse_rule("fd>-10%")], same, same)
    assert failed([parse_rule("recall<+0.1")], results(row(recall=Value(0.5))), results(row(recall=Value(0.5))))
    assert not failed([parse_rule("fd>-10%")], same, results(row(8.0, half=5.0)))


def test_seconds_have_rules_too() -> None:
    rule, a = parse_rules("seconds>+10%"), results(row(), seconds=1.0)
    assert failed(rule, a, results(row(), seconds=1.09)) == []
    (said,) = failed(rule, a, results(row(), seconds=1.2))
    assert said == "seconds>+10%: s / image of s, 4 steps, guidance 1, batch 1 went from 1 to 1.2 +20.0%"
    scattered = Speed(CELL, 1, (0.5, 1.2, 0.6, 1.3, 1.2, 1.2, 0.7, 1.2, 1.3), {}, 4.0)
    b = results(row(), speed=[scattered])
    assert failed(rule, a, b) == [] and len(undecided(rule, a, b)) == 1
    (said,) = failed(rule, a, results(row(), seconds=1.0, environment={**HERE, "accelerator": "cuda"}))
    assert said.startswith("the machines differ") and "none -> cuda" in said
    assert failed(rule, a, results(row(), seconds=1.0, environment={**HERE, "torch": "3"})) == []
    elsewhere = results(row(), seconds=9.0, environment={**HERE, "threads": 8})
    assert failed(parse_rules("fd>+5%"), a, elsewhere) == []  # quality doesn't depend on the machine


def test_a_changed_protocol_is_a_failure_unless_allowed() -> None:
    a, b = results(row()), results(row(), protocol={"features": {"name": "f", "hash": "2"}})
    (said,) = failed(parse_rules("fd>+5%"), a, b)
    assert said.startswith("the protocols differ") and "features.hash: 1 -> 2" in said
    assert failed(parse_rules("fd>+5%"), a, b, allow_changed=True) == []
    assert failed([], a, b) == []


def test_what_is_missing_can_t_be_judged() -> None:
    def said(a: Results, b: Results, rule: str = "fd>+5%") -> list[str]:
        return failed(parse_rules(rule), a, b)

    a = results(row(), row(n=50), row(cell=Cell("s", 8, 1.0)))
    assert said(a, results(row(), row(n=50))) == ["fd>+5%: the second file has no s, 8 steps, guidance 1, N = 100"]
    assert said(a, results(row(), row(cell=Cell("s", 8, 1.0)), row(n=51))) == [
        "fd>+5%: the second file has no s, 4 steps, guidance 1, N = 50"
    ]
    missing = ["recall<-0.1: recall of s, 4 steps, guidance 1, N = 100 is missing from one of the files"]
    with_recall = results(row(recall=Value(0.5)))
    assert said(with_recall, results(row()), "recall<-0.1") == missing
    assert said(results(row()), with_recall, "recall<-0.1") == missing
    assert said(results(row()), results(row()), "recall<-0.1") == missing
    assert said(results(), results(row())) == ["fd>+5%: the first file has no rows"]
    assert said(results(row()), results(row()), "seconds>+5%") == ["seconds>+5%: the first file has no timings"]
    untimed = said(results(row(), seconds=1.0), results(row()), "seconds>+5%")
    assert untimed == ["seconds>+5%: the second file has no s, 4 steps, guidance 1, batch 1"]
    one = row(n=1)
    assert said(results(one, seconds=1.0), results(one), "seconds>+5%") == untimed  # N = 1 is no batch of 1
    assert said(results(row(), seconds=1.0), results(row())) == []  # a rule about quality asks for no timings


def test_a_whole_sweep_against_itself_and_against_a_worse_one() -> None:
    a = invented()
    rules = parse_rules("fd>+5%,accuracy<-2%,accuracy/shape<-0.01,seconds>+10%")
    assert compare(a, a).warnings == [] and failed(rules, a, a) == [] and undecided(rules, a, a) == []
    worse = replace(a, quality=[replace(r, values={**r.values, "accuracy/shape": Value(0.0)}) for r in a.quality])
    assert len(failed(rules, a, worse)) == len(a.quality)


def test_what_is_equal_and_single_attributes_are_not_listed() -> None:
    ours = row(14.0, recall=Value(0.25), **{"accuracy/shape": Value(0.5)})
    text = compare(results(ours), results(row(15.0, recall=Value(0.25), **{"accuracy/shape": Value(0.75)}))).text()
    assert "recall" not in text and "shape" not in text and "| Frechet distance |" in text
    assert text.splitlines()[-1] == "1 number is equal in both files."
    assert compare(results(ours), results(ours)).text() == "2 numbers are equal in both files.\n"


def test_of_many_cells_some_are_named() -> None:
    many = [replace(row(14.0), n=n) for n in range(2, 9)]
    (line,) = compare(results(*many), results(many[0])).warnings
    assert line.startswith("Only in the first: ") and line.count("(N = ") == 4 and line.endswith(" and 2 more")
