"""What is told of a language model: perplexities worked out by hand, every token counted once, a divergence by enumeration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from language import FULL, batch_of, built, gpt2, student, uneven, words
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.data.text import Example
from stepdistill.data.tokens import Row, TokenRows, Tokens, stream, windows
from stepdistill.errors import InputError
from stepdistill.kd import evaluation
from stepdistill.kd.evaluation import EvalConfig, Examination, _first, gap_closed, own_text_divergence, perplexity
from stepdistill.kd.networks import CausalLM, TransformersNetwork
from stepdistill.kd.rollouts import generate
from stepdistill.randomness import StepRandom

TEXT = "a b a c b b a a c a b"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Bigram(nn.Module):
    """Logits [V, V] of the next token by the last one."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits[ids]


class Model(TransformersNetwork):
    """It, where a language model is expected."""

    is_factored, window = False, None

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.net(ids)


def bigram(probabilities: Any) -> Any:
    return Model(Bigram(torch.as_tensor(probabilities, dtype=torch.float32).log()))


def learned(*rows: tuple[int, ...]) -> TokenRows:
    """Rows of which all tokens are targets, where there is something before them."""
    return TokenRows([Row(row, (True,) * len(row)) for row in rows], 0)


def documents(length: int) -> list[Example]:
    """A stream of `length` tokens, the last the end of the text."""
    return [Example(" ".join(LETTERS[i * 7 % 26] for i in range(length - 1)))]


# -- perplexity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [2, 17, 300])
def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(entries: int) -> None:
    knows_nothing = bigram(torch.full((entries, entries), 1.0))  # logits of 0: weights need not sum to 1
    assert perplexity(knows_nothing, learned((0, 1, 1), (1, 0))) == pytest.approx(entries, rel=1e-6)


def test_a_perplexity_worked_out_by_hand() -> None:
    model = bigram([[1 / 4, 1 / 2, 1 / 4], [1 / 8, 3 / 8, 1 / 2], [1 / 3, 1 / 3, 1 / 3]])
    # 0 -> 1: 1/2, 1 -> 0: 1/8, 0 -> 0: 1/4; the first token is nobody's target
    assert perplexity(model, learned((0, 1, 0, 0))) == pytest.approx(64 ** (1 / 3), rel=1e-6)
    # and a row of one target more, 1 -> 2: 1/2; a mean over tokens and not over rows
    assert perplexity(model, learned((0, 1, 0, 0), (1, 2))) == pytest.approx(128 ** (1 / 4), rel=1e-6)
    masked = TokenRows([Row((0, 1, 0, 0), (True, False, True, False))], 0)
    assert perplexity(model, masked) == pytest.approx(8.0, rel=1e-6), "1 -> 0 is the only target"


def test_what_is_certain_and_what_is_impossible() -> None:
    ones = torch.eye(2).clamp(min=1e-30)
    assert perplexity(bigram(ones), learned((0, 0, 0))) == pytest.approx(1.0, abs=1e-6)
    never = Model(Bigram(torch.tensor([[0.0, -1e4], [0.0, 0.0]])))
    assert perplexity(never, learned((0, 1))) == math.exp(700.0), "a number still"  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 5, 24, 100])
