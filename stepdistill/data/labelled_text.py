"""Labelled texts for classifiers: paragraphs of docstrings by the package that they come from, or data sets of `datasets`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..batch import Batch
from ..errors import InputError
from ..randomness import StepRandom, key
from .docstrings import docstrings
from .text import Example
from .tokens import padded

log = logging.getLogger(__name__)

GROUPS = 8  # classes of the demo
SHORTEST = 6  # words of a paragraph; below it there is nothing to tell its package by
FORM = (
    'give --task.path "docstrings", or a data set of `datasets` (a hub id, or a folder or file of parquet, arrow, json, jsonl '
    "or csv) with columns of texts and labels, such as stanfordnlp/sst2 with --task.text_column sentence and --task.test_split "
    "validation"
)

Rows = list[tuple[str, str, str]]  # (what stays on one side of the border, text, class)


@dataclass
class TaskConfig:
    """Texts with classes.

    Attributes:
        path: "docstrings" (a paragraph of a docstring of the standard library; its package is its class) or a data set of the
            `datasets` library (hub id, folder or file of parquet, arrow, json or csv).
        split: of a data set, to train on.
        config_name: which configuration of a data set, where it has several: sst2 of nyu-mll/glue.
        test_split: to measure on; without such a split `held_out` of the training texts is.
        text_column: of a data set, one text a row.
        label_column: of a data set; class names or numbers.
        held_out: share of the texts to measure on, where there is no split for it.
        length: the most tokens of a text, its special ones included.
    """

    path: str = "docstrings"
    split: str = "train"
    config_name: str | None = None
    test_split: str = "test"
    text_column: str = "text"
    label_column: str = "label"
    held_out: float = 0.2
    length: int = 64

    def __post_init__(self) -> None:
        for name in ("path", "split", "config_name", "test_split", "text_column", "label_column"):
            if vars(self)[name] == "":
                raise InputError(f"expected a name, got an empty {name}; fix --task.{name}")
        if not 0.0 < self.held_out < 1.0:
            raise InputError(f"expected a share in (0, 1), got held_out {self.held_out}; fix --task.held_out")
        if self.length < 4:
            raise InputError(f"expected 4 tokens or more, got {self.length}; fix --task.length")


@dataclass(frozen=True)
class Labelled:
    """Texts and their classes by name: (text, class) of each, and all classes in the order of their numbers."""

    pairs: list[tuple[str, str]]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task's two parts; no text is in both, whatever its capitals, blanks and marks.

    Attributes:
        dropped: how many texts were left out of training because they are measured on, or twice there, or of two classes.
    """

    train: Labelled
    test: Labelled
    dropped: int = 0

    def apart_from(self, examples: Sequence[Example]) -> list[Example]:
        """Those of general text that have no text in them that is measured on, neither whole nor as a paragraph."""
        measured = {_letters(text) for text, _ in self.test.pairs}
        return [e for e in examples if not any(_letters(part) in measured for part in (e.text, *e.text.split("\n\n")))]


def open_task(config: TaskConfig) -> Task:
    """The task that `config` names. Raises InputError."""
    train, test = _docstrings(config) if config.path == "docstrings" else _table(config)
    measured = {_letters(text) for _, text, _ in test}
    kept, test = [row for row in _once(train) if _letters(row[1]) not in measured], _once(test)
    classes = sorted(
        {name for _, _, name in kept}, key=lambda name: (len(name), name) if name.isdecimal() else (99, name)
    )
    for part, use in ((kept, "train on"), (test, "measure on")):
        if not part:
            raise InputError(f"expected texts to {use} in {config.path!r}, got none; {FORM}")
    if len(classes) < 2:
        raise InputError(f"expected two classes or more in {config.path!r}, got {classes}; {FORM}")
    if odd := sorted({name for _, _, name in test} - set(classes)):
        raise InputError(
            f"expected to measure on the classes trained on, got {odd[:3]} besides {classes[:3]}; fix --task.test_split"
        )
    found = [Labelled([(text, name) for _, text, name in part], tuple(classes)) for part in (kept, test)]
    return Task(found[0], found[1], dropped=len(train) - len(kept))


def _letters(text: str) -> str:
    """What makes two texts one."""
    return "".join(c for c in text.casefold() if c.isalnum()) or text


def _once(rows: Rows) -> Rows:
    """Each text once, and none that is of two classes."""
    names: dict[str, set[str]] = {}
    for _, text, name in rows:
        names.setdefault(_letters(text), set()).add(name)
    first = {_letters(row[1]): row for row in reversed(rows)}
    return [row for row in rows if row is first[_letters(row[1])] and len(names[_letters(row[1])]) == 1]


