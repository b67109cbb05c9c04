"""The prompts of a sweep: read whole, checked before anything is generated, and fingerprinted.

Every rule here is against a number that would be wrong in silence: a blank line is an unconditional image, a prompt that the
tokenizer cuts is another prompt, and a list that starts again from its top is a smaller N.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..demo.world import TEST_SEED, World
from ..errors import InputError

COLUMNS = ("text", "caption", "prompt")
SUFFIXES = (".txt", ".csv", ".jsonl")
FORMS = "a .txt file with one prompt a line, a .csv or .jsonl file with a text, caption or prompt column, or demo"
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # zero, and half a character, which JSON can say and no tokenizer can read
MARK = "\ufeff"  # byte-order mark, which editors put in front of a file, so that joined files have it inside too
Line = tuple[int, str]  # its number in the file, from 1, and its prompt


def read_prompts(path: str | Path, count: int | None = None, tokenizer: Any = None) -> list[str]:
    """Prompts in the order of their file, white space around them removed; repeated ones stay.

    Args:
        path: .txt (one a line), .csv or .jsonl (a column `text`, `caption` or `prompt`), UTF-8; or "demo", the captions of
            the demo's test world, of which there are as many as asked for.
        count: how many, the first ones; all of the file by default. "demo" needs it.
        tokenizer: the pipeline's; prompts longer than its `model_max_length`, special tokens counted, are refused, because
            the pipeline would cut them.

    Raises:
        InputError: no such file, another kind of file, not UTF-8, no prompts or fewer than `count`, a blank one before
            the last, or one that is too long; the file and the line are named.
        ValueError: "demo" without a count.
    """
    if count is not None and count < 1:
        raise InputError(f"expected --num_images of 1 or more, got {count}; raise it")
    if str(path) == "demo":
        if count is None:
            raise ValueError("expected a count for the demo's prompts, got None; there is no end of them")
        found = list(enumerate(World(TEST_SEED).captions(range(count)), 1))
    else:
        found = _from_file(Path(path).expanduser())
    if count is not None and len(found) < count:
        raise InputError(
            f"expected {count} prompts for --num_images {count}, got {len(found)} in --prompts {str(path)!r}; lower "
            "--num_images, or add prompts to the file"
        )
    found = found[:count]
    if tokenizer is not None:
        _check_lengths(found, tokenizer, f"--prompts {str(path)!r}")
    return [text for _, text in found]


def fingerprint(prompts: Sequence[str]) -> str:
    """16 hex digits over the prompts and their order; where one ends and the next begins counts."""
    digest = hashlib.sha256()
    for prompt in prompts:
        data = prompt.encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()[:16]


def _from_file(file: Path) -> list[Line]:
    where = f"--prompts {str(file)!r}"
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"expected in --prompts {FORMS}, got {str(file)!r}; rename or convert it")
    if not file.is_file():
        raise InputError(f"expected a file of prompts, got {str(file)!r}, which is no file; fix the path in --prompts")
    read = {".txt": _text, ".csv": _csv, ".jsonl": _jsonl}[file.suffix.lower()]
    found = [(line, prompt.strip()) for line, prompt in read(_decoded(file.read_bytes(), where), where)]
    for line, prompt in found:
        if not prompt:
            raise InputError(
                f"expected a prompt in line {line} of {where}, got a blank one; remove the line, or write a prompt there"
            )
    if not found:
        raise InputError(f"expected prompts in {where}, got none; write them into it")
    return found


def _decoded(data: bytes, where: str) -> str:
    """The text, with line feeds for whatever ends its lines, and without byte-order marks."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", data[: error.start])) + 1
        raise InputError(f"expected UTF-8 in {where}, got {error.reason} in line {line}; save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"expected text in {where}, got zero bytes; save it as UTF-8 text")
    return text.replace(MARK, "").replace("\r\n", "\n").replace("\r", "\n")


def _lines(text: str) -> list[str]:
    """At line feeds only: `splitlines` would also cut at form feeds and at U+2028, which are allowed inside a prompt."""
    return text.rstrip().split("\n") if text.rstrip() else []


def _text(text: str, where: str) -> Iterator[Line]:
    yield from enumerate(_lines(text), 1)


def _csv(text: str, where: str) -> Iterator[Line]:
    """A quoted prompt may go over several lines; the last of them is its number."""
    reader = csv.reader(io.StringIO(text.rstrip(), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        place = header.index(_column(header, f"the first line of {where}"))
        for row in reader:
            blank = not "".join(row).strip()
            if not blank and len(row) != len(header):
                raise InputError(
                    f"expected {len(header)} columns in line {reader.line_num} of {where}, got {len(row)}; put prompts that "
                    "contain commas in double quotes"
                )
            yield reader.line_num, "" if blank else row[place]
    except csv.Error as error:
        raise InputError(f"expected CSV in {where}, got in line {reader.line_num}: {error}; fix the line") from error


def _jsonl(text: str, where: str) -> Iterator[Line]:
    for number, line in enumerate(_lines(text), 1):
        yield number, _prompt_of(line, f"line {number} of {where}") if line.strip() else ""


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"expected a JSON object in {where}, got: {error}; fix the line") from error
    if not isinstance(record, dict):
        raise InputError(f'expected an object such as {{"text": "a cat"}} in {where}, got {line.strip()[:40]}; fix it')
    prompt = record[_column(list(record), where)]
    if not isinstance(prompt, str) or NO_TEXT.search(prompt):
        raise InputError(f"expected text as the prompt in {where}, got {prompt!r}; fix it")
    return prompt


def _column(names: Sequence[str], where: str) -> str:
    found = [name for name in names if name in COLUMNS]
    if len(found) != 1:
        raise InputError(
            f"expected one column called {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]} in {where}, got "
            f"{', '.join(found or names) or 'none'}; rename the column of the prompts"
        )
    return found[0]


def _check_lengths(found: Sequence[Line], tokenizer: Any, where: str) -> None:
    limit = tokenizer.model_max_length
    tokens = tokenizer([text for _, text in found], truncation=False, verbose=False)["input_ids"]
    for (line, text), ids in zip(found, tokens, strict=True):
        if len(ids) > limit:
            raise InputError(
                f"expected prompts of at most {limit} tokens, which is all that the pipeline's text encoder reads, got "
                f"{len(ids)} in line {line} of {where} ({text[:40]!r}...); shorten it"
            )
