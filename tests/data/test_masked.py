"""Masked tokens: how many, which, what stands in their place, and of what the draws are a function."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cloze import ALPHABET, BEGIN, MASK, PAD, SEPARATOR, VOCABULARY, framed, taken
from language import words
from torch.testing import assert_close
from toys import EXACT

from stepdistill.batch import Batch
from stepdistill.data.masked import Alphabet, MaskedRows, MaskedTokens, MaskingConfig, framed_blocks
from stepdistill.data.text import Example
from stepdistill.data.tokens import Row
from stepdistill.errors import InputError
from stepdistill.randomness import StepRandom

LONG = MaskedRows([Row((BEGIN, *range(4, 40), SEPARATOR), (False, *[True] * 36, False))], ALPHABET)


def many(data: MaskedRows, count: int = 2000) -> MaskedTokens:
    return MaskedTokens.of(data.batch([0] * count, StepRandom(0, 0, range(count))))


def test_each_row_has_its_quota_and_special_tokens_are_never_masked() -> None:
    data = framed()
    for step in range(20):
        found = MaskedTokens.of(taken(data, range(24), step))
        for row, chosen in zip(data.rows, found.loss_mask, strict=True):
            ordinary = sum(row.learned)
            assert int(chosen.sum()) == max(1, round(0.15 * ordinary + 1e-9)) == data.quota(row)
            assert not chosen[len(row.ids) :].any() and not (chosen[: len(row.ids)] & ~torch.tensor(row.learned)).any()
        assert torch.equal(found.input_ids[~found.loss_mask], found.labels[~found.loss_mask])
        assert found.attention_mask.sum(1).tolist() == [len(row.ids) for row in data.rows]
        assert all(found.labels[i, : len(row.ids)].tolist() == list(row.ids) for i, row in enumerate(data.rows))
        assert (found.labels[~found.attention_mask] == PAD).all()
    assert data.share == sum(data.quota(r) for r in data.rows) / sum(len(r.ids) for r in data.rows)


def test_four_fifths_are_hidden_a_tenth_is_swapped_and_every_word_is_masked_as_often() -> None:
    found = many(LONG)
    chosen = found.loss_mask
    total = int(chosen.sum())
    assert total == 2000 * 5  # 15 % of 36 words
    hidden = (found.input_ids == MASK)[chosen]
    other = (found.input_ids != found.labels)[chosen] & ~hidden
    spread = 4 * (0.25 / total) ** 0.5  # four standard deviations at most
    assert abs(float(hidden.float().mean()) - 0.8) < spread
    assert abs(float(other.float().mean()) - 0.1 * 35 / 36) < spread  # a swap may find the word itself
    per_word = chosen.float().mean(0)[1:-1]
    assert float((per_word - 5 / 36).abs().max()) < 5 * (5 / 36 * 31 / 36 / 2000) ** 0.5
    swapped = found.input_ids[chosen][other]
    counts = torch.bincount(swapped, minlength=VOCABULARY)
    assert not counts[:4].any() and (counts[4:] > 0).all(), "special tokens are no substitutes"


def test_other_shares_than_berts() -> None:
    found = many(MaskedRows(LONG.rows, ALPHABET, MaskingConfig(1.0, hidden=0.0, swapped=1.0)), 50)
    assert found.loss_mask.sum(1).eq(36).all() and not (found.input_ids == MASK).any()
    found = many(MaskedRows(LONG.rows, ALPHABET, MaskingConfig(0.5, hidden=0.0, swapped=0.0)), 50)
    assert found.loss_mask.sum(1).eq(18).all() and torch.equal(found.input_ids, found.labels)


def test_masks_are_a_function_of_seed_step_and_position_alone() -> None:
    data = framed()
    whole = taken(data, range(8)).extra
    again = taken(data, range(8)).extra
    assert_close(whole, again, **EXACT)
    for part in (range(0, 3), range(3, 8)):
        found = taken(data, part).extra
        size = found["input_ids"].shape[1]
        for name in whole:
            assert torch.equal(found[name], whole[name][part.start : part.stop, :size]), (
                "longer neighbours change nothing"
            )
    assert not torch.equal(taken(data, range(8), step=1).extra["loss_mask"], whole["loss_mask"])
    moved = taken(data, range(8), positions=range(8, 16)).extra["loss_mask"]
    assert not torch.equal(moved, whole["loss_mask"])


def test_fixed_masks_are_a_function_of_the_row() -> None:
    data = framed(fixed=0)
    whole = taken(data, range(24)).extra
    turned = taken(data, range(23, -1, -1), step=5).extra
    assert all(torch.equal(turned[name].flip(0), whole[name]) for name in whole)
    alone = taken(data, [7], step=3).extra["input_ids"][0]
    assert torch.equal(alone, whole["input_ids"][7, : len(alone)])
    elsewhere = taken(MaskedRows(data.rows[5:], ALPHABET, fixed=0), [2]).extra["input_ids"][0]
    assert torch.equal(elsewhere, alone), "not of its number in the data set"
    assert not torch.equal(taken(framed(fixed=1), range(24)).extra["loss_mask"], whole["loss_mask"])


def bert_words() -> Any:
    """A tokenizer of words a to z with four special tokens."""
    return words(cls_token="<user>", sep_token="<bot>", mask_token="<unk>")


def test_documents_become_framed_blocks() -> None:
    tokenizer = bert_words()
    begin, separator = 26, 27
    rows = framed_blocks([Example("a b c"), Example("d"), Example("e e")], tokenizer, 5)
    assert [row.ids for row in rows] == [(begin, 0, 1, 2, separator), (begin, separator, 3, separator, separator)] + [
        (begin, 4, 4, separator, separator)
    ]
    assert rows[0].learned == (False, True, True, True, False) and rows[1].learned == (False, False, True, False, False)
    assert [row.ids for row in framed_blocks([Example("a b c d")], tokenizer, 5)] == [(begin, 0, 1, 2, separator)]
    rest = framed_blocks([Example("a b c d")], tokenizer, 5, rest=True)
    assert rest[1].ids == (begin, 3, separator, separator) and rest[1].learned == (False, True, False, False)


def test_what_a_tokenizer_must_have() -> None:
    alphabet = Alphabet.of(bert_words())
    assert (alphabet.begin, alphabet.end, alphabet.mask) == (26, 27, 28)
    assert alphabet.ordinary.tolist() == list(range(26)), "no special token is a word"
    with pytest.raises(InputError, match=r"without cls_token, sep_token, mask_token.*--teacher\.path"):
        Alphabet.of(words())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"share": 0.0}, "--masking.share"), ({"share": 1.5}, "--masking.share"), ({"hidden": -0.1}, "--masking.hidden"),
        ({"swapped": 1.1}, "--masking.swapped"), ({"hidden": 0.8, "swapped": 0.3}, r"hidden \+ swapped"),
        ({"share": float("nan")}, "--masking.share"),
    ],
)  # fmt: skip
def test_shares_that_make_no_sense(change: Mapping[str, float], named: str) -> None:
    with pytest.raises(InputError, match=named):
        MaskingConfig(**change)


def test_texts_that_make_no_rows() -> None:
    tokenizer = bert_words()
    with pytest.raises(InputError, match="3 tokens or more"):
        framed_blocks([Example("a b")], tokenizer, 2)
    with pytest.raises(InputError, match=r"got 3 tokens.*--data\.block_size"):
        framed_blocks([Example("a b")], tokenizer, 9)
    with pytest.raises(InputError, match="documents"):
        framed_blocks([Example(prompt="a", completion="b")], tokenizer, 4)
    with pytest.raises(InputError, match="--data.path"):
        MaskedRows([], ALPHABET)
    with pytest.raises(ValueError, match="labels"):
        MaskedTokens.of(Batch(None, {}, {}, StepRandom(0, 0, [0]), {"input_ids": torch.ones(1, 2)}))