def _docstrings(config: TaskConfig) -> tuple[Rows, Rows]:
    """Paragraphs of the packages that have most of them; private ones are twins of others. As many of each package."""
    found = [
        (text, part.strip(), module.split(".")[0])
        for module, text in docstrings()
        for part in text.split("\n\n")
        if not module.startswith("_") and len(part.split()) >= SHORTEST
    ]
    found = _once(found)
    counts = Counter(group for _, _, group in found)
    groups = sorted(counts, key=lambda name: (-counts[name], name))[:GROUPS]
    train, test = _parted([row for row in found if row[2] in groups], config.held_out)
    return _balanced(train), _balanced(test)


def _parted(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """(train, test): a row's side is a function of what it is part of."""
    train: Rows = []
    test: Rows = []
    for row in rows:
        (test if key("held out", row[0])[0] / 2**64 < share else train).append(row)
    return train, test


def _balanced(rows: Rows) -> Rows:
    """As many of each class as the smallest has, chosen by their words; in an order that mixes the classes."""
    least = min(Counter(name for _, _, name in rows).values(), default=0)
    taken: Counter[str] = Counter()
    kept = []
    for row in sorted(rows, key=lambda row: key("order", row[1])):
        taken[row[2]] += 1
        if taken[row[2]] <= least:
            kept.append(row)
    return kept


def _table(config: TaskConfig) -> tuple[Rows, Rows]:
    """The two splits of a data set; where there is but one, a share of it is held out."""
    from ..families.loading import is_local
    from .folder import suffix
    from .hub import TABLES, load_rows

    place = Path(config.path).expanduser()
    if (is_local(config.path) and not place.exists()) or (place.is_file() and suffix(place.name) not in TABLES):
        raise InputError(f"expected labelled texts at {config.path!r}, got nothing of that kind there; {FORM}")
    train = _read(config, load_rows(config.path, config.split, config.config_name, "task"), config.split)
    try:
        rows = load_rows(config.path, config.test_split, config.config_name, "task")
    except InputError:  # no such split: the other one was there
        log.warning(
            "no split %r in %r: %.0f%% of split %r are measured on (--task.test_split, --task.held_out)",
            config.test_split, config.path, 100 * config.held_out, config.split,
        )  # fmt: skip
        return _parted(_once(train), config.held_out)
    return train, _read(config, rows, config.test_split)


def _read(config: TaskConfig, rows: Any, split: str) -> Rows:
    """(letters, text, class) of each row that has both."""
    import datasets

    for name, flag in ((config.text_column, "--task.text_column"), (config.label_column, "--task.label_column")):
        if name not in rows.column_names:
            raise InputError(f"expected a column {name!r} in {config.path!r}, got {rows.column_names}; fix {flag}")
    texts, labels = rows[config.text_column], rows[config.label_column]
    feature = rows.features[config.label_column]
    if isinstance(feature, datasets.ClassLabel):
        if any(
            label is not None and label < 0 for label in labels
        ):  # as splits are published whose labels are kept secret
            raise InputError(
                f"expected a class in every row of split {split!r} of {config.path!r}, got none in some; fix --task.split or "
                "--task.test_split (validation, often)"
            )
        labels = [None if label is None else feature.int2str(label) for label in labels]
    pairs = [(str(text), str(label)) for text, label in zip(texts, labels, strict=True) if text and label is not None]
    return [(_letters(text), text, label) for text, label in pairs]


@dataclass(frozen=True)
class TextRow:
    """A text's tokens and the number of its class."""

    ids: tuple[int, ...]
    label: int


class TextRows:
    """A data set of labelled texts. A batch has `input_ids`, `attention_mask` and `labels`, padded on the right.

    Args:
        rows: one or more.
        pad: id of the padding.
    """

    def __init__(self, rows: Sequence[TextRow], pad: int) -> None:
        if not rows:
            raise InputError("expected a text or more, got none; fix --task.path")
        self.rows, self.pad = list(rows), pad

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        """Rows `indices`."""
        rows = [self.rows[i] for i in indices]
        extra = {
            "input_ids": padded([row.ids for row in rows], self.pad),
            "attention_mask": padded([(True,) * len(row.ids) for row in rows], False),
            "labels": torch.tensor([row.label for row in rows]),
        }
        return Batch(None, {}, {}, rng, extra)


def text_rows(part: Labelled, tokenizer: Any, length: int) -> TextRows:
    """Each text with its special tokens, cut at `length`."""
    texts = [text for text, _ in part.pairs]
    ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    number = {name: i for i, name in enumerate(part.classes)}
    rows = [TextRow(tuple(i), number[name]) for i, (_, name) in zip(ids, part.pairs, strict=True)]
    return TextRows(rows, int(tokenizer.pad_token_id))
