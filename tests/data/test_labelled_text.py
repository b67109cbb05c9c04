"""Labelled texts: which is where, that none is on both sides, and what is said of tables that don't do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from language import words

from stepdistill.data import labelled_text
from stepdistill.data.labelled_text import Labelled, Task, TaskConfig, open_task, text_rows
from stepdistill.data.text import Example
from stepdistill.errors import InputError
from stepdistill.randomness import StepRandom


def table(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(folder / name)


def letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def sides(task: Task) -> tuple[set[str], set[str]]:
    train, test = ({letters(t) for t, _ in part.pairs} for part in (task.train, task.test))
    return train, test


def numbered(count: int = 200) -> list[dict[str, Any]]:
    return [{"text": f"Text number {i}, says {i % 7}.", "label": "odd" if i % 2 else "even"} for i in range(count)]


def test_docstrings_are_balanced_and_on_one_side(monkeypatch: Any) -> None:
    packages = {"big": 60, "small": 40, "tiny": 3, "_own": 90, **{f"p{i}": 30 + i for i in range(7)}}
    found = [
        (
            f"{package}.part",
            f"Of {package} and its part {i} this says a word.\n\nAnd of {package} then {i} says one more.\n\nShort.",
        )
        for package, count in packages.items()
        for i in range(count)
    ]
    shared = "All of them have this one sentence in common."
    found += [
        ("big.a", shared),
        ("small.b", shared.upper() + "\n\nAlone the small one has this second paragraph here."),
    ]
    monkeypatch.setattr(labelled_text, "docstrings", lambda: found)
    task = open_task(TaskConfig(held_out=0.25))
    assert task.train.classes == task.test.classes == ("big", "p1", "p2", "p3", "p4", "p5", "p6", "small")
    for part in (task.train, task.test):
        counts = Counter(name for _, name in part.pairs)
        assert len(set(counts.values())) == 1 and len(counts) == 8
    train, test = sides(task)
    assert not train & test and letters(shared) not in train | test, "of two classes, so of none"
    assert "short" not in train | test and not any("tiny" in text or "_own" in text for text in train | test)
    whole = {letters(p): letters(text) for _, text in found for p in text.split("\n\n")}
    assert not {whole[t] for t in train} & {whole[t] for t in test}, "a docstring's paragraphs stay together"
    assert open_task(TaskConfig(held_out=0.25)) == task
    first = [name for _, name in task.train.pairs[:40]]
    assert len(set(first)) > 4, "classes are mixed"


def test_a_table_with_one_split_is_parted_by_its_words(tmp_path: Path) -> None:
    rows = numbered()
    twice = [
        *rows,
        {"text": "TEXT number 3 - says 3!", "label": "odd"},
        {"text": "text number 4, says 4", "label": "odd"},
    ]
    task = open_task(TaskConfig(table(tmp_path, twice)))
    train, test = sides(task)
    assert not train & test and task.train.classes == ("even", "odd")
    assert len(train) + len(test) == 199 and letters("Text number 4, says 4.") not in train | test
    assert 0.1 < len(test) / 199 < 0.3
    again = open_task(TaskConfig(table(tmp_path, twice[::-1])))
    assert sides(again) == (train, test), "whatever the order of the rows"


def test_it_is_said_where_the_split_to_measure_on_is_not_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_task(TaskConfig(table(tmp_path, numbered()), test_split="validaton"))
    assert "no split 'validaton'" in caplog.text and "20% of split 'train'" in caplog.text


def test_a_data_set_with_its_own_splits(tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names})

    def split(texts: list[str], labels: list[int]) -> Any:
        return datasets.Dataset.from_dict({"sentence": texts, "label": labels}, features)

    parts = {
        "train": split(["good film", "bad film", "Fine. Film", "dull"], [1, 0, 1, 0]),
        "validation": split(["fine film", "bad end", "bad end"], [1, 0, 0]), "test": split(["what film"], [-1]),
    }  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "sst2"))
    config = TaskConfig(str(tmp_path / "sst2"), test_split="validation", text_column="sentence")
    task = open_task(config)
    wanted = [("good film", "positive"), ("bad film", "negative"), ("dull", "negative")]
    assert task.train.pairs == wanted, "one is measured on"
    assert task.test.pairs == [("fine film", "positive"), ("bad end", "negative")] and task.dropped == 1
    with pytest.raises(InputError, match="--task.test_split"):
        open_task(TaskConfig(str(tmp_path / "sst2"), text_column="sentence"))  # labels kept secret
    with pytest.raises(InputError, match="--task.text_column"):
        open_task(TaskConfig(str(tmp_path / "sst2"), test_split="validation"))


def test_a_configuration_of_a_data_set(tmp_path: Path) -> None:
    for name in ("mrpc", "sst2"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            rows = [{"text": f"{name} {split} {word}", "label": word} for word in ("good", "bad")]
            table(tmp_path / name, rows, f"{split}.jsonl")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n" + "".join(f"- config_name: {n}\n  data_dir: {n}\n" for n in ("mrpc", "sst2")) + "---\n"
    )
    task = open_task(TaskConfig(str(tmp_path), config_name="sst2"))
    assert [text for text, _ in task.train.pairs] == ["sst2 train good", "sst2 train bad"]
    assert [text for text, _ in task.test.pairs] == ["sst2 test good", "sst2 test bad"]
    with pytest.raises(InputError, match=r"available configs: \['mrpc', 'sst2'\].*--task\.config_name"):
        open_task(TaskConfig(str(tmp_path)))


def test_rows_without_a_class_or_a_text_are_left_out(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    texts = [*(f"text {i}" for i in range(40)), "of none", None]
    rows = {"text": texts, "label": [*(i % 2 for i in range(40)), None, 1]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path))
    train, test = sides(open_task(TaskConfig(str(tmp_path))))
    assert train | test == {f"text{i}" for i in range(40)}


def test_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": i % 11} for i in range(300)]
    assert open_task(TaskConfig(table(tmp_path, rows))).train.classes == tuple(str(i) for i in range(11))


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"text": "a", "class": 1}], "--task.label_column"), ([{"words": "a", "label": 1}], "--task.text_column"),
        ([{"text": f"t {i}", "label": "one"} for i in range(50)], "two classes"), ([{"text": "a", "label": "x"}], "got none"),
    ],
)  # fmt: skip
def test_tables_that_do_not_do(tmp_path: Path, rows: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(InputError, match=named):
        open_task(TaskConfig(table(tmp_path, rows)))


def test_classes_to_measure_on_are_those_of_training(tmp_path: Path) -> None:
    import datasets

    parts = {
        "train": datasets.Dataset.from_dict({"text": ["a b", "c d"], "label": ["x", "y"]}),
        "test": datasets.Dataset.from_dict({"text": ["e f"], "label": ["z"]}),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    with pytest.raises(InputError, match="'z'"):
        open_task(TaskConfig(str(tmp_path)))


@pytest.mark.parametrize("path", ["nowhere.jsonl", "./nowhere"])
def test_places_with_nothing_there(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match="--task.path"):
        open_task(TaskConfig(str(tmp_path / path)))


def test_general_text_is_without_what_is_measured_on() -> None:
    task = Task(Labelled([("one", "a")], ("a", "b")), Labelled([("Held out, this.", "a"), ("two", "b")], ("a", "b")))
    said = ("one", "HELD OUT THIS", "Before.\n\nheld out: this\n\nafter", "held out, that")
    assert [e.text for e in task.apart_from([Example(text) for text in said])] == [said[0], said[3]]


def test_rows_have_special_tokens_and_are_cut(tmp_path: Path) -> None:
    tokenizer = words()
    part = Labelled([("a b c d e f", "y"), ("g", "x")], ("x", "y"))
    rows = text_rows(part, tokenizer, 4)
    assert rows.rows[0].ids == (0, 1, 2, 3) and [row.label for row in rows.rows] == [1, 0]
    batch = rows.batch([1, 0], StepRandom(0, 0, [0, 1]))
    assert batch.extra["input_ids"].tolist() == [[6, 29, 29, 29], [0, 1, 2, 3]]
    assert batch.extra["attention_mask"].tolist() == [[True, False, False, False], [True] * 4]
    assert torch.equal(batch.extra["labels"], torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"path": ""}, "--task.path"), ({"held_out": 1.0}, "--task.held_out"), ({"length": 3}, "--task.length")],
)
def test_options_that_make_no_sense(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        TaskConfig(**change)