def test_the_batch_changes_nothing_and_the_mode_stays(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    lm, rows = student(attn_pdrop=0.5, resid_pdrop=0.5), uneven()
    assert len(rows) == 24
    lm.module.transformer.h[0].eval()  # a part in a mode of its own
    wanted = perplexity(lm, rows)
    monkeypatch.setattr(evaluation, "BATCH", size)
    assert perplexity(lm, rows) == pytest.approx(wanted, rel=1e-6)
    assert lm.module.training and not lm.module.transformer.h[0].training
    assert all(p.grad is None for p in lm.module.parameters())


def test_it_is_the_stock_models_own_loss() -> None:
    lm = student()
    ids = torch.tensor([[1, 7, 3, 9, 2, 2, 5]])
    wanted = gpt2(1)(ids, labels=ids).loss.item()
    assert math.log(perplexity(lm, learned(tuple(ids[0].tolist())))) == pytest.approx(wanted, rel=1e-5)


# -- windows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_every_token_but_the_first_is_a_target_once_with_enough_before_it(size: int) -> None:
    for stride in range(1, size):
        for length in range(2, 3 * size + 3):
            texts = documents(length)
            ids = stream(texts, words()).tolist()
            assert len(ids) == length
            rows = windows(texts, words(), size, stride).rows
            counted, start = [0] * length, 0
            for number, row in enumerate(rows):
                assert list(row.ids) == ids[start : start + size], "windows of one stream, each by `stride` further"
                assert len(row.ids) == size or row is rows[-1]
                places = [place for place, target in enumerate(row.learned) if target]
                assert places, "a window without a target is read for nothing"
                for place in places:
                    counted[start + place] += 1
                    assert place >= (size - stride if number else 1), "tokens before it"
                assert places == list(range(places[0], len(row.ids))), "the last ones"
                start += stride
            assert counted == [0] + [1] * (length - 1), (size, stride, length)


def test_the_strides_that_there_are_and_what_is_read() -> None:
    for stride in (0, 4, -1):
        with pytest.raises(InputError, match=r"\[1, 3\].*--eval.stride"):
            windows(documents(9), words(), 4, stride)
    assert [len(row.ids) for row in windows(documents(9), words(), 4, 3, most=6).rows] == [4, 3]
    assert windows(documents(9), words(), 4, 3, most=100).rows == windows(documents(9), words(), 4, 3).rows
    for texts, most in (([Example("")], None), (documents(9), 1), ([], None)):
        with pytest.raises(InputError, match="2 tokens or more"):
            windows(texts, words(), 4, 3, most)
    assert windows(documents(9), words(), 4, 3).pad == words().eos_token_id


def test_a_window_does_not_matter_to_a_model_of_one_token_and_does_to_others() -> None:
    draws = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    last, more = Model(Bigram(draws)), CausalLM(gpt2(3, vocabulary=30, bos_token_id=29, eos_token_id=29)).student(FULL)
    ids = stream([Example(TEXT)], words())
    wanted = float(-draws.log_softmax(1)[ids[:-1], ids[1:]].mean())
    found = []
    for stride in range(1, 6):
        rows = windows([Example(TEXT)], words(), 6, stride)
        assert math.log(perplexity(last, rows)) == pytest.approx(wanted, rel=1e-6)  # type: ignore[arg-type]
        found.append(math.log(perplexity(more, rows)))
        assert found[-1] == pytest.approx(by_hand(more, ids, 6, stride), rel=1e-5)
    assert max(found) - min(found) > 1e-4, "another stride is another number"


def by_hand(lm: CausalLM, ids: Tensor, size: int, stride: int) -> float:
    """The mean negative log-probability, one token at a time, each in the first window that reaches it."""
    total = 0.0
    for place in range(1, len(ids)):
        start = stride * max(0, math.ceil((place - size + 1) / stride))
        given = ids[None, start:place]
        with lm.evaluating():
            total -= float(lm(given, torch.ones_like(given).bool())[0, -1].log_softmax(0)[ids[place]])
    return total / (len(ids) - 1)


# -- the gap ---------------------------------------------------------------------------------------------------------------


def test_the_share_of_a_gap() -> None:
    assert gap_closed(30.0, 25.0, 20.0) == 0.5
    assert gap_closed(30.0, 30.0, 20.0) == 0.0 and gap_closed(30.0, 20.0, 20.0) == 1.0
    assert gap_closed(30.0, 40.0, 20.0) == -1.0 and gap_closed(30.0, 15.0, 20.0) == 1.5
    for control, teacher in ((20.0, 20.0), (20.0, 30.0), (20.0, math.nan), (math.nan, 20.0), (20.0, math.inf)):
        assert math.isnan(gap_closed(control, 25.0, teacher)), (control, teacher)
    assert math.isnan(gap_closed(30.0, math.nan, 20.0))


# -- what a student writes -------------------------------------------------------------------------------------------------

V, END = 5, 4


def writing_bigram(seed: int) -> CausalLM:
    """A GPT-2 without layers or positions, which can write: its next token depends on the last alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=V, n_positions=16, n_embd=8, n_layer=0, n_head=1, bos_token_id=END, eos_token_id=END,
        pad_token_id=END, initializer_range=0.5, tie_word_embeddings=False, embd_pdrop=0.0,
    )  # fmt: skip
    lm = CausalLM(built(seed, lambda: GPT2LMHeadModel(config)))
    lm.module.transformer.wpe.weight.data.zero_()
    return lm


def table(lm: CausalLM) -> Tensor:
    """[V, V] log-probabilities."""
    ids = torch.arange(V)[:, None]
    with lm.evaluating():
        return lm(ids, torch.ones_like(ids).bool())[:, 0].log_softmax(-1)


def prompted(count: int) -> TokenRows:
    """Prompts of one or two tokens that end with 0 or 1, in turns; what follows in the data is not to be read."""
    rows = [Row((*((2, i % 2) if i % 3 else (i % 2,)), 3, 3), (False, False, True, True)[: 4 if i % 3 else 3],
                2 if i % 3 else 1) for i in range(count)]  # fmt: skip
    return TokenRows(rows, END)


def expected(log_q: Tensor, log_p: Tensor, new: int) -> float:
    """KL(q || p) a token over all that q writes after 0 or 1, by the chain of last tokens: END is the last of a text."""
    each = (log_q.exp() * (log_q - log_p)).sum(1)
    now = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])
    total = count = 0.0
    for _ in range(new):
        total, count = total + float(now @ each), count + float(now.sum())
        now = now @ log_q.exp()
        now[END] = 0.0
    return total / count


def test_the_divergence_on_a_students_own_text_is_the_enumerated_one() -> None:
    pupil, teacher = writing_bigram(1), writing_bigram(2)
    log_q, log_p = table(pupil), table(teacher)
    wanted, other = expected(log_q, log_p, 3), expected(log_p, log_q, 3)
    assert wanted > 0.1 and abs(wanted - other) > 0.05, "the two directions differ"
    many = own_text_divergence(pupil, teacher, prompted(2000), 3, END, most=2000)
    assert many == pytest.approx(wanted, rel=0.05)
    assert own_text_divergence(pupil, pupil, prompted(20), 3, END) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("count", "most"), [(40, 25), (40, 64), (5, 16)])
def test_it_is_the_mean_over_the_tokens_of_the_first_rows(count: int, most: int) -> None:
    pupil, teacher = writing_bigram(1).student(FULL), writing_bigram(2)
    each = (table(pupil).exp() * (table(pupil) - table(teacher))).sum(1)
    batch, chosen = batch_of(prompted(count), range(min(count, most))), range(min(count, most))
    text = generate(pupil, batch.extra["prompt_ids"], batch.extra["prompt_mask"], 3, END, StepRandom(0, 0, chosen))
    before = text.input_ids[:, :-1][text.loss_mask[:, 1:]]  # the tokens after which something was written
    found = own_text_divergence(pupil, teacher, prompted(count), 3, END, most)
    assert found == pytest.approx(float(each[before].mean()), rel=1e-5)
    assert pupil.module.training and all(p.grad is None for p in pupil.module.parameters())


# -- what is measured ------------------------------------------------------------------------------------------------------


def answers(*targets: int) -> TokenRows:
    return TokenRows([Row((7,) * (n + 1), (False,) + (True,) * n) for n in targets], 0)


@pytest.mark.parametrize(
    ("targets", "most", "kept"),
    [((3, 2, 4), 9, 3), ((3, 2, 4), 8, 2), ((3, 2, 4), 5, 2), ((3, 2, 4), 4, 1), ((3, 2, 4), 1, 1), ((3, 9, 1), 4, 1)],
)
def test_as_many_answers_as_fit_and_one_at_least(targets: tuple[int, ...], most: int, kept: int) -> None:
    rows = answers(*targets)
    assert _first(rows, most) == rows.rows[:kept]


def test_an_examination_says_what_it_counts() -> None:
    texts = [Example(TEXT), Example("d e")]
    exam = Examination.of(texts, words(), 6, EvalConfig(samples=1))
    assert exam.stride == 3 and exam.tokens == len(stream(texts, words())) - 1
    assert exam.prompts == ["a b a c b b a a"]
    exam = Examination.of(texts, words(), 6, EvalConfig(stride=5, max_tokens=9))
    assert exam.tokens == 8 and exam.stride == 5
    whole = Examination(learned((0, 1, 1), (1, 0)), words(), EvalConfig(), [], None)
    assert whole.tokens == 3, "the first of a row has nothing before it, whatever its mask says"
    pairs = [Example(prompt="a", completion="b c"), Example(prompt="b", completion="d")]
    exam = Examination.of(pairs, words(), 6, EvalConfig(max_tokens=4))
    assert exam.rows is not None and len(exam.rows) == 1 and exam.tokens == 3 and exam.stride is None
    alone = Examination.of([Example(prompt="a")], words(), 6, EvalConfig())
    assert alone.rows is None and alone.tokens == 0 and alone.perplexities({"any": student()}) == {}


def test_perplexities_are_of_the_same_rows() -> None:
    exam = Examination.of([Example(TEXT)], words(), 6, EvalConfig())
    models = {"one": bigram(torch.full((30, 30), 1.0)), "other": bigram(torch.eye(30) + 1.0)}
    found = exam.perplexities(models)
    assert list(found) == ["one", "other"] and found["one"] == pytest.approx(30.0, rel=1e-6)
    assert exam.rows is not None and found["other"] == perplexity(models["other"], exam.rows)
    labels, mask = Tokens.of(batch_of(exam.rows, range(len(exam.rows)))).targets()
    assert_close(labels[mask], stream([Example(TEXT)], words())[1:])
