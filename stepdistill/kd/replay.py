"""Texts that a student wrote earlier, first in, first out (DistiLLM, arXiv 2402.03898, section 3.2).

A text is a row of integers, [length of its prompt, length of it all, its tokens, zeros], without the padding that it was
written in, so that it is the same text wherever in a batch, on whatever process and beside whatever others it was written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.tokens import Tokens
from ..randomness import StepRandom

HEAD = 2  # numbers before the tokens


def packed(tokens: Tokens, width: int) -> Tensor:
    """[B, 2 + width] int64 of tokens [B, S], padded on either side, of which `width` or fewer are real."""
    order = torch.argsort((~tokens.attention_mask).long(), dim=1, stable=True)  # the real ones first, as they stood
    lengths = tokens.attention_mask.sum(1)
    ids = tokens.input_ids.gather(1, order)[:, :width]
    places = torch.arange(ids.shape[1], device=ids.device)
    ids = torch.where(places < lengths[:, None], ids, 0)
    ids = torch.nn.functional.pad(ids, (0, width - ids.shape[1]))
    return torch.cat([torch.stack([lengths - tokens.loss_mask.sum(1), lengths], 1), ids], 1)


def unpacked(rows: Tensor, pad: int) -> Tokens:
    """The tokens of :func:`packed` rows, padded on the right with `pad`; all after the prompts are targets."""
    prompts, lengths = rows[:, :1], rows[:, 1:HEAD]
    ids = rows[:, HEAD : HEAD + int(lengths.max())]
    places = torch.arange(ids.shape[1], device=rows.device)
    real = places < lengths
    return Tokens(torch.where(real, ids, pad), real, real & (places >= prompts))


class Replay:
    """The last `capacity` texts, on the CPU.

    Args:
        capacity: how many.
        width: the most tokens of one.
    """

    def __init__(self, capacity: int, width: int) -> None:
        self.capacity, self.width = capacity, width
        self.rows = torch.zeros(0, HEAD + width, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_full(self) -> bool:
        """Whether the next text pushes the oldest one out."""
        return len(self) >= self.capacity

    def push(self, rows: Tensor) -> None:
        """Takes packed rows in, the oldest first."""
        self.rows = torch.cat([self.rows, rows.cpu()])[-self.capacity :]

    def draw(self, rng: StepRandom) -> Tensor:
        """Packed rows, one for each sample of `rng`; none twice in a global batch while there are enough.

        All processes and micro-batches look at one shuffling, in which a sample's position is its place.
        """
        shuffled = StepRandom(rng.seed, rng.step, range(len(self))).uniform("replay").argsort()
        return self.rows[shuffled[[p % len(self) for p in rng.positions]]]
