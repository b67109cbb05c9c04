"""Masked language models as networks: one loss by two ways, windows, layouts, what evaluation measures."""

import math
from typing import Any

import pytest
import torch
from cloze import framed, masked_model, pupil, sage, taken
from language import FULL
from mps import on_mps
from torch.nn import functional
from torch.testing import assert_close
from toys import EXACT

from stepdistill.data.masked import MaskedRows, MaskedTokens, MaskingConfig
from stepdistill.data.text import Example
from stepdistill.errors import InputError
from stepdistill.kd import masked_evaluation
from stepdistill.kd.layouts import bert_layout, rotary_layout, train_masked_tokenizer
from stepdistill.kd.masked import MaskedLM, MaskedToken, are_factored
from stepdistill.kd.masked_evaluation import MaskedEvalConfig, MaskedExamination, score

KINDS = ("bert", "roberta", "distilbert")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TEXTS = [Example(f"the file opens a socket, reads {i} naïve 北京 lines and closes it") for i in range(40)]


@pytest.mark.parametrize("kind", KINDS)
def test_one_forward_gives_what_the_stock_model_gives(kind: str) -> None:
    model = masked_model(0, 3, kind)
    lm, tokens = MaskedLM(model), MaskedTokens.of(taken(framed(), range(4, 10)))
    assert lm.explained and (lm.depth, lm.width, lm.vocabulary) == (3, 16, 40)
    given = tokens.input_ids, tokens.attention_mask
    with torch.no_grad():
        wanted = model(input_ids=given[0], attention_mask=given[1].long(), output_hidden_states=True)
        factored, whole, states = lm.read(*given, True), lm.read(*given, False), lm.hidden_states(*given)
        assert_close(lm(*given), wanted.logits, **EXACT)
    assert_close(whole.outputs, wanted.logits, **EXACT)
    assert_close(lm.head.logits(factored.outputs), wanted.logits, **CLOSE)
    assert_close((factored.last, whole.last), (wanted.hidden_states[-1],) * 2, **EXACT)
    assert len(states) == 4
    assert_close(states, tuple(wanted.hidden_states), **EXACT)
    assert not lm.output_layer._forward_pre_hooks, "nothing is left on the module"
    places: list[int] = []
    lm.output_layer.register_forward_hook(lambda _layer, _inputs, output: places.append(output.shape[1]))
    lm.read(*given, True)
    lm.hidden_states(*given)
    lm.read(*given, False)
    assert places == [1, 1, given[0].shape[1]], "where no logits are wanted, next to none are computed"


def test_padding_beyond_the_longest_row_changes_nothing() -> None:
    for kind in KINDS:
        lm, tokens = MaskedLM(masked_model(0, 2, kind)), MaskedTokens.of(taken(framed(), [4, 9]))
        more = [functional.pad(x, (0, 3)) for x in (tokens.input_ids, tokens.attention_mask)]
        size = tokens.input_ids.shape[1]
        with torch.no_grad():
            found, wanted = lm.read(*more, True), lm.read(tokens.input_ids, tokens.attention_mask, True)
        for a, b in ((found.last, wanted.last), (found.outputs, wanted.outputs)):
            assert_close(a[:, :size][tokens.attention_mask], b[tokens.attention_mask], **CLOSE)


def test_positions_of_roberta_begin_behind_its_padding() -> None:
    assert MaskedLM(masked_model(0, 1, "bert")).window == 32
    roberta = masked_model(0, 1, "roberta", pad_token_id=1)
    assert MaskedLM(roberta).window == 33
    longest = torch.full((1, 33), 7)
    roberta(longest)  # fits
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, 34), 7))


@pytest.mark.parametrize("factored", [True, False])
def test_plain_training_is_the_cross_entropy_at_masked_words(factored: bool) -> None:
    student = pupil()
    student.explained = factored
    batch = taken(framed(), range(8))
    losses = MaskedToken(student).training_step(batch)
    tokens = MaskedTokens.of(batch)
    logits = student(tokens.input_ids, tokens.attention_mask)
    labels = tokens.labels.masked_fill(~tokens.loss_mask, -100)
    wanted = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())  # as stock models take it
    assert_close(losses.total, wanted, **CLOSE)
    assert losses.count == int(tokens.loss_mask.sum())
    found = torch.autograd.grad(losses.total, student.trainable())
    assert_close(found, torch.autograd.grad(wanted, student.trainable()), rtol=1e-4, atol=1e-6)


def test_scores_are_sums_written_out_over_masks_that_are_one_for_all() -> None:
    lm, looks = sage(layers=2), [framed(6, fixed=0), framed(6, fixed=1)]
    loss, right, count = 0.0, 0, 0
    for rows in looks:
        for i in range(6):
            tokens = MaskedTokens.of(taken(rows, [i]))
            log_q = lm(tokens.input_ids, tokens.attention_mask)[0].log_softmax(1)
            for place in tokens.loss_mask[0].nonzero()[:, 0]:
                label = tokens.labels[0, place]
                loss, right = loss - float(log_q[place, label]), right + int(log_q[place].argmax() == label)
                count += 1
    found = score(lm, looks)
    assert (found.count, found.accuracy) == (count, right / count)
    assert found.loss == pytest.approx(loss / count, rel=1e-5) and found.perplexity == pytest.approx(
        math.exp(found.loss)
    )
    turned = [MaskedRows(rows.rows[::-1], rows.alphabet, fixed=rows.fixed) for rows in looks]
    assert score(lm, turned).loss == pytest.approx(found.loss, rel=1e-6)
    lm.explained = False
    assert score(lm, looks).loss == pytest.approx(found.loss, rel=1e-5)


