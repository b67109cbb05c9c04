"""Language models side by side: perplexity on the same held-out text, seconds of a forward and of writing text, in turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..data.text import Example, TextConfig, all_texts, open_texts
from ..data.tokens import TokenRows, Tokens
from ..errors import InputError
from ..kd.evaluation import EvalConfig, Examination
from ..kd.networks import CausalLM
from ..kd.rollouts import generate
from ..kd.vocabulary import check_same_tokens
from ..networks.pretrained import load_model, load_tokenizer
from ..randomness import StepRandom
from .contenders import DTYPES
from .intervals import RESAMPLES, ends, median, resampled_means, scaled, times_faster
from .latency import measure
from .model_options import ModelOptions
from .model_rows import Found, teacher_first
from .quantities import Quantity
from .rows import TEACHER, Value

NEW = 64  # tokens that are written when generation is timed
AT_ONCE = 4096  # tokens of a forward
CHUNK = 512  # tokens whose logits exist at once
FEW = 20  # documents: of fewer the bootstrap would say little
LARGEST = 700.0  # beyond it exp is infinite


class LanguageExam:
    """Teacher and students of one tokenizer, and the text that they are measured on.

    Args:
        options: as given on the command line.
        paths: name -> folder or hub id, the teacher first.
        device: where they go.

    Raises InputError for models that can't be opened, cut text differently, or have fewer positions than the window.
    """

    def __init__(self, options: ModelOptions, paths: dict[str, str], device: torch.device) -> None:
        self.options = options
        share = options.data.get("held_out")
        given = {key: value for key, value in options.data.items() if key != "held_out" or share != 1.0}
        self.text = TextConfig(**given)
        self.config = EvalConfig(**options.exam)
        self.examples = all_texts(self.text) if share == 1.0 else open_texts(self.text).held_out
        self.held_out = share or self.text.held_out
        tokenizer = self._tokenizer(paths)
        exam = Examination.of(self.examples, tokenizer, self.text.block_size, self.config)
        if exam.rows is None:
            raise InputError(
                f"expected documents, or prompts with completions, in {self.text.path!r}, got prompts alone; give --data.path "
                "others: perplexity is of text that is there"
            )
        self.rows, self.stride, self.tokens = exam.rows, exam.stride, exam.tokens
        self.owner, self.unit = units(self.examples, tokenizer, self.rows)
        self.networks = {name: self._open(name, path, device) for name, path in paths.items()}
        rooms = [lm.window - self.prompt_tokens for lm in self.networks.values() if lm.window is not None]
        self.new = options.exam.get("new_tokens") or max(1, min([NEW, *rooms]))
        for name, lm in self.networks.items():
            self._check_fits(name, lm)

    def _tokenizer(self, paths: dict[str, str]) -> Any:
        (_, teacher), *students = paths.items()
        tokenizer = load_tokenizer(teacher, "--teacher")
        for _, path in students:
            check_same_tokens(load_tokenizer(path, "--student"), tokenizer, f"--student {path}")
        return tokenizer

    def _open(self, name: str, path: str, device: torch.device) -> CausalLM:
        flag = "--teacher" if name == TEACHER else "--student"
        model = load_model("AutoModelForCausalLM", path, flag, dtype=DTYPES[self.options.dtype])
        return CausalLM(model.to(device)).frozen()

    def _check_fits(self, name: str, lm: CausalLM) -> None:
        longest = max(self.text.block_size, self.prompt_tokens + self.new)
        if lm.window is not None and longest > lm.window:
            flag = "--data.block_size" if self.text.block_size > lm.window else "--eval.new_tokens"
            raise InputError(
                f"expected text that fits in the {lm.window} positions of {name}, got {longest}; lower {flag}"
            )
        largest = max(max(row.ids) for row in self.rows.rows)
        if largest >= lm.vocabulary:
            raise InputError(
                f"expected a table of all tokens in {name}, got {lm.vocabulary} entries, too few for token {largest} of the "
                "tokenizer; it is no model of this tokenizer"
            )

    @property
    def _longest(self) -> tuple[int, ...]:
        """The tokens of the first row that is as long as any."""
        return max((row.ids for row in self.rows.rows), key=len)

    @property
    def prompt_tokens(self) -> int:
        """Of the text that a model goes on with when generation is timed."""
        return min(self.text.prompt, len(self._longest))

    def measure(self) -> Found:
        """Perplexities with their intervals, then the seconds, all models in turns."""
        teacher, students = teacher_first(list(self.networks))
        losses = {name: self._losses(name) for name in self.networks}
        values = perplexities(losses, self.owner, self.options.seed)
        seconds = {} if self.options.skip_latency else self._seconds()
        for name, timed in seconds.items():
            values[name]["tokens_per_second"] = scaled(median(timed["generation"]), self.new, inverse=True)
            values[name]["forward_ms"] = scaled(median(timed["forward"]), 1000.0)
        for name in students if seconds else ():
            values[name]["times_faster"] = times_faster(seconds[teacher]["generation"], seconds[name]["generation"])
        against = ("perplexity_ratio", "{} x the teacher's perplexity")
        return Found(self._columns(), values, seconds, self._protocol(), against)

    def _losses(self, name: str) -> np.ndarray:
        found = token_losses(self.networks[name], self.rows)
        if not bool(torch.isfinite(found).all()):
            raise InputError(
                f"expected finite log-probabilities from {name}, got others in {self.options.dtype}; try --dtype bf16 or fp32"
            )
        return found.numpy()

    def _seconds(self) -> dict[str, dict[str, tuple[float, ...]]]:
        ids = self._longest
        found: dict[str, dict[str, tuple[float, ...]]] = {name: {} for name in self.networks}
        for what, call, length in (("forward", forward, len(ids)), ("generation", self._write, self.prompt_tokens)):
            calls = {}
            for name, lm in self.networks.items():
                given = torch.tensor([ids[:length]], device=next(lm.module.parameters()).device)
                calls[name] = partial(call, lm, given)
            for name, seconds in measure(calls, self.options.repeats).items():
                found[name][what] = tuple(seconds)
        return found

    def _write(self, lm: CausalLM, prompt: Tensor) -> None:
        # no token has the number of entries as its id, so none ends the text before all are written
        written = generate(lm, prompt, torch.ones_like(prompt), self.new, end=lm.vocabulary)
        if (count := written.input_ids.shape[1] - prompt.shape[1]) != self.new:
            raise RuntimeError(f"expected {self.new} new tokens, got {count}")

    def _columns(self) -> tuple[Quantity, ...]:
        how = (
            "of the answers"
            if self.stride is None
            else f"window of {self.text.block_size} tokens that moves by {self.stride}"
        )
        count = self.owner.max() + 1
        drawn = f"bootstrap over {count:,} {self.unit}" if count > 1 else "too short for an interval"
        return (
            Quantity("perplexity", "perplexity", "lower", ".2f", note=f"on {self.tokens:,} tokens, {how}; {drawn}"),
            Quantity("perplexity_ratio", "x teacher's", "lower", ".3f",
                     note=f"perplexity over the teacher's, the same {self.unit} drawn for both"),
            Quantity("tokens_per_second", "tokens / s", "higher", ".3g",
                     note=f"{self.new} new tokens after {self.prompt_tokens}, one text, KV cache"),
            Quantity("forward_ms", "ms a forward", "lower", ".3g",
                     note=f"of {len(self._longest)} tokens, one text, logits of all; medians of calls in turns"),
            Quantity("times_faster", "x faster", "higher", ".2f", note="at writing, median over turns of teacher's over own"),
        )  # fmt: skip

    def _protocol(self) -> dict[str, Any]:
        return {
            "data": {"path": self.text.path, "split": self.text.split, "held_out": self.held_out},
            "tokens": self.tokens,
            "window": self.text.block_size,
            "stride": self.stride,
            "bootstrap": {"units": self.unit, "count": int(self.owner.max()) + 1, "resamples": RESAMPLES},
            "generation": {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new, "batch": 1},
            "forward_tokens": len(self._longest),
        }


def token_losses(lm: CausalLM, rows: TokenRows) -> Tensor:
    """-log q of every target, float64 [targets] in the order of the rows; logits exist for a few tokens at a time."""
    device, found = next(lm.module.parameters()).device, []
    step = max(1, AT_ONCE // max(len(row.ids) for row in rows.rows))
    with lm.evaluating():
        for start in range(0, len(rows), step):
            indices = range(start, min(start + step, len(rows)))
            tokens = Tokens.of(rows.batch(indices, StepRandom(0, 0, indices)).to(device))
            given = tokens.input_ids, tokens.attention_mask
            labels, mask = tokens.targets()
            outputs = (lm.hidden(*given) if lm.is_factored else lm(*given))[:, :-1][mask]
            for part, label in zip(outputs.split(CHUNK), labels[mask].split(CHUNK), strict=True):
                z = lm.head.logits(part) if lm.is_factored else part
                found.append(functional.cross_entropy(z.float(), label, reduction="none").cpu().double())
    return torch.cat(found)


def units(examples: Sequence[Example], tokenizer: Any, rows: TokenRows) -> tuple[np.ndarray, str]:
    """(number of the unit that each target of `rows` is in, what units are): documents, windows where those are few, answers.

    The tokens of a document are no independent draws; documents are.
    """
    targets = np.array([sum(row.learned[1:]) for row in rows.rows])
    by_row = np.repeat(np.arange(len(targets)), targets)
    if not all(example.is_document for example in examples):
        return by_row, "conversations"
    texts = tokenizer([example.text for example in examples], add_special_tokens=False, verbose=False)["input_ids"]
    lengths = [len(ids) + 1 for ids in texts]  # with the end of each
    # every token of the stream but the first is a target once, in its order
    owner = np.repeat(np.arange(len(lengths)), lengths)[1 : 1 + targets.sum()]
    owner = owner - owner[0]  # where the first document is its end alone
    return (by_row, "windows") if owner[-1] + 1 < FEW else (owner, "documents")


def perplexities(losses: dict[str, np.ndarray], owner: np.ndarray, seed: int) -> dict[str, dict[str, Value]]:
    """Perplexity of each model, and of the students its ratio to the teacher's, with bootstrap intervals.

    Args:
        losses: name -> -log q of the same targets [T], the teacher's first.
        owner: of each target the number of its unit, [T].
    """
    teacher, students = teacher_first(list(losses))
    # a student's difference is drawn and not two means, so that equal models differ by exactly nothing
    columns = [losses[name] for name in losses] + [losses[name] - losses[teacher] for name in students]
    counts = np.bincount(owner)
    sums = np.stack([np.bincount(owner, weights=column) for column in columns], axis=1)
    means, drawn = sums.sum(0) / counts.sum(), resampled_means(sums, counts, seed)
    single = len(counts) == 1  # which says nothing of how much others would differ
    found = [Value(_exp(m), None if single else _exp_ends(column)) for m, column in zip(means, drawn.T, strict=True)]
    values = {name: {"perplexity": value} for name, value in zip(losses, found, strict=False)}
    for name, value in zip(students, found[len(losses) :], strict=True):
        values[name]["perplexity_ratio"] = value
    return values


def _exp(mean: float) -> float:
    return math.exp(min(float(mean), LARGEST))


def _exp_ends(samples: np.ndarray) -> tuple[float, float]:
    low, high = ends(samples)
    return _exp(low), _exp(high)


def forward(lm: CausalLM, ids: Tensor) -> None:
    """Logits of all tokens [1, S]."""
    with lm.evaluating():
        lm(ids, torch.ones_like(ids))
