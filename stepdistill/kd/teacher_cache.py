"""A teacher's answers on a data set, kept on disk: for each target its k likeliest tokens and the mass of all others.

Of each target 2 bytes an id and 2 bytes a log-probability in float16, and 2 for the rest: 4 k + 2, and 4 more for each 65,536
entries beyond the first. Ids are in ascending order, so that 16 bits of each are enough where it is known at which place each
page of 65,536 begins. The rest's mass is stored as a log-probability too: what 16 bits leave of 1 - sum p would be noise.

Beyond Hinton et al. (arXiv 1503.02531) nothing here is of a paper; how much is lost by keeping the likeliest tokens alone, and
what sampling them would change, is the subject of arXiv 2503.16870.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..batch import Batch
from ..data.cache import Entry, ShardStore
from ..data.tokens import Row, TokenRows
from ..errors import InputError
from ..randomness import StepRandom
from .signal import IDS, LOG_PROBS, CachedTeacher
from .targets import Asked, Buckets

FORMAT = 1  # to be raised whenever the same answers would lie elsewhere, or be others
KIND = "answers"
PAGE = 2**16
STORED = {"fp16": torch.float16, "fp32": torch.float32}
WHAT = "cache of a teacher"


@dataclass(frozen=True)
class Key:
    """What answers belong to.

    Attributes:
        teacher: "sha256" of its weights; "path" and others, to tell it by.
        data: "sha256" of the rows; "rows", "tokens" and others, to tell them by.
        tokenizer: "sha256" of its vocabulary, and "tokens".
    """

    teacher: Mapping[str, Any]
    data: Mapping[str, Any]
    tokenizer: Mapping[str, Any]

    @classmethod
    def of(cls, teacher: Mapping[str, Any], rows: TokenRows, tokenizer: Any, source: Mapping[str, Any]) -> Key:
        """From what tells the teacher (its "sha256" included) and where the rows came from."""
        data = {**source, "rows": len(rows), "tokens": sum(map(targets, rows.rows)), "sha256": rows.fingerprint()}
        words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        return cls(teacher, data, {"tokens": len(tokenizer), "sha256": hashlib.sha256(words).hexdigest()})

    def differences(self, said: Mapping[str, Any]) -> list[str]:
        """What of a cache's about.json is other than this: of each part the facts that differ, or else its hash."""
        found = []
        for name, now in vars(self).items():
            then = said.get(name, {})
            if then.get("sha256") != now["sha256"]:
                facts = [fact for fact in now if fact != "sha256" and then.get(fact) != now[fact]]
                told = [f"{fact} {then.get(fact)!r}, here {now[fact]!r}" for fact in facts or ["sha256"]]
                found.append(f"{name} ({'; '.join(told)})")
        return found


def targets(row: Row) -> int:
    """How many answers a row has."""
    return sum(row.learned[1:])


