"""Token data: blocks of documents without padding, and conversations of which only the answers count.

What counts is told by lengths, never by token ids: where the padding is the end-of-text token, a mask by id would take the true
one too, and the student would never learn to stop. Masks belong to tokens as targets: the logits at place s are judged by the
token at s + 1 and by its mask (:meth:`Tokens.of`).
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import InputError
from ..randomness import StepRandom
from .text import Example

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """The token part of a batch, [B, S] each, kept in `Batch.extra` under these names.

    Attributes:
        input_ids: int64.
        attention_mask: True where there is a token, False at padding, on the right of completions and on the left of prompts.
        loss_mask: True where the token is a target: not in a prompt, not at padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Tokens:
        """Those of a batch; ValueError where it has none."""
        if "input_ids" not in batch.extra:
            raise ValueError(
                "this method needs tokens (Batch.extra['input_ids']), got a data set without; use data/tokens.py"
            )
        return cls(batch.extra["input_ids"], batch.extra["attention_mask"], batch.extra["loss_mask"])

    def targets(self) -> tuple[Tensor, Tensor]:
        """(labels, mask), [B, S - 1] each, for the logits at places 0 .. S - 2: both are shifted."""
        return self.input_ids[:, 1:], self.loss_mask[:, 1:]


@dataclass(frozen=True)
class Row:
    """A sequence of tokens.

    Attributes:
        ids: all of them.
        learned: of each, whether it is a target.
        prompt: how many of the first are the prompt that a student completes by itself.
        completed: False for a prompt that nothing follows.
    """

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    prompt: int = 0
    completed: bool = True


class TokenRows:
    """A data set of token sequences.

    A batch has `input_ids`, `attention_mask` and `loss_mask` padded on the right to its longest row, and where the rows have
    prompts also `prompt_ids` and `prompt_mask`, padded on the left as `generate` wants it.

    Args:
        rows: one or more.
        pad: id of the padding, which any token's may be: nothing reads it.
    """

    def __init__(self, rows: Sequence[Row], pad: int) -> None:
        if not rows:
            raise InputError("expected a sequence of tokens or more, got none; give more text (--data.path)")
        self.rows, self.pad = list(rows), pad
        self.prompted = all(row.prompt for row in rows)
        self.completed = all(row.completed for row in rows)
        self.longest_prompt = max(row.prompt for row in rows)

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """sha256 of all rows in order: of their ids, and of which are targets."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(array("q", [len(row.ids), *row.ids]).tobytes() + bytes(row.learned))
        return digest.hexdigest()

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        """Rows `indices`."""
        rows = [self.rows[i] for i in indices]
        extra = {
            "input_ids": padded([row.ids for row in rows], self.pad),
            "attention_mask": padded([(True,) * len(row.ids) for row in rows], False),
            "loss_mask": padded([row.learned for row in rows], False),
        }
        if self.prompted:
            prompts = [row.ids[: row.prompt] for row in rows]
            extra["prompt_ids"] = padded(prompts, self.pad, left=True)
            extra["prompt_mask"] = padded([(True,) * len(p) for p in prompts], False, left=True)
        return Batch(None, {}, {}, rng, extra)


def padded(rows: Sequence[Sequence[Any]], fill: int | bool, left: bool = False) -> Tensor:
    """[B, S] with `fill` after (or before) the shorter rows; int64, or bool for a bool `fill`."""
    longest = max(len(row) for row in rows)
    out = torch.full((len(rows), longest), fill, dtype=torch.bool if isinstance(fill, bool) else torch.int64)
    for i, row in enumerate(rows):
        if row:
            out[i, longest - len(row) if left else 0 : longest if left else len(row)] = torch.tensor(
                row, dtype=out.dtype
            )
    return out


def stream(examples: Sequence[Example], tokenizer: Any, end: int | None = None) -> Tensor:
    """[N] int64: documents one after the other, each with `end` after it, the end-of-text token by default."""
    end = end_of_text(tokenizer) if end is None else end
    texts = [example.text for example in examples]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return torch.tensor([i for document in ids for i in (*document, end)], dtype=torch.int64)


def blocks(examples: Sequence[Example], tokenizer: Any, size: int, prompt: int = 0) -> TokenRows:
    """Documents packed end to end into blocks of `size` tokens, without padding; the rest that fills no block is left out.

    Args:
        prompt: how many tokens of each block are its prompt; they are no targets then.
    """
    ids = stream(examples, tokenizer)
    learned = (False,) * prompt + (True,) * (size - prompt)
    rows = [Row(tuple(block), learned, prompt) for block in ids[: len(ids) // size * size].view(-1, size).tolist()]
    if not rows:
        raise InputError(
            f"expected text for a block of {size} tokens or more, got {len(ids)} tokens; give more, or lower --data.block_size"
        )
    return TokenRows(rows, end_of_text(tokenizer))


def windows(examples: Sequence[Example], tokenizer: Any, size: int, stride: int, most: int | None = None) -> TokenRows:
    """The documents' stream under a window of `size` tokens that moves by `stride`, to measure perplexity.

    Every token but the first is a target once, in the first window that reaches it: after the first window its last `stride`
    tokens, which have `size` - `stride` tokens or more before them.

    Args:
        most: tokens of the stream that are read; all by default.
    """
    if not 0 < stride < size:
        raise InputError(
            f"expected a stride in [1, {size - 1}] for windows of {size} tokens, got {stride}; fix --eval.stride"
        )
    ids = stream(examples, tokenizer)[:most].tolist()
    if len(ids) < 2:
        raise InputError(
            f"expected 2 tokens or more to measure on, got {len(ids)}; raise --data.held_out or --eval.max_tokens"
        )
    rows, done = [], 1
    for start in range(0, len(ids), stride):
        end = min(start + size, len(ids))
        rows.append(Row(tuple(ids[start:end]), tuple(place >= done for place in range(start, end))))
        done = end
        if end == len(ids):
            break
    return TokenRows(rows, end_of_text(tokenizer))


def conversations(examples: Sequence[Example], tokenizer: Any, size: int, prompts: bool = False) -> TokenRows:
    """One row a conversation, cut at `size` tokens; targets are the answers, the token that ends them included.

    Rows without a target within `size` are left out, and how many is said.

    Args:
        prompts: what stands before the last answer is the prompt that a student completes by itself.
    """
    read = (_chat(e, tokenizer) if e.messages else _completion(e, tokenizer) for e in examples)
    cut = [Row(r.ids[:size], r.learned[:size], r.prompt if prompts else 0, r.completed) for r in read]
    # of a prompt alone nothing is learned but what the student will write after it
    kept = [row for row in cut if (row.prompt < size if prompts and not row.completed else any(row.learned))]
    if lost := len(cut) - len(kept):
        log.warning("%d of %d conversations have no answer within %d tokens and are left out", lost, len(cut), size)
    if not kept:
        if not prompts and not any(row.completed for row in cut):
            raise InputError(
                "expected completions to learn, got prompts alone; give a `completion` column, or take a recipe whose student "
                "writes them (recipes/minillm.py, or recipes/gkd.py with --method.lmbda 1)"
            )
        raise InputError(
            f"expected answers within {size} tokens of a conversation, got none in {len(cut)}; raise --data.block_size"
        )
    return TokenRows(kept, end_of_text(tokenizer))


def rows_of(examples: Sequence[Example], tokenizer: Any, size: int, prompt: int = 0) -> TokenRows:
    """:func:`blocks` of documents, with prompts of `prompt` tokens, or :func:`conversations`, with prompts where it isn't 0."""
    if all(example.is_document for example in examples):
        return blocks(examples, tokenizer, size, prompt)
    return conversations(examples, tokenizer, size, prompts=prompt > 0)


