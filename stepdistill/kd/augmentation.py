"""More texts of a task, made of its own (TinyBERT, arXiv 1909.10351, algorithm 1): words replaced by a masked model's guesses.

The paper replaces words that are cut into several pieces by their neighbours in GloVe; here those stay as they are, and guesses
are whole words. The losses of TinyBERT look at no labels, so a text whose class has changed on the way harms nothing: the
teacher says what it is now. A real teacher takes long over it: what is made is kept, and made by all processes together.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..data.cache import ShardStore
from ..data.filling import Made, Maker, fill
from ..data.labelled_text import Labelled, TextRow, TextRows, text_rows
from ..errors import InputError
from ..randomness import generator
from .masked import MaskedLM
from .masked_evaluation import logits_at

FORMAT = 1  # to be raised whenever the same texts would be replaced by others
BATCH = 32  # masked copies of a text at once
SHARD = 256  # texts of which the copies are kept together; what a kill can cost
UNUSED = re.compile(r"\[unused\d+\]|<unused_?\d+>|madeupword\d+")  # BERT's, T5's and Gemma's, RoBERTa's
MARKS = ("\u0120", "\u2581")  # of tokens that begin a word: byte-level BPE's, SentencePiece's


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


@dataclass(frozen=True)
class Kept:
    """Where copies are kept, and by whom they are made.

    Attributes:
        folder: copies of other texts, options or teachers may lie in it, too.
        hashed: of the model that guesses, what it is known by.
        rank, world: this process's number, and how many there are.
        wait: a barrier over all processes.
    """

    folder: Path
    hashed: Callable[[MaskedLM], Mapping[str, str]]
    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None


def check_words(config: AugmentConfig, tokenizer: Any, masked: MaskedLM) -> None:
    """InputError for a tokenizer whose words can't be replaced, where they are to be; to be asked before anything trains."""
    if config.copies:
        whole_words(tokenizer, masked.vocabulary)


def augmented(
    config: AugmentConfig, part: Labelled, masked: MaskedLM, tokenizer: Any, length: int, seed: int,
    kept: Kept | None = None,
) -> TextRows:  # fmt: skip
    """The texts and `copies` more of each, a function of (seed, text number, copy); labels are those of the originals.

    Args:
        masked: the pre-trained teacher, which guesses.
        length: the most tokens of a text.
        kept: copies that are there are read, what is missing is made and stays; without it they are made each time.
    """
    plain = text_rows(part, tokenizer, length)
    if not config.copies:
        return plain
    copies = Copies(config, part, plain, masked, tokenizer, length, seed)
    if kept is None:
        tensors = [copies.make(range(len(part.pairs))).tensors]
    else:
        about = {**copies.about(), "teacher": dict(kept.hashed(masked))}
        name = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=12).hexdigest()
        store = ShardStore(kept.folder / name, about, "cache of texts with words replaced", "--output_dir")
        fill(store, [copies], kept.rank, kept.world, kept.wait)
        tensors = [load_file(store.path(shard)) for shard in copies.names()]
    made = (ids for shard in tensors for ids in _rows(shard))
    labels = (row.label for row in plain.rows for _ in range(config.copies))
    return TextRows([*plain.rows, *(TextRow(ids, label) for ids, label in zip(made, labels, strict=True))], plain.pad)


def _rows(shard: Mapping[str, Tensor]) -> Iterator[tuple[int, ...]]:
    return (tuple(ids.tolist()) for ids in shard["ids"].split(shard["lengths"].tolist()))


