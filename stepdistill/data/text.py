"""Texts to train language models on: documents, prompts with completions, or conversations; and which of them are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..randomness import key
from .docstrings import docstrings
from .folder import suffix, visible

SUFFIXES = (".txt", ".text", ".md", ".rst")
POSSIBLE = (
    'give --data.path "docstrings", a text file (documents separated by blank lines), a folder of text files, '
    "or a data set of `datasets` (a hub id, or a folder or file of parquet, arrow, json, jsonl or csv)"
)

Message = dict[str, str]


@dataclass
class TextConfig:
    """What to train on.

    Attributes:
        path: "docstrings" (of the Python standard library), a text file with blank lines between documents, a folder of text
            files, or a data set of the `datasets` library (hub id, folder or file of parquet, arrow, json or csv).
        split: which split of a `datasets` data set.
        config_name: which configuration of it, where it has several: wikitext-2-raw-v1 of Salesforce/wikitext.
        text_column: its column of documents. Rows with `messages` (role and content each), or with `prompt` and `completion`,
            are conversations, of which only the answers are learned.
        block_size: tokens of a block of documents, or the most of a conversation.
        held_out: share of the documents that is kept from training, to measure on.
        prompt_tokens: of each block of documents, how many are the prompt where a student writes the rest (on-policy); a
            quarter by default.
    """

    path: str = "docstrings"
    split: str = "train"
    config_name: str | None = None
    text_column: str = "text"
    block_size: int = 128
    held_out: float = 0.05
    prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("path", "split", "config_name", "text_column"):
            if vars(self)[name] == "":
                raise InputError(f"expected a name, got an empty {name}; fix --data.{name}")
        if self.block_size < 2:
            raise InputError(f"expected blocks of 2 tokens or more, got {self.block_size}; fix --data.block_size")
        if not 0.0 < self.held_out < 1.0:
            raise InputError(f"expected a share in (0, 1), got held_out {self.held_out}; fix --data.held_out")
        if not 0 < self.prompt < self.block_size:
            raise InputError(
                f"expected prompt_tokens in [1, block_size - 1], got {self.prompt_tokens} of {self.block_size}; fix "
                "--data.prompt_tokens or --data.block_size"
            )

    @property
    def prompt(self) -> int:
        """Tokens of a block that are its prompt."""
        return max(1, self.block_size // 4) if self.prompt_tokens is None else self.prompt_tokens


@dataclass(frozen=True)
class Example:
    """One document, or one conversation.

    Attributes:
        text: a document; "" for the other kinds.
        prompt: of a completion, None for the other kinds.
        completion: what is learned after the prompt; None where there is a prompt alone.
        messages: a conversation, in order.
    """

    text: str = ""
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] = field(default=())

    @property
    def is_document(self) -> bool:
        """Whether all of it is learned."""
        return self.prompt is None and not self.messages


@dataclass(frozen=True)
class Texts:
    """The two parts of a corpus; all examples are of one kind."""

    train: Sequence[Example]
    held_out: Sequence[Example]


def open_texts(config: TextConfig) -> Texts:
    """What `config.path` names, parted by whole documents. Raises InputError.

    A document's part is a function of its group alone: of its module for docstrings, of its file in a folder, else of its own
    words, so that a text that occurs twice is never on both sides.
    """
    pairs = _read(config)
    train: list[Example] = []
    held_out: list[Example] = []
    for group, example in pairs:
        share = key("held out", group)[0] / 2**64
        (held_out if share < config.held_out else train).append(example)
    for part, name in ((train, "training"), (held_out, "measuring")):
        if not part:
            raise InputError(
                f"expected documents for training and for measuring in {config.path!r}, got {len(pairs)} in all and none for "
                f"{name}; give more of them, or change --data.held_out ({config.held_out:g})"
            )
    return Texts(train, held_out)


def all_texts(config: TextConfig) -> list[Example]:
    """All that `config.path` names, to measure on what was held out elsewhere. Raises InputError where there is nothing."""
    found = [example for _, example in _read(config)]
    if not found:
        raise InputError(f"expected documents in {config.path!r}, got none; {POSSIBLE}")
    return found


def _read(config: TextConfig) -> list[tuple[str, Example]]:
    """(group, example) of all that is there, in an order that never changes."""
    place = Path(config.path).expanduser()
    if config.path == "docstrings":
        return [(module, Example(text)) for module, text in docstrings()]
    if place.is_file() and suffix(place.name) in SUFFIXES:
        return [(text, Example(text)) for text in _paragraphs(_text_of(place))]
    if place.is_dir():
        names = sorted(name for name in visible(place) if suffix(name) in SUFFIXES)
        if config.config_name is None and names not in ([], ["README.md"]):  # which by itself is a data set's card
            texts = ((name, _text_of(place / name).strip()) for name in names)
            return [(name, Example(text)) for name, text in texts if text]
    return _table(config)


def _paragraphs(text: str) -> list[str]:
    """Documents between blank lines."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return [part.strip() for part in lines.split("\n\n") if part.strip()]


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 text in {str(file)!r}, got {error.reason}; save it as UTF-8") from error


def _table(config: TextConfig) -> list[tuple[str, Example]]:
    """The rows of a `datasets` data set."""
    from ..families.loading import is_local
    from .hub import TABLES, load_rows

    place = Path(config.path).expanduser()
    if is_local(config.path) and not place.exists():
        raise InputError(f"expected text at {config.path!r}, got nothing there; {POSSIBLE}")
    if place.is_file() and suffix(place.name) not in TABLES:
        raise InputError(f"expected text at {config.path!r}, got a file of another kind; {POSSIBLE}")
    rows = load_rows(config.path, config.split, config.config_name)
    columns = rows.column_names
    if "messages" in columns:
        examples = [_conversation(row, i) for i, row in enumerate(rows["messages"])]
    elif "prompt" in columns:
        completions = rows["completion"] if "completion" in columns else [None] * len(rows)
        examples = [_pair(*pair, i) for i, pair in enumerate(zip(rows["prompt"], completions, strict=True))]
    elif config.text_column in columns:
        examples = [Example(str(text)) for text in rows[config.text_column] if text]
    else:
        raise InputError(
            f"expected a column {config.text_column!r}, `messages`, or `prompt` and `completion` in {config.path!r}, got "
            f"{columns}; fix --data.text_column"
        )
    return [(repr(example), example) for example in examples]


def _pair(prompt: Any, completion: Any, row: int) -> Example:
    if isinstance(prompt, str) and prompt and (completion is None or isinstance(completion, str)):
        return Example(prompt=prompt, completion=completion)
    raise InputError(
        f"expected a prompt of one character or more, and a completion that is a text, in row {row}, got {prompt!r} and "
        f"{completion!r}; fix or drop that row (whole conversations go into a column `messages`)"
    )


def _conversation(messages: Any, row: int) -> Example:
    """A checked conversation with an answer in it."""
    turns = []
    for message in messages or ():
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(
                f"expected messages with a role and a content, both texts, in row {row}, got {message!r}; fix that row"
            )
        turns.append({"role": role, "content": content})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise InputError(
            f"expected an answer (role `assistant`) in the messages of row {row}, got none; fix or drop it"
        )
    return Example(messages=tuple(turns))
