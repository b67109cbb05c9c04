"""Prompt files: what is in them comes out in order, and what would make other images than asked for is an error."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from stepdistill.bench.promptfile import fingerprint, read_prompts
from stepdistill.demo.teacher import MAX_TOKENS, tokenizer
from stepdistill.demo.world import TEST_SEED, World
from stepdistill.errors import InputError

PROMPTS = ["a red fox", "two cats, one dog", "été – 雪", "a red fox", 'the "end"']


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def file(name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return file


def rows(key: str = "text") -> str:
    return "".join(json.dumps({"id": i, key: p}) + "\n" for i, p in enumerate(PROMPTS))


def table(key: str = "text") -> str:
    return f"id,{key}\n" + "".join('{},"{}"\n'.format(i, p.replace('"', '""')) for i, p in enumerate(PROMPTS))


FILES = {
    "a.txt": "\n".join(PROMPTS) + "\n",
    "open-ended.txt": "\n".join(PROMPTS),
    "windows.txt": "\r\n".join(PROMPTS) + "\r\n",
    "mac.txt": "\r".join(PROMPTS),
    "marked.txt": "\ufeff" + "\n".join(PROMPTS) + "\n\n \n",
    "joined.txt": "\ufeff" + "\n".join(PROMPTS[:2]) + "\n\ufeff" + "\n".join(PROMPTS[2:]),
    "blanks.txt": "\n".join(f"  {p}\t" for p in PROMPTS),
    "LOUD.TXT": "\n".join(PROMPTS),
    "a.jsonl": rows(),
    "caption.jsonl": rows("caption"),
    "prompt.jsonl": "\ufeff" + rows("prompt") + "\n\n",
    "a.csv": table(),
    "caption.csv": table("caption").replace("\n", "\r\n"),
    "prompt.csv": "\ufeff" + table("prompt") + "\n \n\t\n",
    "spaced.csv": table(" text "),
}


@pytest.mark.parametrize("name", FILES)
def test_prompts_in_their_order(write: Any, name: str) -> None:
    path = write(name, FILES[name])
    assert read_prompts(path) == PROMPTS == read_prompts(str(path), 5)
    assert read_prompts(path, 2) == PROMPTS[:2]


def test_the_demos_prompts() -> None:
    assert read_prompts("demo", 30, tokenizer()) == World(TEST_SEED).captions(range(30))
    with pytest.raises(ValueError, match="count"):
        read_prompts("demo")


def test_other_characters_that_end_lines_elsewhere(write: Any) -> None:
    odd = "one\u2028two\x0cthree\x85four"
    assert read_prompts(write("a.txt", f"{odd}\nfive")) == [odd, "five"]
    assert read_prompts(write("a.jsonl", json.dumps({"text": odd}, ensure_ascii=False) + "\n")) == [odd]


def test_a_quoted_prompt_over_two_lines(write: Any) -> None:
    text = 'text\n"one\ntwo"\nthree\n'
    for name, written in {
        "a.csv": text,
        "b.csv": text.replace("\n", "\r\n"),
        "c.csv": text.replace("\n", "\r"),
    }.items():
        assert read_prompts(write(name, written)) == ["one\ntwo", "three"]


@pytest.mark.parametrize("count", [6, 1000])
def test_too_few_are_not_repeated(write: Any, count: int) -> None:
    with pytest.raises(InputError, match=f"--num_images {count}, got 5 in --prompts .*a.txt.*add prompts to the file"):
        read_prompts(write("a.txt", FILES["a.txt"]), count)


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("spec", ["demo", "gone.txt"])
def test_a_count_of_none(spec: str, count: int) -> None:
    with pytest.raises(InputError, match="--num_images"):
        read_prompts(spec, count)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.txt", "one\n\ntwo\n", 2),
        ("a.txt", "\none\n", 1),
        ("a.txt", "one\ntwo\n \t\n\nthree", 3),
        ("a.csv", "text\none\n\ntwo\n", 3),
        ("a.csv", 'id,text\n1,"one\nmore"\n2,\n3,two\n', 4),
        ("a.csv", "id,text\n1,one\n2,\n", 3),
        ("a.csv", 'text\none\n"  "\n', 3),
        ("a.csv", "id,text\n1,one\n  \n2,two\n", 3),
        ("a.csv", "id,text\n1,one\n,\n2,two\n", 3),
        ("a.txt", "one\n\ufeff\ntwo", 2),
        ("a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n', 2),
        ("a.jsonl", '{"text": "one"}\n{"text": " "}\n', 2),
    ],
)
def test_a_blank_prompt(write: Any, name: str, text: str, line: int) -> None:
    path = write(name, text)
    with pytest.raises(InputError, match=f"line {line} of --prompts '{path}', got a blank one; remove the line"):
        read_prompts(path, 1)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.txt", "", "got none"),
        ("a.txt", "\n\n", "got none"),
        ("a.csv", "text\n", "got none"),
        ("a.csv", "", "one column"),
        ("a.jsonl", "", "got none"),
        ("a.txt", "caf\xe9\n".encode("latin-1"), "UTF-8 .* in line 1;"),
        ("a.txt", "fox\r\ncat\rcaf\xe9\n".encode("latin-1"), "UTF-8 .* in line 3;"),
        ("a.csv", "text\nfox\n".encode("utf-16"), "UTF-8"),
        ("a.txt", "fox\n".encode("utf-16-le"), "zero bytes"),
        ("a.csv", "id,title\n1,fox\n", "first line.*id, title"),
        ("a.csv", "text,prompt\nfox,cat\n", "first line.*text, prompt"),
        ("a.csv", "text\na fox, running\n", "line 2 .*got 2; put prompts that contain commas"),
        ("a.csv", "id,text\n1\n", "line 2 .*got 1"),
        ("a.csv", 'text\n"a fox\n', "line 2: "),
        ("a.jsonl", '{"text": "fox"}\n{"text": \n', "line 2 "),
        ("a.jsonl", '["fox"]\n', "an object such as .*line 1 .*fox"),
        ("a.jsonl", '{"text": "fox"}\n7\n', "an object such as .*line 2 .*got 7"),
        ("a.jsonl", '{"text": "fox"}\n{"title": "cat"}\n', "line 2 .*got title"),
        ("a.jsonl", '{"text": "fox"}\n{"text": 7}\n', "line 2 .*7"),
        ("a.jsonl", '{"text": null}\n', "line 1 .*None"),
        ("a.jsonl", '{"text": "\\ud83e fox"}\n', "line 1 "),
        ("a.jsonl", '{"text": "fox\\u0000"}\n', "line 1 "),
        ("a.json", '{"text": "fox"}\n', "--prompts"),
        ("a", "fox\n", "--prompts"),
    ],
)
def test_files_that_are_no_prompts(write: Any, name: str, text: str | bytes, found: str) -> None:
    with pytest.raises(InputError, match=found) as error:
        read_prompts(write(name, text))
    assert "--prompts" in str(error.value) and name in str(error.value)


def test_the_home_folder(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.txt", FILES["a.txt"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_prompts("~/a.txt") == PROMPTS


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for path in (tmp_path / "gone.txt", tmp_path / "folder.txt"):
        with pytest.raises(InputError, match="no file; fix the path in --prompts"):
            read_prompts(path)


def test_a_prompt_that_the_tokenizer_would_cut(write: Any) -> None:
    words, start_and_end = "red " * 500, 2
    path = write("a.txt", f"red star\n{words}\n")
    with pytest.raises(InputError, match=f"at most {MAX_TOKENS} tokens.*got {500 + start_and_end} in line 2 of"):
        read_prompts(path, 2, tokenizer())
    assert read_prompts(path, 1, tokenizer()) == ["red star"]
    assert len(read_prompts(path, 2)) == 2
    fits = "red " * (MAX_TOKENS - start_and_end)
    assert read_prompts(write("b.txt", fits), None, tokenizer()) == [fits.strip()]
    with pytest.raises(InputError, match=f"got {MAX_TOKENS + 1} in line 1"):
        read_prompts(write("c.txt", fits + "red"), None, tokenizer())
    with pytest.raises(InputError, match="in line 3 of --prompts '.*d.csv' .*; shorten it"):
        read_prompts(write("d.csv", f"text\nred\n{words}\n"), None, tokenizer())


def test_fingerprint() -> None:
    assert fingerprint(["a", "été"]) == fingerprint(("a", "été"))
    written = hashlib.sha256(
        b"5:a cat1:b"
    ).hexdigest()  # another form would set new results files apart from older ones
    assert fingerprint(["a cat", "b"]) == written[:16]
    lists = [[], ["a"], ["a", "a"], ["aa"], ["a", "b"], ["b", "a"], ["ab"], ["a", ""], ["", "a"], ["a1:b"], ["A"]]
    prints = [fingerprint(prompts) for prompts in lists]
    assert len(set(prints)) == len(lists) and {len(p) for p in prints} == {16}
