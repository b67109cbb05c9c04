"""Asking a teacher about a data set once, so that students can be trained without it: `stepdistill cache-logits`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.cache import ShardStore
from ..data.filling import Made, Maker, fill
from ..data.text import TextConfig
from ..data.tokens import TokenRows, Tokens
from ..errors import InputError
from ..randomness import StepRandom
from .chunked import chunked_logits
from .networks import CausalLM, sizes
from .pair import DEMO, LMTeacherConfig, check_window, key_of
from .signal import outputs
from .targets import Asked, Buckets
from .teacher_cache import FORMAT, KIND, STORED, WHAT, Key, pack, refuse, shard_rows

SHARD_TOKENS = 2**17  # answers of one shard, about; what a kill can cost
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class TeacherCacheConfig:
    """What is kept of a teacher's answers.

    Attributes:
        k: likeliest tokens.
        temperature: of its distributions; the loss must have the same.
        vocabulary: entries of its table that are compared, all by default; the student's number where it has fewer.
        stored: log-probabilities as fp16 or fp32.
        batch_size: rows that it reads at once.
        shard_tokens: answers of one shard, about.
    """

    k: int = 64
    temperature: float = 1.0
    vocabulary: int | None = None
    stored: Literal["fp16", "fp32"] = "fp16"
    batch_size: int = 16
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self) -> None:
        for name in ("k", "batch_size", "shard_tokens", "vocabulary"):
            if (value := vars(self)[name]) is not None and value < 1:
                raise InputError(f"expected {name} >= 1, got {value}; fix --{name}")
        if not 0.0 < self.temperature < float("inf"):
            raise InputError(f"expected a temperature > 0, got {self.temperature}; fix --temperature")
        if self.stored not in STORED:
            raise InputError(f"expected fp16 or fp32, got {self.stored!r}; fix --stored")

    def asked(self, teacher: CausalLM) -> Asked:
        """Of this teacher. InputError for more than it has."""
        entries = teacher.vocabulary if self.vocabulary is None else self.vocabulary
        if entries > teacher.vocabulary:
            raise InputError(
                f"expected at most the teacher's {teacher.vocabulary} entries, got {entries}; fix --vocabulary"
            )
        return Asked(entries, self.k, self.temperature)


class Answers(Maker):
    """Asks a teacher about rows and makes shards of what it says.

    Args:
        teacher: frozen.
        asked: what.
        rows: of the data.
        config: the rest.
    """

    kind, what = KIND, "rows of a teacher's answers"

    def __init__(self, teacher: CausalLM, asked: Asked, rows: TokenRows, config: TeacherCacheConfig) -> None:
        self.teacher, self.asked, self.rows, self.config = teacher, asked, rows, config
        self.items, self.shard = len(rows), shard_rows(rows, config.shard_tokens)
        self.bad: list[str] = []

    def make(self, items: range) -> Made:
        device = next(self.teacher.module.parameters()).device
        parts = []
        for start in range(items.start, items.stop, self.config.batch_size):
            indices = range(start, min(start + self.config.batch_size, items.stop))
            batch = self.rows.batch(indices, StepRandom(0, 0, indices)).to(device)
            with self.teacher.evaluating():
                found = [pack(answers, STORED[self.config.stored]) for answers in self._answers(Tokens.of(batch))]
            if any(part["log_probs"].isnan().any() for part in found):
                raise InputError(
                    f"expected finite outputs of the teacher, got NaN in rows {indices.start} to {indices.stop - 1}; use "
                    "--dtype fp32 or bf16"
                )
            parts += found
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Made(tensors, len(tensors["ids"]))

    def _answers(self, tokens: Tokens) -> Iterator[Buckets]:
        """Of all targets, row after row."""
        lm = self.teacher
        found, _, mask = outputs(lm, tokens, lm.is_factored)
        chosen = found[mask]
        logits = chunked_logits(chosen, lm.head, self.asked.entries) if lm.is_factored else iter((chosen,))
        return (Buckets.of(self.asked, z) for z in logits)


def cache_answers(
    folder: str | Path, teacher: CausalLM, rows: TokenRows, key: Key, config: TeacherCacheConfig, progress: bool = True
) -> dict[str, Any]:
    """Asks the teacher about all rows, or about those of which no answers are in `folder` yet; returns what about.json says.

    Args:
        teacher: frozen, where it is to compute.
        key: what the answers belong to.
        progress: show how far it is.

    Raises InputError for a folder with other answers or other files, and for one that can't be written.
    """
    asked = config.asked(teacher)
    dtype = str(next(teacher.module.parameters()).dtype).removeprefix("torch.")
    settings = {
        "format": FORMAT, "k": asked.k, "vocabulary": asked.entries, "temperature": asked.temperature, "stored": config.stored,
        "dtype": dtype, "shard_rows": shard_rows(rows, config.shard_tokens),
    }  # fmt: skip
    facts = {**key.teacher, "parameters": sizes({"teacher": teacher})["teacher"]}
    about = {**settings, "teacher": facts, "data": dict(key.data), "tokenizer": dict(key.tokenizer)}
    store = ShardStore(Path(folder).expanduser(), about, WHAT, "--output_dir")
    said = store.said()
    if said:
        changed = [
            f"{name} {said.get(name)!r}, here {now!r}" for name, now in settings.items() if said.get(name) != now
        ]
        refuse([*key.differences(said), *changed], store, "give another --output_dir, or set back what differs")
    elif store.folder.exists() and any(not path.name.startswith(".") for path in store.folder.iterdir()):
        raise InputError(
            f"expected a new folder, or one of a {WHAT}, got {str(folder)!r} with other files; give another --output_dir"
        )
    fill(store, [Answers(teacher, asked, rows, config)], progress=progress)
    return about


def cache_logits(
    teacher: LMTeacherConfig, text: TextConfig, config: TeacherCacheConfig, folder: str, dtype: str
) -> str:
    """The whole command: opens teacher and text, asks, and returns what there is to say.

    Args:
        dtype: of the teacher's weights, a key of `DTYPES`.
    """
    if teacher.path == DEMO:
        raise InputError(
            "expected a checkpoint to cache the answers of, got demo, whose teacher is trained within its run; give "
            "--teacher.path"
        )
    from ..data.text import open_texts
    from ..data.tokens import rows_of
    from ..networks.pretrained import load_model, load_tokenizer

    flag = "--teacher.path"
    tokenizer = load_tokenizer(teacher.path, flag, teacher.revision)
    rows = rows_of(open_texts(text).train, tokenizer, text.block_size)
    key = key_of(teacher, rows, tokenizer, text)
    model = load_model("AutoModelForCausalLM", teacher.path, flag, teacher.revision, DTYPES[dtype])
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    lm = CausalLM(model.to(device or "cpu")).frozen()
    check_window(lm, teacher.path, text.block_size)
    cache_answers(folder, lm, rows, key, config)
    size = sum(file.stat().st_size for file in Path(folder).expanduser().glob("*.safetensors"))
    count, entries = key.data["tokens"], config.asked(lm).entries
    return (
        f"{count:,} answers of {size / count:.1f} bytes in {folder}, {size / 1e6:.1f} MB; all {entries:,} entries in fp16 "
        f"would be {2 * entries * count / 1e6:.1f} MB"
    )
