"""Labelled texts for classifiers: paragraphs of docstrings by the package that they come from, or data sets of `datasets`."""

from __future__ import annotations

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

GROUPS = 8  # classes of the demo
SHORTEST = 6  # words of a paragraph; below it there is nothing to tell its package by
FORM = (
    'give --task.path "docstrings", or a data set of `datasets` (a hub id, or a folder or file of parquet, arrow, json, jsonl or '
    "csv) with columns of texts and labels, such as stanfordnlp/sst2 with --task.text_column sentence --task.test_split validation"
)

Pairs = list[tuple[str, str]]  # (text, class)


@dataclass
class TaskConfig:
    """Texts with classes.

    Attributes:
        path: "docstrings" (a paragraph of a docstring of the standard library; its package is its class) or a data set of the
            `datasets` library (hub id, folder or file of parquet, arrow, json or csv).
        split: of a data set, to train on.
        test_split: to measure on; without such a split `held_out` of the training texts is.
        text_column: of a data set, one text a row.
        label_column: of a data set; class names or numbers.
        held_out: share of the texts to measure on, where there is no split for it.
        length: the most tokens of a text, its special ones included.
    """

    path: str = "docstrings"
    split: str = "train"
    test_split: str = "test"
    text_column: str = "text"
    label_column: str = "label"
    held_out: float = 0.2
    length: int = 64

    def __post_init__(self) -> None:
        for name in ("path", "split", "test_split", "text_column", "label_column"):
            if not vars(self)[name]:
                raise InputError(f"expected a name, got an empty {name}; fix --task.{name}")
        if not 0.0 < self.held_out < 1.0:
            raise InputError(f"expected a share in (0, 1), got held_out {self.held_out}; fix --task.held_out")
        if self.length < 4:
            raise InputError(f"expected 4 tokens or more, got {self.length}; fix --task.length")


@dataclass(frozen=True)
class Labelled:
    """Texts and their classes by name."""

    pairs: Pairs
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
    if config.path == "docstrings":
        train, test = _parted([(module, text, group) for module, text, group in _paragraphs()], config.held_out)
        train, test = _balanced(train), _balanced(test)
    else:
        train, test = _table(config)
    measured = {_letters(text) for text, _ in test}
    kept = [(text, name) for text, name in _once(train) if _letters(text) not in measured]
    test_once = _once(test)
    classes = sorted(
        {name for _, name in kept}, key=lambda name: (not name.isdecimal(), len(name) if name.isdecimal() else 0, name)
    )
    for part, flag in ((kept, "training"), (test_once, "measuring")):
        if not part:
            raise InputError(f"expected texts for {flag} in {config.path!r}, got none; {FORM}")
    if len(classes) < 2 or (odd := {name for _, name in test_once} - set(classes)):
        found = (
            f"{len(classes)} ({', '.join(classes[:3])})"
            if len(classes) < 2
            else f"{sorted(odd)[:3]} that training has not"
        )
        raise InputError(f"expected two classes or more, the same to train on and to measure on, got {found}; {FORM}")
    return Task(Labelled(kept, tuple(classes)), Labelled(test_once, tuple(classes)), len(train) - len(kept))


def _letters(text: str) -> str:
    """What makes two texts one."""
    return "".join(c for c in text.casefold() if c.isalnum()) or text


def _once(pairs: Pairs) -> Pairs:
    """Each text once, and none that is of two classes."""
    names: dict[str, set[str]] = {}
    for text, name in pairs:
        names.setdefault(_letters(text), set()).add(name)
    seen: set[str] = set()
    kept = []
    for text, name in pairs:
        letters = _letters(text)
        if letters not in seen and len(names[letters]) == 1:
            kept.append((text, name))
        seen.add(letters)
    return kept


def _paragraphs() -> list[tuple[str, str, str]]:
    """(docstring, paragraph, package) of the packages with the most paragraphs; private ones are twins of others."""
    found = [
        (text, part.strip(), module.split(".")[0])
        for module, text in docstrings()
        for part in text.split("\n\n")
        if not module.startswith("_") and len(part.split()) >= SHORTEST
    ]
    counts = Counter(group for _, _, group in found)
    groups = {name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:GROUPS]}
    return [row for row in found if row[2] in groups]


def _parted(rows: Sequence[tuple[str, str, str]], share: float) -> tuple[Pairs, Pairs]:
    """(train, test) of (what stays on one side, text, class): a side is a function of the words alone."""
    train: Pairs = []
    test: Pairs = []
    for whole, text, name in rows:
        (test if key("held out", whole)[0] / 2**64 < share else train).append((text, name))
    return train, test


def _balanced(pairs: Pairs) -> Pairs:
    """As many of each class as the smallest has, chosen by their words; in an order that mixes the classes."""
    pairs = sorted(_once(pairs), key=lambda pair: key("order", pair[0]))
    least = min(Counter(name for _, name in pairs).values(), default=0)
    taken: Counter[str] = Counter()
    kept = []
    for text, name in pairs:
        taken[name] += 1
        if taken[name] <= least:
            kept.append((text, name))
    return kept


def _table(config: TaskConfig) -> tuple[Pairs, Pairs]:
    train = _read(config, config.split)
    try:
        return train, _read(config, config.test_split)
    except InputError as error:
        if "split" not in str(error):
            raise
    return _parted([(_letters(text), text, name) for text, name in train], config.held_out)


def _read(config: TaskConfig, split: str) -> Pairs:
    """(text, class) of each row that has both."""
    import datasets

    from ..families.loading import is_local
    from .folder import suffix
    from .hub import TABLES, load_rows

    place = Path(config.path).expanduser()
    if (is_local(config.path) and not place.exists()) or (place.is_file() and suffix(place.name) not in TABLES):
        raise InputError(f"expected labelled texts at {config.path!r}, got nothing of that kind there; {FORM}")
    rows = load_rows(config.path, split)
    for name, flag in ((config.text_column, "--task.text_column"), (config.label_column, "--task.label_column")):
        if name not in rows.column_names:
            raise InputError(f"expected a column {name!r} in {config.path!r}, got {rows.column_names}; fix {flag}")
    texts, labels = rows[config.text_column], rows[config.label_column]
    feature = rows.features[config.label_column]
    if isinstance(feature, datasets.ClassLabel):
        if min(labels, default=0) < 0:  # as splits are published whose labels are kept secret
            raise InputError(
                f"expected a class in every row of split {split!r} of {config.path!r}, got none in some; fix --task.split or "
                "--task.test_split (validation, often)"
            )
        labels = [feature.int2str(label) for label in labels]
    return [(str(t), str(label)) for t, label in zip(texts, labels, strict=True) if t and label is not None]


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
