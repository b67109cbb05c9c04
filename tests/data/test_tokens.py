"""Token data: which tokens there are, which of them are targets, and that no mask is taken from an id."""

import logging

import pytest
import torch
from language import END, batch_of, uneven, words
from torch.testing import assert_close

from stepdistill.data.text import Example
from stepdistill.data.tokens import Row, TokenRows, Tokens, blocks, conversations, padded, rows_of, stream
from stepdistill.errors import InputError

A, B, C, D, E = range(5)  # ids of the words a, b, c, d, e
USER, BOT, STOP = 26, 27, 29
DOCUMENTS = [Example("a b c"), Example("d"), Example("e e")]


def test_documents_are_packed_with_the_end_kept_between_them() -> None:
    assert stream(DOCUMENTS, words()).tolist() == [A, B, C, STOP, D, STOP, E, E, STOP]
    rows = blocks(DOCUMENTS, words(), 4)
    assert [row.ids for row in rows.rows] == [(A, B, C, STOP), (D, STOP, E, E)]
    found = Tokens.of(batch_of(rows, [1, 0]))
    assert found.input_ids.tolist() == [[D, STOP, E, E], [A, B, C, STOP]]
    assert found.attention_mask.all() and found.loss_mask.all()
    prompted = blocks(DOCUMENTS, words(), 4, prompt=3)
    batch = batch_of(prompted, [0])
    assert batch.extra["prompt_ids"].tolist() == [[A, B, C]] and batch.extra["prompt_mask"].all()
    assert Tokens.of(batch).loss_mask.tolist() == [[False, False, False, True]]


def test_the_mask_is_shifted_with_the_labels() -> None:
    batch = batch_of(TokenRows([Row((A, B, C, D), (False, False, True, False), 2)], STOP), [0])
    labels, mask = Tokens.of(batch).targets()
    assert labels.tolist() == [[B, C, D]] and mask.tolist() == [[False, True, False]]


def test_a_completion_is_learned_with_its_end_although_padding_is_the_same_token() -> None:
    pairs = [
        Example(prompt="a b", completion="c"),
        Example(prompt="d", completion=""),
        Example(prompt="d", completion="e e e"),
    ]
    rows = conversations(pairs, words(), 8)
    found = Tokens.of(batch_of(rows, [0, 1, 2]))
    assert found.input_ids.tolist() == [[A, B, C, STOP, STOP], [D, STOP, STOP, STOP, STOP], [D, E, E, E, STOP]]
    assert found.attention_mask.sum(1).tolist() == [4, 2, 5]
    assert found.loss_mask.tolist() == [
        [False, False, True, True, False], [False, True, False, False, False], [False, True, True, True, True],
    ]  # fmt: skip


def test_prompts_are_padded_on_the_left() -> None:
    pairs = [Example(prompt="a b c", completion="d"), Example(prompt="e", completion="d")]
    batch = batch_of(conversations(pairs, words(), 8, prompts=True), [0, 1])
    assert batch.extra["prompt_ids"].tolist() == [[A, B, C], [STOP, STOP, E]]
    assert batch.extra["prompt_mask"].tolist() == [[True] * 3, [False, False, True]]
    assert "prompt_ids" not in batch_of(conversations(pairs, words(), 8), [0]).extra


def talk(*contents: str) -> Example:
    roles = ("user", "assistant")
    return Example(messages=tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents)))


def test_only_the_answers_of_a_conversation_are_learned() -> None:
    (row,) = conversations([talk("a", "b c", "d", "e")], words(template=True), 32, prompts=True).rows
    assert row.ids == (USER, A, BOT, B, C, STOP, USER, D, BOT, E, STOP)
    assert row.learned == (False, False, False, True, True, True, False, False, False, True, True)
    assert row.prompt == 9, "what the student completes is the last answer"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = words(template=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "(m.content if loop.last else 'a')")
    with pytest.raises(InputError, match="rewrites"):
        conversations([talk("b", "c", "d", "e")], tokenizer, 32)
    with pytest.raises(InputError, match="chat template"):
        conversations([talk("a", "b")], words(), 32)


def test_what_does_not_fit_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    pairs = [Example(prompt="a b c d", completion="e"), Example(prompt="a", completion="b b b b")]
    with caplog.at_level(logging.WARNING):
        rows = conversations(pairs, words(), 4)
    assert [row.ids for row in rows.rows] == [(A, B, B, B)] and "1 of 2 conversations" in caplog.text
    with pytest.raises(InputError, match="--data.block_size"):
        conversations(pairs[:1], words(), 4)
    with pytest.raises(InputError, match="--data.block_size"):
        blocks([Example("a b")], words(), 4)


def test_prompts_alone() -> None:
    rows = rows_of([Example(prompt="a b"), Example(prompt="c")], words(), 4, prompt=1)
    assert rows.prompted and not rows.completed and rows.longest_prompt == 2
    with pytest.raises(InputError, match="--data.block_size"):
        rows_of([Example(prompt="a b c d")], words(), 4, prompt=1)  # no room to answer
    with pytest.raises(InputError, match="prompts alone; give a `completion` column"):
        rows_of([Example(prompt="a b")], words(), 4)  # nothing to learn


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = words()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="end-of-text"):
        stream(DOCUMENTS, tokenizer)


def test_a_beginning_that_the_tokenizer_adds_is_kept_and_an_end_is_not() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = words(bos_token="<user>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A <end>", special_tokens=[("<user>", USER), ("<end>", STOP)]
    )
    (row,) = conversations([Example(prompt="a", completion="b")], tokenizer, 8).rows
    assert row.ids == (USER, A, B, STOP) and row.learned == (False, False, True, True)


def test_padding() -> None:
    assert padded([(1, 2), (), (3,)], 9).tolist() == [[1, 2], [9, 9], [3, 9]]
    assert padded([(True, True), (True,)], False, left=True).tolist() == [[True, True], [False, True]]
    assert padded([(1,)], 0).dtype == torch.int64 and padded([(True,)], False).dtype == torch.bool


def test_a_batch_is_a_function_of_its_indices() -> None:
    rows = uneven(prompt=3)
    whole, part = batch_of(rows, [0, 5, 2]), batch_of(rows, [5])
    length = part.extra["input_ids"].shape[1]
    assert_close(whole.extra["input_ids"][1, :length], part.extra["input_ids"][0])
    assert whole.x0 is None and whole.cond == {} and len(whole) == 3
    assert (whole.extra["input_ids"][whole.extra["attention_mask"]] == END).sum() == 3
    with pytest.raises(ValueError, match="needs tokens"):
        Tokens.of(type(whole)(None, {}, {}, whole.rng))
    with pytest.raises(InputError):
        TokenRows([], 0)