def _completion(example: Example, tokenizer: Any) -> Row:
    """Prompt and completion, tokenised apart so that their border is one between tokens; an empty completion is its end."""
    begin = tokenizer("", verbose=False)["input_ids"][
        :1
    ]  # what some tokenizers put before a text; what they put after it goes
    begin = begin if begin == [tokenizer.bos_token_id] else []
    prompt = (*begin, *tokenizer(example.prompt, add_special_tokens=False, verbose=False)["input_ids"])
    if not prompt:
        raise InputError(f"expected a prompt of one token or more, got {example.prompt!r}; fix or drop that row")
    if example.completion is None:
        return Row(prompt, (False,) * len(prompt), len(prompt), completed=False)
    words = tokenizer(example.completion, add_special_tokens=False, verbose=False)["input_ids"]
    answer = (*words, end_of_text(tokenizer))
    return Row((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer), len(prompt))


def _chat(example: Example, tokenizer: Any) -> Row:
    """A conversation in the tokenizer's template; each answer begins where the template of what is before it ends."""
    if not tokenizer.chat_template:
        raise InputError(
            "expected a tokenizer with a chat template for `messages`, got one without; use the checkpoint of a chat model, or "
            "give `prompt` and `completion` columns"
        )
    whole = _templated(tokenizer, example.messages, False)
    learned, start = [False] * len(whole), 0
    for i, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before, after = (
            _templated(tokenizer, example.messages[:i], True),
            _templated(tokenizer, example.messages[: i + 1], False),
        )
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise InputError(
                "expected a chat template that leaves earlier turns as they were, got one that rewrites them (thinking that is "
                f"taken out, say), in the conversation that begins {example.messages[0]['content'][:60]!r}; split it into "
                "conversations of one answer each"
            )
        start = len(before)
        learned[start : len(after)] = [True] * (len(after) - start)
    return Row(tuple(whole), tuple(learned), start)


def _templated(tokenizer: Any, messages: Sequence[Any], prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def end_of_text(tokenizer: Any) -> int:
    """The id of the end-of-text token; InputError for a tokenizer without."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "expected a tokenizer with an end-of-text token, got none; set its eos_token and save it again"
        )
    return int(tokenizer.eos_token_id)
