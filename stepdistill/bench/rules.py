"""Rules that results must not break against earlier ones, for a job that watches over a project."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from .compare import SECONDS, Comparison, Pair, change, compare, of
from .rows import Results

_RULE = re.compile(
    r"(?P<key>[^<>]+?)\s*(?P<side>[<>])\s*(?P<amount>[+-](\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)\s*(?P<share>%?)"
)


@dataclass(frozen=True)
class Rule:
    """What fails: a change of a quantity, from the first file to the second, past an amount.

    Attributes:
        key: of the quantity, or "seconds".
        side: fails above (">") or below ("<") the amount.
        amount: signed, in the quantity's unit, or a share of the first value's magnitude.
        relative: whether it is a share.
    """

    key: str
    side: Literal["<", ">"]
    amount: float
    relative: bool

    def __str__(self) -> str:
        return f"{self.key}{self.side}{self.amount * (100 if self.relative else 1):+g}{'%' * self.relative}"

    def past(self, a: float, b: float) -> bool:
        """Whether the change from a to b is what this rule forbids."""
        bound = self.amount * (abs(a) if self.relative else 1)
        return b - a > bound if self.side == ">" else b - a < bound

    @property
    def demands(self) -> bool:
        """Whether no change at all breaks it: it asks for an improvement, which an overlap can't stand for."""
        return self.amount < 0 if self.side == ">" else self.amount > 0


def parse_rules(text: str) -> list[Rule]:
    """Rules separated by commas: a quantity's key (or "seconds"), > or <, a signed amount, % for a share of the first value.

    "fd>+5%": fails where the distance rises by more than 5 %. "recall<-0.05": fails where recall falls by more than 0.05.

    Raises InputError naming the flag for anything else, and for unknown quantities.
    """
    return [parse_rule(part) for part in text.split(",")]


def parse_rule(text: str) -> Rule:
    """One rule; grammar and errors as `parse_rules`."""
    found = _RULE.fullmatch(text.strip())
    if found is None:
        raise InputError(
            f"--fail_if: expected a quantity, > or < and a signed amount, e.g. fd>+5% or recall<-0.05, got {text.strip()!r}; "
            "fix it, or separate rules by commas"
        )
    key, side = found["key"], found["side"]
    try:
        of(key)
    except KeyError as error:
        raise InputError(
            f"--fail_if: expected a quantity of the results, e.g. fd, recall or seconds, got {key!r}"
        ) from error
    amount = float(found["amount"]) / (100 if found["share"] else 1)
    return Rule(key, "<" if side == "<" else ">", amount, bool(found["share"]))


def failed(rules: Sequence[Rule], a: Results, b: Results, allow_changed: bool = False) -> list[str]:
    """A sentence for each way in which a rule is broken; none if all hold.

    A value past its rule breaks it only if the two intervals are apart too: an overlap may be chance. Values without intervals
    count as they are, and so do rules that no change at all would break. What can't be judged is broken: a changed protocol
    (for seconds another machine too) unless `allow_changed`, a cell that the second file lacks, a quantity that either lacks.
    """
    pairs, said = compare(a, b), []
    if rules and pairs.changed and not allow_changed:
        said.append(f"the protocols differ, so no rule can be judged: {'; '.join(pairs.changed)}")
    if pairs.machine and not allow_changed and any(rule.key == SECONDS.key for rule in rules):
        said.append(f"the machines differ, so seconds can't be judged: {'; '.join(pairs.machine)}")
    for rule in rules:
        said += _missing(rule, a, pairs)
        said += [_broken(rule, pair) for pair in _judged(rule, pairs) if _breaks(rule, pair)]
    return said


def undecided(rules: Sequence[Rule], a: Results, b: Results) -> list[str]:
    """A sentence for each value that is past its rule without breaking it, because the intervals overlap."""
    pairs = compare(a, b)
    return [
        f"{_broken(rule, pair)}, but the intervals overlap: not a failure; more images or calls would tell"
        for rule in rules
        for pair in _judged(rule, pairs)
        if not _breaks(rule, pair) and rule.past(*_both(pair))
    ]


def _judged(rule: Rule, pairs: Comparison) -> list[Pair]:
    return [pair for pair in pairs.pairs if pair.key == rule.key and pair.a is not None and pair.b is not None]


def _both(pair: Pair) -> tuple[float, float]:
    if pair.a is None or pair.b is None:
        raise ValueError(f"expected both values of {pair.where}, got one")
    return pair.a.value, pair.b.value


def _breaks(rule: Rule, pair: Pair) -> bool:
    return rule.past(*_both(pair)) and (rule.demands or not pair.overlap)


def _broken(rule: Rule, pair: Pair) -> str:
    what, (a, b) = of(rule.key), _both(pair)
    return f"{rule}: {what.label} of {pair.where} went from {a:{what.form}} to {b:{what.form}} {change(pair)}".rstrip()


def _missing(rule: Rule, a: Results, pairs: Comparison) -> list[str]:
    """What the rule should hold for and can't be looked at."""
    timed = rule.key == SECONDS.key
    places = [(s.cell, s.batch_size) for s in a.speed] if timed else [(row.cell, row.n) for row in a.quality]
    there = {(pair.cell, pair.size): pair for pair in pairs.pairs if (pair.key == SECONDS.key) == timed}
    keyed = {(pair.cell, pair.size) for pair in _judged(rule, pairs)}
    if not places:
        return [f"{rule}: the first file has no {'timings' if timed else 'rows'}"]
    said = []
    for cell, size in places:
        where = f"{cell}, {'batch' if timed else 'N ='} {size:,}"
        if (cell, size) not in there:
            said.append(f"{rule}: the second file has no {where}")
        elif (cell, size) not in keyed:
            said.append(f"{rule}: {of(rule.key).label} of {where} is missing from one of the files")
    return said
