"""GKD: who writes how often, what a student writes as a function of its place, and that it never imitates itself."""

import collections
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from language import END, FULL, VOCABULARY, batch_of, gpt2, llama, student, teacher, tokens, uneven
from torch import Tensor
from torch.testing import assert_close
from toys import EXACT, Killed, options, recorded, rows, same, saved, stopping_after

from stepdistill.data.tokens import Row, TokenRows, Tokens
from stepdistill.errors import InputError
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.gkd import GKD, GKDConfig
from stepdistill.kd.language_model import token_loss
from stepdistill.kd.networks import CausalLM
from stepdistill.kd.reduction import Objective
from stepdistill.kd.rollouts import DRAWN, GumbelMax, generate, gumbel
from stepdistill.randomness import StepRandom
from stepdistill.training.trainer import Trainer

NEW = 6


def given(rows: TokenRows, indices: Any, step: int = 0) -> tuple[Tensor, Tensor, StepRandom]:
    batch = batch_of(rows, indices, step=step)
    return batch.extra["prompt_ids"], batch.extra["prompt_mask"], batch.rng


def method(share: float = 0.5, seed: int = 1, **changes: Any) -> GKD:
    config = GKDConfig(share, max_new_tokens=NEW, **changes)
    return GKD(config, student(seed), teacher(), uneven(prompt=4), END)


# -- what is written -------------------------------------------------------------------------------------------------------


def test_gumbel_noise_makes_the_maximum_a_sample() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(4000, 4)
    processor = GumbelMax(StepRandom(0, 0, range(4000)), start=3)
    chosen = processor(torch.zeros(4000, 3, dtype=torch.int64), logits).argmax(1)
    assert_close(torch.bincount(chosen, minlength=4) / 4000, logits[0].softmax(0), rtol=0, atol=0.025)
    later = processor(torch.zeros(4000, 4, dtype=torch.int64), logits).argmax(1)
    assert 0.3 < float((chosen == later).float().mean()) < 0.6, "each token has noise of its own"
    assert gumbel(torch.tensor([0.0, 0.5])).tolist() == [-float("inf"), pytest.approx(0.36651, abs=1e-4)]


def test_blocks_of_the_vocabulary_that_do_not_come_out_even() -> None:
    """7 entries are 3 blocks of 3: all probabilities, and what has none is never written."""
    count, logits = 6000, torch.tensor([0.5, -math.inf, 1.5, -1.0, 2.0, 0.0, 1.0])
    processor = GumbelMax(StepRandom(1, 0, range(count)), start=2)
    for written in (0, 17):  # of two streams
        scores = processor(torch.zeros(count, 2 + written, dtype=torch.int64), logits.expand(count, 7))
        assert scores.isfinite().sum(1).eq(1).all(), "one token, and nothing for others to choose from"
        found = torch.bincount(scores.argmax(1), minlength=7)
        assert found[1] == 0
        assert_close(found / count, logits.softmax(0), rtol=0, atol=0.025)


def test_each_token_has_noise_of_its_own_whatever_was_asked_before() -> None:
    count, logits = 400, torch.zeros(400, 10)
    asked = [0, 1, DRAWN - 1, DRAWN, DRAWN + 1, 3 * DRAWN, 1]
    one, rng = GumbelMax(StepRandom(1, 0, range(count)), start=2), StepRandom(1, 0, range(count))
    found = [one(torch.zeros(count, 2 + n, dtype=torch.int64), logits).argmax(1) for n in asked]
    for n, chosen in zip(asked, found, strict=True):  # also by one that was asked nothing else, after another prompt
        fresh = GumbelMax(rng, start=5)(torch.zeros(count, 5 + n, dtype=torch.int64), logits).argmax(1)
        assert_close(chosen, fresh, **EXACT)
    for a, b in itertools.combinations(range(len(asked) - 1), 2):
        assert float((found[a] == found[b]).float().mean()) < 0.2, (asked[a], asked[b])  # 0.1 by chance


