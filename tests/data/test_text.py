"""Texts: what is read from where, in which order, and that no document is on both sides of the split."""

import json
from pathlib import Path

import pytest

from stepdistill.data.docstrings import docstrings, english
from stepdistill.data.text import Example, TextConfig, open_texts
from stepdistill.errors import InputError

LONG = "one two three four five six seven eight"


def test_docstrings_are_parsed_in_order_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "__init__.py").write_text(f'"""{LONG} of b."""\nraise SystemExit\n')
    (tmp_path / "a.py").write_text(
        f'"""{LONG} of a."""\nclass A:\n    """Short."""\n'
        f'    def f(self):\n        """{LONG} of f.\n\n        More.\n        """\n'
    )
    (tmp_path / "c.py").write_text(f'"""{LONG} of a."""\n')  # the same text again
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "d.py").write_text(f'"""{LONG} of d."""\n')
    assert docstrings(tmp_path) == [
        ("a", f"{LONG} of a."), ("a", f"{LONG} of f.\n\nMore."), ("b", f"{LONG} of b."),
    ]  # fmt: skip


def test_examples_of_the_prompt_are_no_english() -> None:
    assert (
        english("Adds.\n\n    >>> add(1, 2)\n    3\n\n    And so on.  \n\n\n    End.") == "Adds.\n\nAnd so on.\n\nEnd."
    )
    odd = "Not an example:\n>>>x"
    assert english(odd) == odd


def test_documents_of_a_file_are_parted_by_blank_lines_and_split_by_their_own_words(tmp_path: Path) -> None:
    documents = [f"document {i % 90}\nsecond line" for i in range(100)]
    (tmp_path / "a.txt").write_text("\n\n \n".join(documents) + "\n")
    texts = open_texts(TextConfig(str(tmp_path / "a.txt"), held_out=0.3))
    train, held_out = ([e.text for e in part] for part in (texts.train, texts.held_out))
    assert sorted(train + held_out) == sorted(documents) and not set(train) & set(held_out)
    assert 15 < len(held_out) < 45
    (tmp_path / "b.txt").write_text("\n\n".join(reversed(documents)))
    again = open_texts(TextConfig(str(tmp_path / "b.txt"), held_out=0.3))
    assert {e.text for e in again.held_out} == set(held_out), "a document's side doesn't depend on its neighbours"


def test_a_folder_has_a_document_a_file(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02d}.md").write_text(f"text {i}\n\nmore\n")
    (tmp_path / "empty.txt").write_text(" \n")
    texts = open_texts(TextConfig(str(tmp_path), held_out=0.3))
    assert len(texts.train) + len(texts.held_out) == 30
    assert [e.text for e in texts.train] == sorted((e.text for e in texts.train), key=lambda t: int(t.split()[1]))


def write_rows(path: Path, rows: list[dict]) -> TextConfig:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return TextConfig(str(path), held_out=0.4)


def test_rows_of_a_data_set(tmp_path: Path) -> None:
    texts = open_texts(write_rows(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(12)]))
    assert {e.text for e in (*texts.train, *texts.held_out)} == {f"row {i}" for i in range(12)}
    pairs = open_texts(write_rows(tmp_path / "b.jsonl", [{"prompt": f"p {i}", "completion": ""} for i in range(12)]))
    assert all(e.completion == "" and e.prompt and not e.is_document for e in pairs.train)
    alone = open_texts(write_rows(tmp_path / "c.jsonl", [{"prompt": f"p {i}"} for i in range(12)]))
    assert all(e.completion is None for e in alone.train)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = open_texts(
        write_rows(tmp_path / "d.jsonl", [{"messages": [*turns, *turns[: i % 2]], "x": i} for i in range(12)])
    )
    assert Example(messages=tuple(turns)) in (*chat.train, *chat.held_out)


def test_a_configuration_of_a_data_set(tmp_path: Path) -> None:
    for name in ("plain", "raw"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl", [{"text": f"{name} {i}"} for i in range(12)])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n" + "".join(f"- config_name: {n}\n  data_dir: {n}\n" for n in ("plain", "raw")) + "---\n"
    )
    texts = open_texts(TextConfig(str(tmp_path), config_name="raw", held_out=0.4))
    assert {e.text for e in (*texts.train, *texts.held_out)} == {f"raw {i}" for i in range(12)}
    with pytest.raises(InputError, match=r"available configs: \['plain', 'raw'\].*--data\.config_name"):
        open_texts(TextConfig(str(tmp_path)))


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"words": "a"}] * 3, "--data.text_column"),
        ([{"prompt": "", "completion": "a"}] * 3, "row 0"),
        (
            [
                {"prompt": "a", "completion": "b"},
                {"prompt": "a", "completion": None},
                {"prompt": "c", "completion": "d"},
            ],
            None,
        ),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 3, "an answer"),
        ([{"messages": []}] * 3, "an answer"),
        ([{"messages": [{"role": "user", "content": 3}]}] * 3, "role and a content"),
        ([{"text": "the same"}] * 9, "--data.held_out"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, rows: list[dict], named: str | None) -> None:
    config = write_rows(tmp_path / "a.jsonl", rows)
    if named is None:
        open_texts(config)
        return
    with pytest.raises(InputError, match=named):
        open_texts(config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"path": ""}, "--data.path"), ({"block_size": 1}, "--data.block_size"), ({"held_out": 0.0}, "--data.held_out"),
        ({"prompt_tokens": 128}, "--data.prompt_tokens"), ({"held_out": 1.0}, "--data.held_out"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(change: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        TextConfig(**change)


def test_places_with_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing there"):
        open_texts(TextConfig(str(tmp_path / "no")))
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="another kind"):
        open_texts(TextConfig(str(tmp_path / "a.bin")))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="UTF-8"):
        open_texts(TextConfig(str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(InputError, match="none for"):
        open_texts(TextConfig(str(tmp_path / "a.txt")))
    with pytest.raises(InputError, match="hub"):
        open_texts(TextConfig("nobody/nothing"))