def shard_rows(rows: TokenRows, shard_tokens: int) -> int:
    """Rows of one shard."""
    return max(1, shard_tokens * len(rows) // max(1, sum(map(targets, rows.rows))))


def pack(answers: Buckets, dtype: torch.dtype) -> dict[str, Tensor]:
    """Buckets [n] as they are stored: the low 16 bits of ids [n, k], log-probabilities [n, k + 1], places of pages [n, p]."""
    ids = answers.ids.cpu()
    found = {"ids": (ids % PAGE).to(torch.uint16), "log_probs": answers.log_probs.to(dtype).cpu()}
    if answers.entries > PAGE:
        pages = torch.arange(PAGE, answers.entries, PAGE)
        found["pages"] = (ids[:, None] < pages[:, None]).sum(2).int()  # ids before each of them
    return {name: value.contiguous() for name, value in found.items()}


def unpack(stored: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(ids [n, k] int32, log-probabilities as stored)."""
    ids = stored["ids"].int()
    if "pages" in stored:
        place = torch.arange(ids.shape[1])
        ids += PAGE * (place >= stored["pages"][:, :, None]).sum(1).int()
    return ids, stored["log_probs"]


def refuse(differences: Sequence[str], store: ShardStore, fix: str) -> None:
    """InputError where there are any."""
    if differences:
        raise InputError(
            f"expected answers of this teacher to this data in {str(store.folder)!r}, got a cache with another "
            f"{', another '.join(differences)}; {fix}"
        )


class CachedRows:
    """A data set with a teacher's answers, read in any order from memory maps of the shards.

    Batches are those of `rows`, with `teacher_ids` [B, S, k] and `teacher_log_probs` [B, S, k + 1] at places whose next token
    is a target (k alone where k is all of the vocabulary).

    Args:
        folder: that :func:`cache_answers` filled.
        rows: the data.
        key: what teacher and data are now.
        flag: the option that named the folder, for messages.

    Attributes:
        teacher: whose answers these are.

    Raises InputError for a folder without a cache, of another teacher or other data, unfinished or damaged.
    """

    def __init__(self, folder: str | Path, rows: TokenRows, key: Key, flag: str = "--teacher.cache") -> None:
        self.rows, self.store = rows, ShardStore(Path(folder).expanduser(), {}, WHAT, flag)
        about = self._about(key)
        self.shard, self.asked = about["shard_rows"], Asked(about["vocabulary"], about["k"], about["temperature"])
        self.dtype = STORED[about["stored"]]
        self._starts = [0, *accumulate(map(targets, rows.rows))]
        self._open: dict[int, Any] = {}
        self._check_shards()
        settings = {name: value for name, value in about.items() if name not in vars(key)}
        made = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        hashes = {"checkpoint": about["teacher"]["sha256"], "cache": made}
        self.teacher = CachedTeacher(self.asked, about["teacher"]["parameters"], hashes)

    def _about(self, key: Key) -> dict[str, Any]:
        about, folder = self.store.said(), str(self.store.folder)
        make = "stepdistill cache-logits --teacher.path PATH --data.path TEXT --data.block_size N --output_dir NEW"
        if about.get("format") != FORMAT or "teacher" not in about:
            found = "nothing of that kind" if "teacher" not in about else f"format {about.get('format')}"
            raise InputError(
                f"expected a {WHAT} (format {FORMAT}) at {folder!r}, got {found}; fix {self.store.flag}, or make one: {make}"
            )
        refuse(key.differences(about), self.store, f"set back what differs, or make another cache: {make}")
        return about

    def _check_shards(self) -> None:
        """InputError for shards that are not there, or not as they were written."""
        names = [f"{KIND}-{i:05d}" for i in range(-(-len(self.rows) // self.shard))]
        again = "run the same `stepdistill cache-logits` again, which makes what is missing"
        found = {name: self.store.look(name) for name in names}
        for name, entry in found.items():
            if isinstance(entry, str) and entry:
                raise InputError(
                    f"expected {str(self.store.path(name))!r} as it was written, got it damaged: {entry}; {again}"
                )
        if missing := [name for name, entry in found.items() if not isinstance(entry, Entry)]:
            raise InputError(
                f"expected {len(names)} shards in {str(self.store.folder)!r}, got {len(names) - len(missing)}, without "
                f"{missing[0]}: the cache was not finished; {again}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        """Rows `indices`; zeros where nothing is learned."""
        batch = self.rows.batch(indices, rng)
        shape, k = batch.extra["input_ids"].shape, self.asked.k
        ids = torch.zeros(*shape, k, dtype=torch.int32)
        log_probs = torch.zeros(*shape, k + (k < self.asked.entries), dtype=self.dtype)
        for row, index in enumerate(indices):
            learned = torch.tensor(self.rows.rows[index].learned[1:], dtype=torch.bool)
            places = learned.nonzero().squeeze(1)  # the logits at place s are judged by the token at s + 1
            ids[row, places], log_probs[row, places] = self._answers(index)
        batch.extra |= {IDS: ids, LOG_PROBS: log_probs}
        return batch

    def _answers(self, index: int) -> tuple[Tensor, Tensor]:
        """Of one row's targets."""
        number, first = index // self.shard, self._starts[index - index % self.shard]
        if number not in self._open:
            self._open[number] = safe_open(self.store.path(f"{KIND}-{number:05d}"), framework="pt")
        file, part = self._open[number], slice(self._starts[index] - first, self._starts[index + 1] - first)
        return unpack({name: file.get_slice(name)[part] for name in file.keys()})  # noqa: SIM118
