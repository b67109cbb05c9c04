"""Text that a student writes itself, as a function of (seed, step, position): generation with noise of our own.

`generate` draws with `torch.multinomial` from a global generator. Here it chooses greedily among scores that were made of the
logits and Gumbel noise, and so writes a sample of softmax(logits) (the Gumbel-max trick); the noise belongs to the sample and
the token alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..data.tokens import TokenRows, Tokens
from ..errors import InputError
from ..randomness import StepRandom
from .divergences import log_probs
from .networks import CausalLM

TO_WRITE = "to write text with"  # what whole weights are needed for
DRAWN = 16  # tokens whose noise is drawn at once: each generator that is set up costs as much as hundreds of numbers


class GumbelMax:
    """A LogitsProcessor: scores [B, V] of the next token -> scores of which only that of a sample of it is finite.

    The trick is done twice, in place of noise on all of V: first among some sqrt(V) blocks of the vocabulary, whose
    probabilities are sums of their entries', then among the entries of the block that won. As with noise on each entry, and
    unlike the inverse of a cumulative sum, logits that differ in their last digits hardly ever give another token.

    Args:
        rng: of the samples.
        start: tokens before the first that is written, padding included.
    """

    def __init__(self, rng: StepRandom, start: int) -> None:
        self.rng, self.start = rng, start
        self._noise: tuple[int, Tensor] | None = None  # the first of the tokens it is for, [B, DRAWN, blocks + entries]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        size = math.isqrt(scores.shape[1] - 1) + 1
        padded = torch.nn.functional.pad(scores.float(), (0, -scores.shape[1] % size), value=-math.inf)
        blocks = padded.unflatten(1, (-1, size))
        count = blocks.shape[1]
        noise = self._of(input_ids.shape[1] - self.start, count + size).to(scores.device)
        block = (blocks.logsumexp(2) + noise[:, :count]).argmax(1, keepdim=True)
        entries = blocks.take_along_dim(block[..., None], 1).squeeze(1)
        token = size * block + (entries + noise[:, count:]).argmax(1, keepdim=True)
        return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)

    def _of(self, token: int, entries: int) -> Tensor:
        """Noise [B, entries] of the token that is written as number `token`; a stream is for DRAWN of them in a row."""
        first = token - token % DRAWN
        if self._noise is None or self._noise[0] != first:
            uniform = self.rng.uniform(f"tokens from {first}", (DRAWN, entries))
            self._noise = first, gumbel(uniform).float()
        return self._noise[1][:, token - first]


def gumbel(uniform: Tensor) -> Tensor:
    """-log(-log u) of u in [0, 1); -inf at 0, which never wins."""
    return -torch.log(-torch.log(uniform))


class Mixture:
    """A LogitsProcessor: the student's scores [B, V] -> log(share p + (1 - share) q), the teacher p in step with its own cache.

    Both are restricted to the entries that the two tables share, and renormalised there; the others get -inf. Made for one call
    of :func:`generate`.

    Args:
        teacher: sees the same tokens, mask and positions as the student.
        share: of the teacher, in [0, 1); at 0 it is not asked.
        prompt_mask: [B, P] of the prompts, padded on the left.
    """

    def __init__(self, teacher: CausalLM, share: float, prompt_mask: Tensor) -> None:
        self.teacher, self.share, self.mask = teacher, share, prompt_mask.bool()
        self.cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        shared = min(scores.shape[1], self.teacher.vocabulary)
        mixed = log_probs(scores[:, :shared])
        if self.share:
            rest = self.mask.new_ones(len(input_ids), input_ids.shape[1] - self.mask.shape[1])
            unseen = input_ids if self.cache is None else input_ids[:, -1:]
            logits, self.cache = self.teacher.next_logits(unseen, torch.cat([self.mask, rest], 1), self.cache)
            log_p = log_probs(logits[:, :shared])
            # arXiv 2306.08543, eq. 4: alpha p + (1 - alpha) q
            mixed = torch.logaddexp(log_p + math.log(self.share), mixed + math.log1p(-self.share))
        return torch.full_like(scores, -math.inf).index_copy_(
            1, torch.arange(shared, device=scores.device), mixed.to(scores.dtype)
        )


def check_prompts(data: TokenRows, new: int, *models: CausalLM) -> None:
    """InputError for data without prompts, and for prompts that leave no room for `new` tokens in a model's window."""
    if not data.prompted:
        raise InputError("expected prompts for a student to complete, got data without; fix --data.prompt_tokens")
    windows = [model.window for model in models if model.window is not None]
    if windows and data.longest_prompt + new > min(windows):
        raise InputError(
            f"expected prompts and what is written after them within the {min(windows)} positions of student and teacher, "
            f"got {data.longest_prompt} and {new} tokens; lower --method.max_new_tokens, or --data.prompt_tokens of documents "
            "and --data.block_size of conversations, which lose longer prompts then"
        )


def generate(
    student: CausalLM,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    new: int,
    end: int,
    rng: StepRandom | None = None,
    mixture: Mixture | None = None,
) -> Tokens:
    """Prompts [B, P] with what the student writes after them, up to `new` tokens; without any graph, and in eval mode.

    Nothing of the checkpoint's own generation settings holds: no top-k, top-p, temperature or penalty.

    Args:
        student: any causal language model; its adapter computes.
        prompt_ids, prompt_mask: padded on the left.
        new: the most tokens that are written; the last is `end` where the student came to one.
        end: the end-of-text token, which is written, learned, and followed by padding.
        rng: of the samples; None writes the likeliest token each time.
        mixture: of a teacher that writes along; None leaves it to the student.

    Returns:
        Tokens [B, P + n] whose targets are those that were written.

    Raises InputError for a student that the processes share out: they would not write in step.
    """
    if student.is_shared_out:
        raise InputError(f"expected whole weights {TO_WRITE}, got shards of them; use --train.parallel ddp")
    from transformers import GenerationConfig, LogitsProcessorList

    module: Any = student.module
    own = module.generation_config
    # explicit, since generate() fills what is unset from the checkpoint's own settings
    module.generation_config = GenerationConfig()
    plan = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new, eos_token_id=end, pad_token_id=end, use_cache=True
    )
    processors: list[Any] = [] if mixture is None else [mixture]
    processors += [] if rng is None else [GumbelMax(rng, prompt_ids.shape[1])]
    try:
        with student.evaluating(), student.active(), _mask_was_given():
            ids = module.generate(
                prompt_ids, attention_mask=prompt_mask.long(), generation_config=plan,
                logits_processor=LogitsProcessorList(processors),
            )  # fmt: skip
    finally:
        module.generation_config = own
    written = ids[:, prompt_ids.shape[1] :]
    ended = (written == end).long().cumsum(1)
    real = (ended - (written == end).long()) == 0  # up to the first end, and with it
    mask = torch.cat([prompt_mask.bool(), real], 1)
    return Tokens(ids, mask, torch.cat([torch.zeros_like(prompt_mask, dtype=torch.bool), real], 1))


@contextmanager
def _mask_was_given() -> Iterator[None]:
    """Within it Transformers does not ask for a mask where a text begins with its padding token, which may be the end's, too.

    `generate` drops a mask that hides nothing, and the model, which then sees none, warns of padding.
    """
    log = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "passing in an `attention_mask`" not in record.getMessage()

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)