def test_scores_are_taken_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, looks = sage(layers=2), [framed(6, fixed=0)]
    wanted, original = score(lm, looks), masked_evaluation.logits_at
    monkeypatch.setattr(masked_evaluation, "logits_at", lambda *given: on_mps(original(*given)))
    assert score(lm, looks) == wanted


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_masked_tokenizer(TEXTS, 300, 32)


def test_a_layout_with_a_tokenizer_of_its_own(tokenizer: Any) -> None:
    text = "the naïve 北京"
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert train_masked_tokenizer(TEXTS, 300, 32).get_vocab() == tokenizer.get_vocab() and len(tokenizer) == 300
    hidden = tokenizer("the [MASK] opens", add_special_tokens=False)["input_ids"]
    assert hidden[1] == tokenizer.mask_token_id, "the mask takes the blank before it, as a word's token does"
    with pytest.raises(InputError, match=r"261 tokens.*--vocabulary"):
        train_masked_tokenizer(TEXTS, 260, 32)


@pytest.mark.parametrize("layout", [bert_layout, rotary_layout])
def test_a_layout_is_a_function_of_its_seed_without_dropout(tokenizer: Any, layout: Any) -> None:
    one, same, other = (layout(2, 32, tokenizer, 16, seed) for seed in (0, 0, 1))
    assert_close(one.state_dict(), same.state_dict(), **EXACT)
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert one.config.pad_token_id == tokenizer.pad_token_id and one.config.vocab_size == 300
    assert one.config.hidden_dropout_prob == one.config.attention_probs_dropout_prob == 0.0
    assert MaskedLM(one).is_factored and MaskedLM(one).depth == 2 and MaskedLM(one).window == 16
    with pytest.raises(InputError, match="multiple of 32"):
        layout(1, 100, tokenizer, 16, 0)


def test_rotary_positions_are_pairs_of_entries(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="even number of entries"):
        rotary_layout(1, 9, tokenizer, 16, 0, heads=3)
    ids = torch.tensor([tokenizer("the file opens")["input_ids"]])
    lm = rotary_layout(1, 32, tokenizer, 16, 0).eval()
    with torch.no_grad():
        swapped = lm(ids[:, [0, 2, 1, *range(3, ids.shape[1])]]).logits
        assert not torch.allclose(lm(ids).logits[:, 0], swapped[:, 0]), "the order of the others is seen"


def test_an_examination_reads_so_much_and_shows_guesses(tokenizer: Any) -> None:
    config, lm = MaskedEvalConfig(max_tokens=100, masks=2, samples=2), MaskedLM(bert_layout(1, 32, tokenizer, 16, 0))
    exam = MaskedExamination(TEXTS, tokenizer, 16, config, MaskingConfig())
    assert exam.tokens == 96 and len(exam.looks) == 2 and all("[MASK]" in prompt for prompt in exam.prompts)
    assert exam.prompts[0] == "the file opens a [MASK] reads 0 naïve"
    assert [look.fixed for look in exam.looks] == [0, 1], "other words are masked each time"
    assert len(exam.guesses(lm)) == 2 and exam.scores({"a": lm})["a"].count > 0
    short = MaskedExamination(TEXTS[:1], tokenizer, 32, config, MaskingConfig(), ["a [MASK] and [MASK]"])
    assert short.tokens < 32 and len(short.guesses(lm)[0].split()) <= 2
    with pytest.raises(InputError, match=r"\[MASK\] where a word.*--train\.validation_prompts"):
        MaskedExamination(TEXTS, tokenizer, 16, config, MaskingConfig(), ["no mask"])
    for change in ({"max_tokens": 2}, {"masks": 0}, {"samples": -1}):
        with pytest.raises(InputError, match=f"--eval.{next(iter(change))}"):
            MaskedEvalConfig(**change)


@pytest.mark.parametrize("kind", ["mobilebert", "deberta-v2"])
def test_heads_that_are_no_product_of_what_an_output_layer_reads_give_their_logits_whole(kind: str) -> None:
    """MobileBERT multiplies by two tables side by side, DeBERTa names the transform as its output layer."""
    options = {"deberta-v2": {"legacy": False}, "mobilebert": {"embedding_size": 8, "intra_bottleneck_size": 8}}[kind]
    model = masked_model(0, 2, kind, **options)
    lm, tokens = MaskedLM(model), MaskedTokens.of(taken(framed(), range(4, 10)))
    assert not lm.explained
    given = tokens.input_ids, tokens.attention_mask
    with torch.no_grad():
        wanted = model(input_ids=given[0], attention_mask=given[1].long()).logits
        assert_close(lm.read(*given, are_factored(lm)).outputs, wanted, **EXACT)
    loss = MaskedToken(MaskedLM(model).student(FULL)).training_step(taken(framed(), range(4, 10)))
    labels = tokens.labels[tokens.loss_mask]
    plain = functional.cross_entropy(wanted[tokens.loss_mask], labels)
    assert_close(loss.terms["cross_entropy"].detach(), plain, **CLOSE)
