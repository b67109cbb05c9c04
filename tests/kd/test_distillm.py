"""DistiLLM: the threshold and the buffer by hand, who writes how often, and that the loop's splits change nothing."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from language import END, FULL, batch_of, gpt2, student, teacher, uneven
from torch import Tensor
from torch.testing import assert_close
from toys import EXACT, Killed, options, rows, same, saved, stopping_after

from stepdistill.batch import Batch
from stepdistill.data.gathering import from_all
from stepdistill.data.tokens import Row, TokenRows, Tokens
from stepdistill.errors import InputError
from stepdistill.kd.distillm import DistiLLM, DistiLLMConfig, Scheduler
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.evaluation import mean_nll, perplexity
from stepdistill.kd.language_model import token_loss
from stepdistill.kd.networks import CausalLM
from stepdistill.kd.reduction import Objective
from stepdistill.kd.replay import Replay, packed, unpacked
from stepdistill.kd.rollouts import generate
from stepdistill.randomness import StepRandom
from stepdistill.training.trainer import Trainer

NEW, STEPS = 6, 8
HELD_OUT = uneven(count=10, prompt=2)
# many kinds of steps in few of them
BUSY: dict[str, Any] = {"threshold": 0.7, "capacity": 12, "validate_every": 2, "tolerance": -10.0}


def method(seed: int = 1, pupil: CausalLM | None = None, steps: int = STEPS, **changes: Any) -> DistiLLM:
    config = DistiLLMConfig(**{"max_new_tokens": NEW, **changes})
    return DistiLLM(config, pupil or student(seed), teacher(), uneven(prompt=4), HELD_OUT, END, steps)


# -- the threshold ---------------------------------------------------------------------------------------------------------


def test_the_threshold_by_hand() -> None:
    """It rises where the loss is 0.1 above that of the last rise, or the first one."""
    one = Scheduler(0.0, None, step=0.1, tolerance=0.1)
    trace = []
    for loss in (2.0, 2.05, 2.125, 2.2, 2.25, 1.0, 1.125, 2.5, 3.0, 3.0):
        one.see(loss)
        trace.append((round(one.phi, 6), one.last))
    assert trace == [
        (0.0, 2.0), (0.0, 2.0), (0.1, 2.125), (0.1, 2.125), (0.2, 2.25), (0.2, 2.25), (0.2, 2.25), (0.3, 2.5), (0.4, 3.0),
        (0.4, 3.0),
    ]  # fmt: skip
    lost = Scheduler(0.0, None, step=0.1, tolerance=0.1)
    for loss in (math.nan, 2.0, 2.5):
        lost.see(loss)
    assert (lost.phi, lost.last) == (0.1, 2.5), "a first loss that is no number does not stay"
    exactly = Scheduler(0.95, 1.0, step=0.1, tolerance=0.5)
    exactly.see(1.5)
    assert (exactly.phi, exactly.last) == (1.0, 1.5), "at the tolerance too, and never above 1"


@pytest.mark.parametrize(
    ("r", "progress", "full", "wanted"),
    [
        (0.39, 0.0, True, "student"), (0.41, 0.0, True, "data"), (0.41, 0.0, False, "data"),
        (0.09, 0.75, True, "student"), (0.11, 0.75, True, "replay"), (0.39, 0.75, True, "replay"),
        (0.11, 0.75, False, "student"), (0.39, 0.75, False, "student"), (0.41, 0.75, False, "data"),
        (0.0, 1.0, True, "replay"), (0.0, 1.0, False, "student"), (0.4, 0.0, True, "data"), (0.1, 0.75, True, "replay"),
    ],
)  # fmt: skip
def test_who_writes_by_hand(r: float, progress: float, full: bool, wanted: str) -> None:
    """phi = 0.4; after three quarters of the run 0.1 of it is written anew, once the buffer is full."""
    assert Scheduler(0.4, 2.0, 0.1, 0.1).source(r, progress, full) == wanted
    assert Scheduler(0.0, 2.0, 0.1, 0.1).source(r, progress, full) == "data"


def test_who_writes_how_often() -> None:
    """Within four times the noise of 1600 draws."""
    one, count = method(threshold=0.6, capacity=1), 1600
    one.scheduler.last, one.done = 0.0, STEPS // 4 - 1  # a quarter of the run
    for full in (False, True):
        if full:
            one.replay.push(torch.ones(1, 2 + one.replay.width, dtype=torch.int64))
        found = [one.source(Batch(None, {}, {}, StepRandom(0, s, [0]))) for s in range(count)]
        shares = {"student": 0.45, "replay": 0.15} if full else {"student": 0.6, "replay": 0.0}
        for name, share in {**shares, "data": 0.4}.items():
            assert abs(found.count(name) / count - share) < 0.05, (full, name)  # type: ignore[arg-type]


# -- the buffer ------------------------------------------------------------------------------------------------------------


def text(number: int, length: int = 4, prompt: int = 1, width: int = 6) -> Tensor:
    row = [prompt, length, *([number] * length), *([0] * (width - length))]
    return torch.tensor([row])


def test_first_in_first_out_by_hand() -> None:
    replay = Replay(3, width=6)
    trace = []
    for numbers in ([1], [2, 3], [4], [5, 6], [7, 8, 9, 10]):
        replay.push(torch.cat([text(n) for n in numbers]))
        trace.append((replay.rows[:, 2].tolist(), replay.is_full))
    assert trace == [([1], False), ([1, 2, 3], True), ([2, 3, 4], True), ([4, 5, 6], True), ([8, 9, 10], True)]


def test_draws_are_without_repetition_and_by_the_place_in_the_global_batch() -> None:
    replay = Replay(20, width=6)
    replay.push(torch.cat([text(n) for n in range(20)]))
    whole = replay.draw(StepRandom(3, 1, range(8)))[:, 2].tolist()
    assert len(set(whole)) == 8 and whole != sorted(whole)
    assert replay.draw(StepRandom(3, 1, range(4, 8)))[:, 2].tolist() == whole[4:]
    assert replay.draw(StepRandom(3, 2, range(8)))[:, 2].tolist() != whole
    counts = torch.bincount(
        torch.cat([replay.draw(StepRandom(3, s, range(8)))[:, 2] for s in range(250)]), minlength=20
    )
    assert counts.min() > 60 and counts.max() < 140, "each as often: 100 times"
    few = Replay(3, width=6)
    few.push(torch.cat([text(n) for n in range(3)]))
    assert sorted(few.draw(StepRandom(3, 1, range(6)))[:, 2].tolist()) == [0, 0, 1, 1, 2, 2]


def test_a_text_is_kept_without_the_padding_it_was_written_in() -> None:
    ids = torch.tensor([[9, 9, 5, 6, END, 9], [4, 5, 6, 7, 8, 3]])
    attention = torch.tensor([[0, 0, 1, 1, 1, 0], [1] * 6]).bool()
    loss = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]).bool()
    rows = packed(Tokens(ids, attention, loss), 7)
    assert rows.tolist() == [[1, 3, 5, 6, END, 0, 0, 0, 0], [4, 6, 4, 5, 6, 7, 8, 3, 0]]
    back = unpacked(rows, END)
    assert back.input_ids.tolist() == [[5, 6, END, END, END, END], [4, 5, 6, 7, 8, 3]]
    assert back.attention_mask.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    assert back.loss_mask.tolist() == [[False, True, True, False, False, False], [False] * 4 + [True] * 2]
    assert_close(packed(back, 7), rows, **EXACT)
    assert packed(Tokens(*(x[:1, 1:] for x in (ids, attention, loss))), 3).tolist() == [[1, 3, 5, 6, END]], "cut to it"


def test_alone_a_process_has_what_all_have() -> None:
    rows = torch.arange(6).view(3, 2)
    assert from_all(rows) is rows


# -- the method ------------------------------------------------------------------------------------------------------------


def test_a_step_of_each_kind() -> None:
    """Data with a cross-entropy; new text and old text of the student without."""
    one, batch = method(ce_weight=0.5, capacity=6, threshold=1.0), batch_of(uneven(prompt=4), range(6))
    skew, own = Divergence("skew_kl", alpha=0.1), Objective(Divergence("skew_kl", alpha=0.1))
    kinds = {"written": (1.0, 0.0), "replayed": (0.0, 1.0), "data": (0.0, 0.0)}

    def step(kind: str, wanted: Tensor) -> None:
        found = one.training_step(batch)
        assert_close(found.total, wanted, rtol=1e-5, atol=1e-6)
        assert (float(found.metrics["written"]), float(found.metrics["replayed"])) == kinds[kind]
        assert float(found.metrics["threshold"]) == one.scheduler.phi

    ids, mask = batch.extra["prompt_ids"], batch.extra["prompt_mask"]
    written = generate(one.student, ids, mask, NEW, END, batch.rng.scoped("rollout"))
    step("written", token_loss(own, one.student, one.teacher, written).mean)
    one.after_step()
    assert_close(one.replay.rows, packed(written, one.replay.width), **EXACT)
    with torch.no_grad():  # so that the student would write something else now
        one.student.module.transformer.h[0].mlp.c_fc.weight.add_(0.5)
    one.step, one.done = 1, STEPS - 1
    step("replayed", token_loss(own, one.student, one.teacher, written).mean)
    one.after_step()
    assert len(one.replay) == 6, "what was replayed is not kept again"
    one.scheduler.phi = 0.0
    wanted = token_loss(Objective(skew, 1.0, 0.5), one.student, one.teacher, Tokens.of(batch)).mean
    step("data", wanted)


def test_a_texts_age_is_counted_in_steps_of_this_fit() -> None:
    """The last of them writes nothing anew where the buffer is full, whatever number the trainer gives it."""
    one = method(threshold=1.0, capacity=4)
    one.replay.push(torch.cat([text(n, width=one.replay.width) for n in range(4)]))
    one.step, one.done = 100, STEPS - 1
    assert one.source(Batch(None, {}, {}, StepRandom(0, 100, [0]))) == "replay"
    one.done = -1  # t = 0, before the first
    assert one.source(Batch(None, {}, {}, StepRandom(0, 100, [0]))) == "student"


def test_what_is_written_is_kept_in_the_order_of_the_global_batch() -> None:
    data = uneven(prompt=4)
    whole, parts = method(threshold=1.0), method(threshold=1.0)
    whole.training_step(batch_of(data, range(8)))
    for part in (range(4, 8), range(4)):
        parts.training_step(batch_of(data, part))
        assert not len(parts.replay), "nothing changes within a step"
    whole.after_step()
    parts.after_step()
    assert_close(parts.replay.rows, whole.replay.rows, **EXACT)


def test_a_skipped_steps_text_is_dropped() -> None:
    one, data = method(threshold=1.0), uneven(prompt=4)
    one.training_step(batch_of(data, range(4)))
    one.step = 1  # no after_step: it was skipped
    one.training_step(batch_of(data, range(8, 12), step=1))
    one.after_step()
    assert len(one.replay) == 4
    assert one.replay.rows[:, 0].tolist() == [data.rows[i].prompt for i in range(8, 12)]


def test_validation_is_the_mean_over_held_out_targets_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    one, seen = method(validate_every=3, validation_rows=4), []
    monkeypatch.setattr(Scheduler, "see", lambda self, loss: (seen.append(loss), setattr(self, "last", loss)))
    for step in range(7):
        one.step = step
        one.training_step(batch_of(uneven(prompt=4), range(4), step=step))
        one.after_step()
    first = mean_nll(one.student, TokenRows(HELD_OUT.rows[:4], END))
    assert seen == [pytest.approx(first, rel=1e-6)] * 3, "before the first step, and after the third and sixth"
    assert one.student.module.training
    with torch.autocast("cpu", torch.bfloat16):
        one.validate()
    assert seen[-1] == seen[0], "in one precision, in a step as after it"
    assert mean_nll(one.student, HELD_OUT) == pytest.approx(
        torch.tensor(perplexity(one.student, HELD_OUT)).log().item()
    )


@pytest.mark.parametrize("kind", ["skew_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(kind: Any, threshold: float) -> None:
    twin = CausalLM(gpt2(0, width=24)).student(FULL)
    one = method(pupil=twin, threshold=threshold, divergence=Divergence(kind, alpha=0.1))
    total = one.training_step(batch_of(uneven(prompt=4), range(6))).total
    total.backward()
    assert abs(total.item()) < 1e-6
    assert all(float(p.grad.abs().max()) < 1e-5 for p in twin.trainable() if p.grad is not None)


def test_its_state_is_the_threshold_the_loss_the_steps_and_the_buffer() -> None:
    one, other = method(threshold=1.0), method()
    other.load_state_dict(one.state_dict())
    assert len(other.replay) == 0 and other.scheduler.last is None and other.scheduler.phi == 1.0
    one.training_step(batch_of(uneven(prompt=4), range(4)))
    one.after_step()
    other.load_state_dict(one.state_dict())
    assert_close(other.replay.rows, one.replay.rows, **EXACT)
    assert (other.done, other.scheduler) == (1, one.scheduler) and other.scheduler.last is not None


def test_a_teacher_that_is_smaller_is_named_once() -> None:
    one = method(pupil=student(width=32))
    assert "wrong way round" in one.watch({}) and one.watch({}) == "" and method().watch({}) == ""


# -- what is refused -------------------------------------------------------------------------------------------------------

PROMPTS_ALONE = TokenRows([Row((1, 2), (False, False), 2, completed=False)], END)


@pytest.mark.parametrize(
    ("data", "held_out", "new", "named"),
    [
        (uneven(), HELD_OUT, 4, "--data.prompt_tokens"), (PROMPTS_ALONE, HELD_OUT, 4, "completion"),
        (uneven(prompt=4), PROMPTS_ALONE, 4, "completion"), (uneven(prompt=4), HELD_OUT, 29, "--method.max_new_tokens"),
    ],
)  # fmt: skip
def test_data_that_it_cannot_train_on(data: TokenRows, held_out: TokenRows, new: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        DistiLLM(DistiLLMConfig(max_new_tokens=new), student(), teacher(), data, held_out, END, STEPS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"threshold": 1.5}, "--method.threshold"), ({"threshold_step": -0.1}, "--method.threshold_step"),
        ({"tolerance": float("nan")}, "--method.tolerance"), ({"validate_every": 0}, "--method.validate_every"),
        ({"validation_rows": 0}, "--method.validation_rows"), ({"capacity": 0}, "--method.capacity"),
        ({"max_new_tokens": 0}, "--method.max_new_tokens"), ({"kd_weight": 0.0}, "--method.kd_weight"),
        ({"chunk_size": 0}, "--method.chunk_size"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(change: Mapping[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        DistiLLMConfig(**change)


# -- through the trainer ---------------------------------------------------------------------------------------------------


def fit(folder: Path, one: DistiLLM, **changes: Any) -> DistiLLM:
    train = {"max_train_steps": STEPS, "adam_epsilon": 1e-3, "learning_rate": 3e-3, "seed": 5, **changes}
    Trainer(options(**train), folder).fit(one, uneven(prompt=4))
    return one


def test_a_student_that_writes_is_not_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="whole weights to write text with, got shards of them"):
        fit(tmp_path / "run", method(), parallel="fsdp")
    assert not (tmp_path / "run").exists(), "before anything trains"
    monkeypatch.setattr(CausalLM, "is_shared_out", property(lambda self: True))
    with pytest.raises(InputError, match="got shards of them; use --train.parallel ddp"):
        method().validate()


def kinds(folder: Path) -> list[str]:
    """Who wrote each step's text."""
    return ["student" if r["written"] else "replay" if r["replayed"] else "data" for r in rows(folder)]


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpointing_steps": 2, "ema_decay": 0.9}
    whole = fit(tmp_path / "whole", method(**BUSY), **changes)
    assert set(kinds(tmp_path / "whole")) == {"student", "replay", "data"}
    assert len({row["threshold"] for row in rows(tmp_path / "whole")}) > 2
    dying = method(**BUSY)
    with pytest.raises(Killed), stopping_after(dying, 5, Killed.now):
        fit(tmp_path / "killed", dying, **changes)
    again = fit(tmp_path / "killed", method(seed=8, **BUSY), **changes, resume_from_checkpoint="latest")
    same(tmp_path / "killed", tmp_path / "whole")
    assert_close(again.replay.rows, whole.replay.rows, **EXACT)
    assert again.scheduler == whole.scheduler and again.done == whole.done == STEPS


def test_one_batch_of_eight_is_two_of_four(tmp_path: Path) -> None:
    one = fit(tmp_path / "one", method(**BUSY))
    two = fit(tmp_path / "two", method(**BUSY), train_batch_size=4, gradient_accumulation_steps=2)
    assert_close(two.replay.rows, one.replay.rows, **EXACT)
    assert kinds(tmp_path / "two") == kinds(tmp_path / "one")
    assert_close(saved(tmp_path / "two")[0], saved(tmp_path / "one")[0], rtol=1e-4, atol=1e-5)
    assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"), rtol=1e-4, atol=1e-5)