def test_a_token_takes_few_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 sqrt(V) of them, in one go for DRAWN tokens."""
    asked, draw = [], StepRandom.uniform

    def watched(self: StepRandom, stream: str, shape: Any = ()) -> Tensor:
        asked.append((stream, tuple(shape)))
        return draw(self, stream, shape)

    monkeypatch.setattr(StepRandom, "uniform", watched)
    one = GumbelMax(StepRandom(1, 0, range(2)), start=2)
    for written in range(DRAWN + 1):
        one(torch.zeros(2, 2 + written, dtype=torch.int64), torch.zeros(2, 900))
    assert asked == [("tokens from 0", (DRAWN, 60)), (f"tokens from {DRAWN}", (DRAWN, 60))]


def test_logits_that_differ_a_little_hardly_ever_give_another_token() -> None:
    """Of the tokens, about as many as the change is large; by the inverse of a cumulative sum it would be many times that."""
    count, entries = 4000, 1000
    numbers = torch.Generator().manual_seed(0)
    logits = torch.randn(count, entries, generator=numbers)
    near = logits + 0.01 * torch.randn(count, entries, generator=numbers)
    one = GumbelMax(StepRandom(1, 0, range(count)), start=2)
    a, b = (one(torch.zeros(count, 2, dtype=torch.int64), z).argmax(1) for z in (logits, near))
    assert 0 < float((a != b).float().mean()) < 0.02


def test_two_tokens_are_drawn_from_the_student_jointly() -> None:
    """Against the exact probabilities of all pairs, with the cache in use; four times the noise of the draws."""
    pupil, count = CausalLM(small_vocabulary()).student(FULL), 2000
    prompt = torch.tensor([[1, 2]]).expand(count, 2)
    found = generate(pupil, prompt, torch.ones_like(prompt).bool(), 2, end=3, rng=StepRandom(5, 0, range(count)))
    written = [tuple(row) for row in found.input_ids[:, 2:].tolist()]
    seen = collections.Counter(written)
    with pupil.evaluating():
        for a, b in itertools.product(range(4), repeat=2):
            p_a = pupil.module(torch.tensor([[1, 2]])).logits[0, -1].softmax(0)[a]
            p_b = (
                pupil.module(torch.tensor([[1, 2, a]])).logits[0, -1].softmax(0)[b]
                if a != 3
                else torch.tensor(float(b == 3))
            )
            assert abs(seen[a, b] / count - float(p_a * p_b)) < 0.04, (a, b)


def small_vocabulary() -> Any:
    from language import built
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=3, eos_token_id=3)
    config.initializer_range = 0.3
    return built(2, lambda: GPT2LMHeadModel(config))


@pytest.mark.parametrize("build", [gpt2, llama])
def test_what_a_sample_writes_depends_on_its_place_alone(build: Any) -> None:
    pupil, data = CausalLM(build(1)).student(FULL), uneven(prompt=4)
    whole = generate(pupil, *given(data, range(8))[:2], NEW, END, given(data, range(8))[2])
    again = generate(pupil, *given(data, range(8))[:2], NEW, END, given(data, range(8))[2])
    assert_close(whole.input_ids, again.input_ids, **EXACT)
    for start in (0, 4):
        part = generate(
            pupil, *given(data, range(start, start + 4))[:2], NEW, END, given(data, range(start, start + 4))[2]
        )
        for i in range(4):
            one, other = (
                [int(t) for t, m in zip(f.input_ids[j], f.loss_mask[j], strict=True) if m]
                for f, j in ((whole, start + i), (part, i))
            )
            assert one == other
    ids, mask, rng = given(data, range(8))
    more = torch.zeros(8, 3, dtype=torch.int64)
    shifted = generate(pupil, torch.cat([more + 7, ids], 1), torch.cat([more.bool(), mask], 1), NEW, END, rng)
    assert_close(shifted.input_ids[:, 3:], whole.input_ids, **EXACT)
    assert_close(shifted.loss_mask[:, 3:], whole.loss_mask, **EXACT)
    other = generate(pupil, ids, mask, NEW, END, given(data, range(8), step=1)[2])
    assert not torch.equal(other.input_ids, whole.input_ids)


def test_the_end_is_written_once_and_learned_and_all_after_it_is_padding() -> None:
    pupil, data = student(), uneven(prompt=4)
    with torch.no_grad():
        pupil.module.transformer.wte.weight[END] *= 3  # ends soon, in some samples
    ids, mask, rng = given(data, range(12))
    found = generate(pupil, ids, mask, 12, END, rng)
    written, learned = found.input_ids[:, ids.shape[1] :], found.loss_mask[:, ids.shape[1] :]
    lengths = learned.sum(1)
    assert lengths.min() < 12 and lengths.max() > 1
    for row, length in zip(written, lengths, strict=True):
        ends = (row == END).nonzero().flatten().tolist()
        assert int(length) == (ends[0] + 1 if ends else len(row))
    assert not found.loss_mask[:, : ids.shape[1]].any() and torch.equal(found.attention_mask[:, : ids.shape[1]], mask)
    assert torch.equal(found.attention_mask[:, ids.shape[1] :], learned)


def test_all_that_end_at_once_stop_early_and_an_empty_completion_is_its_end() -> None:
    pupil, data = student(), uneven(prompt=4)
    pupil.module.lm_head.bias = torch.nn.Parameter(
        torch.full((VOCABULARY,), -100.0).index_fill(0, torch.tensor(END), 100.0)
    )
    found = generate(pupil, *given(data, range(4))[:2], NEW, END, given(data, range(4))[2])
    assert found.input_ids.shape[1] == given(data, range(4))[0].shape[1] + 1, "one token, then nothing to do"
    assert found.loss_mask.sum() == 4


def test_the_checkpoints_own_settings_for_writing_do_not_hold() -> None:
    pupil, data = student(), uneven(prompt=4)
    wanted = generate(pupil, *given(data, range(8))[:2], NEW, END, given(data, range(8))[2])
    own = pupil.module.generation_config
    own.update(
        repetition_penalty=5.0, temperature=0.1, top_k=1, no_repeat_ngram_size=1, suppress_tokens=list(range(20))
    )
    found = generate(pupil, *given(data, range(8))[:2], NEW, END, given(data, range(8))[2])
    assert_close(found.input_ids, wanted.input_ids, **EXACT)
    assert pupil.module.generation_config is own


def test_writing_is_in_eval_mode_without_a_graph_and_with_a_cache() -> None:
    pupil, data = CausalLM(gpt2(1)).student(FULL), uneven(prompt=4)
    for part in pupil.module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    wanted = generate(student(), *given(data, range(4))[:2], NEW, END, given(data, range(4))[2])
    with recorded(pupil.module.transformer.h[0].mlp.c_fc) as calls:
        found = generate(pupil, *given(data, range(4))[:2], NEW, END, given(data, range(4))[2])
    assert_close(found.input_ids, wanted.input_ids, **EXACT)
    assert not any(with_grad for _, with_grad in calls) and pupil.module.training
    assert [inputs[0].shape[1] for inputs, _ in calls][1:] == [1] * (len(calls) - 1), "one new place at a time"


def test_without_noise_the_likeliest_is_written() -> None:
    pupil, ids = student(), tokens(2, 4)
    found = generate(pupil, ids, torch.ones_like(ids).bool(), 3, END)
    with torch.no_grad():
        assert_close(found.input_ids[:, 4], pupil.module(ids).logits[:, -1].argmax(1))


# -- the loss --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_student_writes_its_share_of_the_steps(share: float) -> None:
    one, count = method(share), 600
    own = [
        batch_of(uneven(prompt=4), [0], seed=3, step=s).rng.shared("who writes") < one.config.share
        for s in range(count)
    ]
    assert abs(sum(own) / count - share) <= (0.06 if 0 < share < 1 else 0.0)
    told = [
        float(one.training_step(batch_of(uneven(prompt=4), [0, 1], seed=3, step=s)).metrics["on_policy"])
        for s in range(12)
    ]
    assert told == [float(o) for o in own[:12]]


def test_the_alias_is_the_same_share() -> None:
    assert GKDConfig(on_policy_fraction=0.25).share == 0.25 and GKDConfig(0.75).share == 0.75
    assert GKDConfig(0.25, on_policy_fraction=0.25).share == 0.25


def test_the_data_are_judged_as_distillation_on_text_judges_them() -> None:
    one, batch = method(0.0, ce_weight=0.5), batch_of(uneven(prompt=4), range(6))
    wanted = token_loss(Objective(Divergence("jsd"), 1.0, 0.5), one.student, one.teacher, Tokens.of(batch))
    assert_close(one.training_step(batch).total, wanted.mean, rtol=1e-6, atol=1e-7)


def test_the_students_own_text_is_judged_by_the_teacher_alone() -> None:
    """With a weight on the cross-entropy too: the student is never told that what it wrote is right."""
    one, batch = method(1.0, ce_weight=0.5), batch_of(uneven(prompt=4), range(6))
    losses = one.training_step(batch)
    text = generate(
        one.student, batch.extra["prompt_ids"], batch.extra["prompt_mask"], NEW, END, batch.rng.scoped("rollout")
    )
    wanted = token_loss(Objective(Divergence("jsd")), one.student, one.teacher, text)
    assert_close(losses.total, wanted.mean, rtol=1e-6, atol=1e-7)
    assert losses.count == wanted.count == float(text.loss_mask.sum())
    losses.total.backward()
    assert any(p.grad.abs().sum() > 0 for p in one.student.trainable() if p.grad is not None)


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    twin = CausalLM(gpt2(0, width=24)).student(FULL)
    one = GKD(GKDConfig(1.0, max_new_tokens=NEW), twin, teacher(), uneven(prompt=4), END)
    total = one.training_step(batch_of(uneven(prompt=4), range(6))).total
    total.backward()
    assert abs(total.item()) < 1e-6
    assert all(float(p.grad.abs().max()) < 1e-5 for p in twin.trainable() if p.grad is not None)


# -- what is refused -------------------------------------------------------------------------------------------------------

PROMPTS_ALONE = TokenRows([Row((1, 2), (False, False), 2, completed=False)], END)


@pytest.mark.parametrize(
    ("share", "data", "new", "named"),
    [
        (0.5, uneven(), 4, "--data.prompt_tokens"), (0.5, PROMPTS_ALONE, 4, "--method.lmbda 1"),
        (1.0, uneven(prompt=4), 29, "--method.max_new_tokens"),
    ],
)  # fmt: skip
def test_data_that_it_cannot_train_on(share: float, data: TokenRows, new: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        GKD(GKDConfig(share, max_new_tokens=new), student(), teacher(), data, END)
    GKD(GKDConfig(1.0, max_new_tokens=28), student(), teacher(), uneven(prompt=4), END)  # 32 positions in all
    GKD(GKDConfig(1.0, max_new_tokens=4), student(), teacher(), PROMPTS_ALONE, END)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lmbda": 1.5}, "--method.lmbda"), ({"on_policy_fraction": -0.1}, "--method.on_policy_fraction"),
        ({"lmbda": 0.2, "on_policy_fraction": 0.3}, "one thing"), ({"max_new_tokens": 0}, "--method.max_new_tokens"),
        ({"kd_weight": 0.0}, "--method.kd_weight"), ({"chunk_size": 0}, "--method.chunk_size"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(change: Mapping[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        GKDConfig(**change)


@pytest.fixture
def shared_out() -> Iterator[CausalLM]:
    """A student whose head is shared out, among one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    pupil = CausalLM(llama(1, tie_word_embeddings=False)).student(FULL)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        head: Any = pupil.module.get_submodule("lm_head")
        mesh = init_device_mesh("cpu", (1,))
        head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
        yield pupil
    finally:
        torch.distributed.destroy_process_group()


