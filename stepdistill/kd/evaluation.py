"""How good a language model is: perplexity under a window of a stated stride, the share of a gap closed, what it writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.text import Example
from ..data.tokens import Row, TokenRows, Tokens, conversations, end_of_text, padded, windows
from ..errors import InputError
from ..randomness import StepRandom
from .divergences import Divergence
from .language_model import token_loss
from .networks import CausalLM
from .reduction import Objective
from .rollouts import generate

BATCH = 16  # windows at once


@dataclass
class EvalConfig:
    """What is measured at the end.

    Attributes:
        max_tokens: of the held-out text.
        stride: of the window (of --data.block_size tokens) that perplexity is taken under; half of it by default.
        samples: held-out beginnings that each model continues, where --train.validation_prompts names none.
        new_tokens: the most that it writes after each.
        teacher: whether the teacher is measured too. One with a cache of its answers is opened for that alone: false leaves one
            that does not fit in memory closed, and says nothing of the gap to it.
    """

    max_tokens: int = 20_000
    stride: int | None = None
    samples: int = 3
    new_tokens: int = 40
    teacher: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 2), ("samples", 0), ("new_tokens", 1)):
            if (value := vars(self)[name]) < least:
                raise InputError(f"expected {name} >= {least}, got {value}; fix --eval.{name}")


def perplexity(lm: CausalLM, rows: TokenRows) -> float:
    """exp of the mean negative log-probability of all targets in `rows`."""
    return math.exp(min(mean_nll(lm, rows), 700.0))  # beyond it a float is infinite


def mean_nll(lm: CausalLM, rows: TokenRows, most: int | None = None) -> float:
    """The mean negative log-probability of the targets in `rows`, or in the first `most` of them."""
    total, count, read = 0.0, 0, min(len(rows), most or len(rows))
    device = next(lm.module.parameters()).device
    with lm.evaluating():
        for start in range(0, read, BATCH):
            indices = range(start, min(start + BATCH, read))
            batch = rows.batch(indices, StepRandom(0, 0, indices)).to(device)
            found = token_loss(Objective(kd_weight=0.0, ce_weight=1.0), lm, None, Tokens.of(batch))
            total, count = total + float(found.total), count + found.count
    return total / max(1, count)


def gap_closed(control: float, student: float, teacher: float) -> float:
    """(control - student) / (control - teacher) of perplexities, at equal tokens: 1 where the student is its teacher.

    NaN where the teacher is no better than the control: there is no gap to close.
    """
    return (control - student) / (control - teacher) if teacher < control else math.nan


def own_text_divergence(
    student: CausalLM, teacher: CausalLM, rows: TokenRows, new: int, end: int, most: int = 64
) -> float:
    """The mean of KL(student || teacher) over the tokens that the student writes after the prompts of the first `most` rows."""
    total, count, objective = 0.0, 0, Objective(Divergence("reverse_kl"))
    device = next(student.module.parameters()).device
    for start in range(0, min(most, len(rows)), BATCH):
        indices = range(start, min(start + BATCH, most, len(rows)))
        batch = rows.batch(indices, StepRandom(0, 0, indices)).to(device)
        prompts = batch.extra["prompt_ids"], batch.extra["prompt_mask"]
        text = generate(student, *prompts, new, end, batch.rng)
        with student.evaluating():
            found = token_loss(objective, student, teacher, text)
        total, count = total + float(found.total), count + found.count
    return total / count


class Examination:
    """The held-out text, read by several models in the same way.

    Args:
        rows: held out, with what counts as targets; None where there are prompts alone.
        tokenizer: of all models.
        config: how much.
        prompts: to be continued.
        stride: of the windows in `rows`; None for answers.
    """

    def __init__(
        self, rows: TokenRows | None, tokenizer: Any, config: EvalConfig, prompts: Sequence[str], stride: int | None
    ) -> None:
        self.rows, self.tokenizer, self.config, self.prompts, self.stride = (
            rows,
            tokenizer,
            config,
            list(prompts),
            stride,
        )
        self.tokens = 0 if rows is None else sum(sum(row.learned[1:]) for row in rows.rows)

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        tokenizer: Any,
        window: int,
        config: EvalConfig,
        prompts: Sequence[str] | None = None,
    ) -> Examination:
        """Of held-out examples: under a moving window for documents, of answers for conversations; prompts alone have none."""
        rows: TokenRows | None
        if all(example.is_document for example in examples):
            stride = config.stride or window // 2
            rows = windows(examples, tokenizer, window, stride, config.max_tokens)
            texts = [" ".join(example.text.split()[:8]) for example in examples[: config.samples]]
        else:
            rows, stride = None, None
            if any(example.messages or example.completion is not None for example in examples):
                answers = conversations(examples, tokenizer, window)
                rows = TokenRows(_first(answers, config.max_tokens), answers.pad)
            texts = [example.prompt or example.messages[0]["content"] for example in examples[: config.samples]]
        return cls(rows, tokenizer, config, prompts if prompts else texts, stride)

    def perplexities(self, models: Mapping[str, CausalLM]) -> dict[str, float]:
        """Of each model; {} where there is nothing to measure on."""
        return {} if self.rows is None else {name: perplexity(lm, self.rows) for name, lm in models.items()}

    def continuations(self, lm: CausalLM) -> list[str]:
        """The likeliest continuation of each prompt."""
        if not self.prompts:
            return []
        device = next(lm.module.parameters()).device
        ids = [
            self.tokenizer(text, verbose=False)["input_ids"] or [end_of_text(self.tokenizer)] for text in self.prompts
        ]
        ids = [row[-self._room(lm) :] for row in ids]
        prompt, mask = padded(ids, 0, left=True), padded([[True] * len(row) for row in ids], False, left=True)
        new = min(self.config.new_tokens, (lm.window or 10**9) - prompt.shape[1])
        found = generate(lm, prompt.to(device), mask.to(device), new, end_of_text(self.tokenizer))
        written = zip(found.input_ids, found.loss_mask, strict=True)
        return [self.tokenizer.decode(row[chosen].tolist(), skip_special_tokens=True) for row, chosen in written]

    def _room(self, lm: CausalLM) -> int:
        """Tokens of a prompt: of a long one the end."""
        return max(1, (lm.window or 10**9) - self.config.new_tokens)


def _first(rows: TokenRows, most: int) -> list[Row]:
    """As many rows as have up to `most` targets together, and one at least."""
    kept: list[Row] = []
    count = 0
    for row in rows.rows:
        count += sum(row.learned)
        if kept and count > most:
            break
        kept.append(row)
    return kept


def beginning(text: str, width: int = 60) -> str:
    """For a cell of a table: one line, no bars."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= width else f"{line[: width - 1]}…"


def side_by_side(prompts: Sequence[str], written: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table: a prompt a row, a model a column."""
    lines = [f"| prompt | {' | '.join(written)} |", f"|{'---|' * (len(written) + 1)}"]
    for i, prompt in enumerate(prompts):
        lines.append(f"| {beginning(prompt)} | {' | '.join(beginning(texts[i], 120) for texts in written.values())} |")
    return "\n".join(lines)
