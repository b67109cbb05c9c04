"""More texts of a task, made of its own (TinyBERT, arXiv 1909.10351, algorithm 1): words replaced by a masked model's guesses.

The paper replaces words that are cut into several pieces by their neighbours in GloVe; here those stay as they are. The losses
of TinyBERT look at no labels, so a text whose class has changed on the way harms nothing: the teacher says what it is now.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.labelled_text import Labelled, TextRow, TextRows, text_rows
from ..errors import InputError
from ..randomness import generator
from .masked import MaskedLM
from .masked_evaluation import logits_at

BATCH = 32  # masked copies of a text at once


@dataclass
class AugmentConfig:
    """Words replaced.

    Attributes:
        copies: N_a, how many are made of each text; 0 for none.
        share: p_t, of the words, how many are replaced.
        candidates: K, likeliest words of which one is drawn.
    """

    copies: int = 0
    share: float = 0.4
    candidates: int = 15

    def __post_init__(self) -> None:
        if self.copies < 0:
            raise InputError(f"expected copies >= 0, got {self.copies}; fix --augment.copies")
        if not 0.0 < self.share <= 1.0:
            raise InputError(f"expected a share in (0, 1], got {self.share}; fix --augment.share")
        if self.candidates < 1:
            raise InputError(f"expected candidates >= 1, got {self.candidates}; fix --augment.candidates")


def augmented(
    config: AugmentConfig, part: Labelled, masked: MaskedLM, tokenizer: Any, length: int, seed: int
) -> TextRows:
    """The texts and `copies` more of each, a function of (seed, text number, copy); labels are those of the originals.

    Args:
        masked: the pre-trained teacher, which guesses.
        length: the most tokens of a text.
    """
    plain = text_rows(part, tokenizer, length)
    if not config.copies:
        return plain
    if not tokenizer.is_fast:
        raise InputError("expected a tokenizer that tells words from pieces, got a slow one; give --augment.copies 0")
    rows = list(plain.rows)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    for number, row in enumerate(plain.rows):
        whole = _whole_words(part.pairs[number][0], tokenizer, length)
        draws = [generator(seed, "augment", number, copy) for copy in range(config.copies)]
        replaced = [[i for i, u in zip(whole, g.random(len(whole)), strict=True) if u <= config.share] for g in draws]
        guesses = _guesses(
            row.ids, sorted({i for places in replaced for i in places}), config, masked, tokenizer, special
        )
        for g, places in zip(draws, replaced, strict=True):
            ids = list(row.ids)
            for place in places:
                ids[place] = guesses[place][int(g.integers(len(guesses[place])))]
            rows.append(TextRow(tuple(ids), row.label))
    return TextRows(rows, plain.pad)


def _whole_words(text: str, tokenizer: Any, length: int) -> list[int]:
    """Places of tokens that are a word each (algorithm 1, line 5: single-piece words)."""
    words = tokenizer(text, truncation=True, max_length=length).word_ids()
    pieces = Counter(words)
    return [i for i, word in enumerate(words) if word is not None and pieces[word] == 1]


def _guesses(
    ids: tuple[int, ...], places: list[int], config: AugmentConfig, masked: MaskedLM, tokenizer: Any, special: Tensor
) -> dict[int, list[int]]:
    """place -> the K likeliest ordinary tokens where that place alone is masked (line 7)."""
    device = next(masked.module.parameters()).device
    found: dict[int, list[int]] = {}
    with masked.evaluating():
        for start in range(0, len(places), BATCH):
            here = torch.tensor(places[start : start + BATCH])
            rows = torch.arange(len(here))
            given = torch.tensor([ids]).repeat(len(here), 1)
            given[rows, here] = tokenizer.mask_token_id
            given = given.to(device)
            looked_at = torch.zeros_like(given, dtype=torch.bool)
            looked_at[rows, here] = True
            logits = logits_at(masked, given, torch.ones_like(looked_at), looked_at).cpu()
            logits[:, special] = -torch.inf
            likeliest = logits.topk(min(config.candidates, logits.shape[1] - len(special)), 1).indices
            found.update(zip(here.tolist(), likeliest.tolist(), strict=True))
    return found