def test_a_student_that_is_shared_out_does_not_write(shared_out: CausalLM) -> None:
    one = GKD(GKDConfig(1.0, max_new_tokens=NEW), shared_out, teacher(), uneven(prompt=4), END)
    with pytest.raises(InputError, match="whole weights .* shards of them; use --train.parallel ddp"):
        one.training_step(batch_of(uneven(prompt=4), range(4)))
    assert not shared_out.is_factored, "its losses take all logits at once"


# -- through the trainer ---------------------------------------------------------------------------------------------------


def test_a_student_that_writes_is_not_shared_out(tmp_path: Path) -> None:
    one = GKD(GKDConfig(0.5, max_new_tokens=NEW), student(), teacher(), uneven(prompt=4), END)
    with pytest.raises(
        InputError, match="whole weights to write text with, got shards of them; use --train.parallel ddp"
    ):
        fit(tmp_path / "own", one, parallel="fsdp")
    assert not (tmp_path / "own").exists()
    given = GKD(GKDConfig(0.0, max_new_tokens=NEW), student(tie_word_embeddings=False), teacher(), uneven(), END)
    fit(tmp_path / "given", given, parallel="fsdp", max_train_steps=1)


def fit(folder: Path, one: GKD, **changes: Any) -> GKD:
    train = {"max_train_steps": 6, "adam_epsilon": 1e-3, "learning_rate": 3e-3, "seed": 3, **changes}
    Trainer(options(**train), folder).fit(one, uneven(prompt=4))
    return one


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpointing_steps": 2, "ema_decay": 0.9}
    fit(tmp_path / "whole", method(), **changes)
    assert {row["on_policy"] for row in rows(tmp_path / "whole")} == {0.0, 1.0}, "both kinds of steps"
    dying = method()
    with pytest.raises(Killed), stopping_after(dying, 5, Killed.now):
        fit(tmp_path / "killed", dying, **changes)
    fit(tmp_path / "killed", method(seed=8), **changes, resume_from_checkpoint="latest")
    same(tmp_path / "killed", tmp_path / "whole")


def test_one_batch_of_eight_is_two_of_four(tmp_path: Path) -> None:
    fit(tmp_path / "one", method())
    fit(tmp_path / "two", method(), train_batch_size=4, gradient_accumulation_steps=2)
    assert_close(saved(tmp_path / "two")[0], saved(tmp_path / "one")[0], rtol=1e-4, atol=1e-5)
    assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"), rtol=1e-4, atol=1e-5)