class Copies(Maker):
    """Makes the copies of some texts.

    Args:
        plain: the texts' tokens.
        others: as of :func:`augmented`.

    Raises InputError for a tokenizer that does not tell words from pieces, and a vocabulary without words.
    """

    kind, what, shard = "texts", "texts with words replaced", SHARD

    def __init__(
        self, config: AugmentConfig, part: Labelled, plain: TextRows, masked: MaskedLM, tokenizer: Any, length: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.config, self.part, self.plain, self.masked = config, part, plain, masked
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.items, self.bad = len(part.pairs), list[str]()
        self.words = whole_words(tokenizer, masked.vocabulary)

    def about(self) -> dict[str, Any]:
        """All that decides the copies but the model's weights."""
        read = [[text, label, row.ids] for (text, label), row in zip(self.part.pairs, self.plain.rows, strict=True)]
        known = sorted(self.tokenizer.get_vocab().items()), self.words.nonzero()[:, 0].tolist()
        texts, words = (hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in (read, known))
        options = {**vars(self.config), "length": self.length, "seed": self.seed}
        return {"format": FORMAT, "shard": self.shard, "options": options, "texts": texts, "tokenizer": words}

    def make(self, items: range) -> Made:
        rows = [torch.tensor(ids, dtype=torch.int32) for number in items for ids in self._copies(number)]
        lengths = torch.tensor([len(ids) for ids in rows], dtype=torch.int32)
        return Made({"ids": torch.cat(rows), "lengths": lengths}, len(rows))

    def _copies(self, number: int) -> Iterator[list[int]]:
        """Of one text (algorithm 1)."""
        config, original = self.config, self.plain.rows[number].ids
        whole = _whole(self.part.pairs[number][0], self.tokenizer, self.length)
        draws = [generator(self.seed, "augment", number, copy) for copy in range(config.copies)]
        replaced = [[i for i, u in zip(whole, g.random(len(whole)), strict=True) if u <= config.share] for g in draws]
        guesses = self._guesses(original, sorted({i for places in replaced for i in places}))
        for g, places in zip(draws, replaced, strict=True):
            ids = list(original)
            for place in places:
                ids[place] = guesses[place][int(g.integers(len(guesses[place])))]
            yield ids

    def _guesses(self, ids: tuple[int, ...], places: list[int]) -> dict[int, list[int]]:
        """place -> the K likeliest whole words where that place alone is masked (line 7)."""
        device = next(self.masked.module.parameters()).device
        found: dict[int, list[int]] = {}
        with self.masked.evaluating():
            for start in range(0, len(places), BATCH):
                here = torch.tensor(places[start : start + BATCH])
                rows = torch.arange(len(here))
                given = torch.tensor([ids]).repeat(len(here), 1)
                given[rows, here] = self.tokenizer.mask_token_id
                given = given.to(device)
                looked_at = torch.zeros_like(given, dtype=torch.bool)
                looked_at[rows, here] = True
                logits = logits_at(self.masked, given, torch.ones_like(looked_at), looked_at).cpu()
                logits[:, ~self.words] = -torch.inf
                likeliest = logits.topk(min(self.config.candidates, int(self.words.sum())), 1).indices
                found.update(zip(here.tolist(), likeliest.tolist(), strict=True))
        return found


def _whole(text: str, tokenizer: Any, length: int) -> list[int]:
    """Places of tokens that are a word each (algorithm 1, line 5: single-piece words)."""
    words = tokenizer(text, truncation=True, max_length=length).word_ids()
    pieces = Counter(words)
    return [i for i, word in enumerate(words) if word is not None and pieces[word] == 1]


def whole_words(tokenizer: Any, entries: int) -> Tensor:
    """[entries] bool: which tokens are a word by themselves.

    Not those that go on with one (`##ing` of WordPiece; those without the mark of a beginning, where a vocabulary has one), nor
    special and unused ones, nor entries of a padded table that are no token at all. InputError where none is left, and for a
    tokenizer that does not tell words from pieces.
    """
    if not tokenizer.is_fast:
        raise InputError("expected a tokenizer that tells words from pieces, got a slow one; give --augment.copies 0")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    inside, last = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    known = {token: number for token, number in tokenizer.get_vocab().items() if number < entries}
    marked = model.get("type") in ("BPE", "Unigram") and any(t[0] in MARKS and len(t) > 1 for t in known if t)
    no_words = {*tokenizer.all_special_ids, *(n for n, t in tokenizer.added_tokens_decoder.items() if t.special)}

    def is_word(token: str) -> bool:
        if UNUSED.fullmatch(token) or (inside and token.startswith(inside)):
            return False
        if marked:
            return token[:1] in MARKS and len(token) > 1
        return token.endswith(last) if last else bool(token)

    words = torch.zeros(entries, dtype=torch.bool)
    words[[number for token, number in known.items() if number not in no_words and is_word(token)]] = True
    if not words.any():
        raise InputError(
            "expected a vocabulary with whole words to replace others with, got pieces alone; give --augment.copies 0"
        )
    return words
