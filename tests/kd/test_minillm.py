"""MiniLLM: what two models write together, what each thinks of it, and that the loop's splits change nothing."""

import collections
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from language import END, FULL, VOCABULARY, batch_of, built, gpt2, llama, student, teacher, uneven
from torch import Tensor
from torch.testing import assert_close
from toys import EXACT, Killed, options, recorded, rows, same, saved, stopping_after

from stepdistill.data.tokens import Row, TokenRows, Tokens
from stepdistill.errors import InputError
from stepdistill.kd.language_model import token_loss
from stepdistill.kd.minillm import REVERSE, MiniLLM, MiniLLMConfig, scored
from stepdistill.kd.networks import CausalLM
from stepdistill.kd.policy_gradient import PolicyGradient
from stepdistill.kd.reduction import Objective
from stepdistill.kd.rollouts import Mixture, generate
from stepdistill.randomness import StepRandom
from stepdistill.training.trainer import Trainer

NEW = 6


def method(seed: int = 1, pupil: CausalLM | None = None, **changes: Any) -> MiniLLM:
    config = MiniLLMConfig(**{"max_new_tokens": NEW, **changes})
    return MiniLLM(config, pupil or student(seed), teacher(), uneven(prompt=4), END)


def given(indices: Any, step: int = 0, pad: int = 0) -> tuple[Tensor, Tensor, StepRandom]:
    """Prompts of those rows, with `pad` places of padding more."""
    batch = batch_of(uneven(prompt=4), indices, step=step)
    ids, mask = batch.extra["prompt_ids"], batch.extra["prompt_mask"]
    more = torch.zeros(len(ids), pad, dtype=torch.int64)
    return torch.cat([more + 7, ids], 1), torch.cat([more.bool(), mask], 1), batch.rng


def mixed(pupil: CausalLM, other: CausalLM, share: float, ids: Tensor, mask: Tensor, rng: StepRandom) -> Tokens:
    return generate(pupil, ids, mask, NEW, END, rng, Mixture(other, share, mask))


# -- written together ------------------------------------------------------------------------------------------------------


def four(seed: int) -> CausalLM:
    """A model of a vocabulary of four, the last of which ends a text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=3, eos_token_id=3)
    config.initializer_range = 0.6
    return CausalLM(built(seed, lambda: GPT2LMHeadModel(config)))


def test_two_tokens_are_drawn_from_both_models_jointly() -> None:
    """Against the exact probabilities of all pairs; four times the noise of the draws."""
    pupil, other, count, share = four(2).student(FULL), four(3).frozen(), 2000, 0.4
    ids = torch.tensor([[0, 1, 2]]).expand(count, 3)
    mask = torch.tensor([[False, True, True]]).expand(count, 3)
    found = generate(
        pupil, ids, mask, 2, end=3, rng=StepRandom(5, 0, range(count)), mixture=Mixture(other, share, mask)
    )
    seen = collections.Counter(tuple(row) for row in found.input_ids[:, 3:].tolist())

    def probability(*tokens: int) -> Tensor:
        with pupil.evaluating():
            q, p = (lm.module(torch.tensor([[1, 2, *tokens]])).logits[0, -1].softmax(0) for lm in (pupil, other))
        assert (q - p).abs().max() > 0.1, "or there would be nothing to tell apart"
        return share * p + (1 - share) * q

    first = probability()
    for a, b in itertools.product(range(4), repeat=2):
        then = probability(a)[b] if a != 3 else torch.tensor(float(b == 3))
        assert abs(seen[a, b] / count - float(first[a] * then)) < 0.04, (a, b)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_cached_steps_are_whole_forwards_with_padding_on_the_left(build: Any) -> None:
    lm = CausalLM(build(4)).frozen()
    ids, mask, _ = given(range(8), pad=2)
    logits, cache = lm.next_logits(ids, mask)
    for token in (5, 11, 17):
        assert_close(logits, lm(ids, mask)[:, -1], rtol=1e-4, atol=1e-5)
        new = torch.full((8, 1), token)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new).bool()], 1)
        logits, cache = lm.next_logits(new, mask, cache)
    assert_close(logits, lm(ids, mask)[:, -1], rtol=1e-4, atol=1e-5)


def test_at_both_ends_it_is_the_student_and_nearly_the_teacher() -> None:
    pupil, other = student(), teacher()
    ids, mask, rng = given(range(12))
    with recorded(other.module) as calls:
        alone = mixed(pupil, other, 0.0, ids, mask, rng)
    assert not calls, "a teacher without a share is not asked"
    assert_close(alone.input_ids, generate(pupil, ids, mask, NEW, END, rng).input_ids, **EXACT)
    taught = mixed(pupil, other, 1 - 1e-12, ids, mask, rng)
    assert_close(taught.input_ids, generate(other, ids, mask, NEW, END, rng).input_ids, **EXACT)
    assert not torch.equal(taught.input_ids, alone.input_ids)


def test_what_both_write_depends_on_the_place_alone() -> None:
    pupil, other = student(), teacher()
    whole = mixed(pupil, other, 0.4, *given(range(8)))
    half = mixed(pupil, other, 0.4, *given(range(4, 8)))
    shifted = mixed(pupil, other, 0.4, *given(range(8), pad=3))
    for i in range(8):
        wanted = whole.input_ids[i][whole.loss_mask[i]]
        assert_close(shifted.input_ids[i][shifted.loss_mask[i]], wanted, **EXACT)
        if i >= 4:
            assert_close(half.input_ids[i - 4][half.loss_mask[i - 4]], wanted, **EXACT)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_only_entries_that_both_tables_have_are_written(share: float) -> None:
    pupil = student(vocabulary=VOCABULARY + 8)
    with torch.no_grad():
        pupil.module.transformer.wte.weight[VOCABULARY:] *= 20
    ids, mask, rng = given(range(12))
    assert generate(pupil, ids, mask, NEW, END, rng).input_ids.max() >= VOCABULARY
    assert mixed(pupil, teacher(), share, ids, mask, rng).input_ids.max() < VOCABULARY
    one = MiniLLM(MiniLLMConfig(max_new_tokens=NEW), pupil, teacher(), uneven(prompt=4), END)
    assert one.training_step(batch_of(uneven(prompt=4), range(6))).total.isfinite()


# -- what they think of it -------------------------------------------------------------------------------------------------


class Whole(CausalLM):
    """Gives its logits whole."""

    @property
    def is_factored(self) -> bool:
        return False


@pytest.mark.parametrize("chunk", [1, 5, 256])
@pytest.mark.parametrize(("kind", "plain"), [(CausalLM, True), (Whole, True), (CausalLM, False)])
def test_opinions_are_those_of_whole_logits(chunk: int, kind: type[CausalLM], plain: bool) -> None:
    wise = gpt2(0, width=24)
    if not plain:  # a head that its weights do not explain
        wise.lm_head.register_forward_hook(lambda _layer, _given, logits: logits * 0.5)
    pupil, other = kind(gpt2(1)).student(FULL), CausalLM(wise).frozen()
    assert (pupil.is_factored, other.is_factored) == (kind is CausalLM, plain)
    ids, mask, rng = given(range(6))
    tokens = mixed(pupil, other, 0.4, ids, mask, rng)
    found = scored(pupil, other, tokens, chunk)
    weights = torch.linspace(0.5, 2.0, found.mask.numel()).view_as(found.mask)
    log_q, log_p = (lm(tokens.input_ids, tokens.attention_mask)[:, :-1].log_softmax(-1) for lm in (pupil, other))
    assert_close(found.mask, tokens.loss_mask[:, 1:], **EXACT)
    labels = tokens.input_ids[:, 1:, None]
    kl = (log_q.exp() * (log_q - log_p.detach())).sum(-1)
    chosen = log_q.gather(2, labels).squeeze(2), log_p.gather(2, labels).squeeze(2)
    for ours, wanted in zip((found.kl, found.log_q, found.log_p), (kl, *chosen), strict=True):
        assert_close(ours[found.mask], wanted[found.mask].to(ours), rtol=1e-4, atol=1e-5)
    assert not found.log_p.requires_grad
    for ours, wanted in ((found.kl, kl), (found.log_q, chosen[0])):
        gradients = [
            torch.autograd.grad((x * weights)[found.mask].sum(), pupil.trainable(), retain_graph=True)
            for x in (ours, wanted)
        ]
        for one, two in zip(*gradients, strict=True):
            assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_nothing_written_is_no_loss_with_a_graph() -> None:
    pupil, nothing = student(), torch.zeros(2, 5, dtype=torch.bool)
    found = scored(pupil, teacher(), Tokens(torch.ones(2, 5, dtype=torch.int64), ~nothing, nothing))
    loss = PolicyGradient(teacher_share=0.2).surrogate(found).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert all(float(p.grad.abs().max()) == 0.0 for p in pupil.trainable() if p.grad is not None)


# -- the method ------------------------------------------------------------------------------------------------------------


def test_a_step_by_its_parts() -> None:
    one, batch = method(lm_weight=0.5, reward_clip=2.0), batch_of(uneven(prompt=4), range(6), step=2)
    losses = one.training_step(batch)
    ids, mask = batch.extra["prompt_ids"], batch.extra["prompt_mask"]
    text = mixed(one.student, one.teacher, 0.2, ids, mask, batch.rng.scoped("rollout"))
    seen, estimator = scored(one.student, one.teacher, text), PolicyGradient("paper", 0.2, "token", True, 2.0)
    assert losses.terms.keys() == {"policy_gradient", "language_model"} and losses.count == 6
    assert_close(losses.terms["policy_gradient"], estimator.surrogate(seen).sum() / (6 * NEW))
    nll = token_loss(Objective(kd_weight=0.0, ce_weight=1.0), one.student, None, Tokens.of(batch)).total
    assert_close(losses.terms["language_model"], 0.5 * nll / (6 * NEW))
    assert_close(losses.metrics["reverse_kl"], seen.kl[seen.mask].sum().detach() / (6 * NEW))
    kl = REVERSE(one.student(text.input_ids, text.attention_mask), one.teacher(text.input_ids, text.attention_mask))
    assert_close(losses.metrics["reverse_kl"], kl[:, :-1][seen.mask].sum().detach() / (6 * NEW), rtol=1e-4, atol=1e-5)
    assert_close(losses.metrics["tokens"], text.loss_mask.sum() / (6 * NEW))
    losses.total.backward()
    assert any(p.grad.abs().sum() > 0 for p in one.student.trainable() if p.grad is not None)


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(variant: str) -> None:
    twin = CausalLM(gpt2(0, width=24)).student(FULL)
    losses = method(pupil=twin, variant=variant, length_normalised=False).training_step(
        batch_of(uneven(prompt=4), range(6))
    )
    losses.total.backward()
    assert abs(losses.total.item()) < 1e-5 and losses.metrics["reverse_kl"] < 1e-6
    assert all(float(p.grad.abs().max()) < 1e-5 for p in twin.trainable() if p.grad is not None)


def test_whitening_is_by_the_moments_of_the_step_before() -> None:
    one, data = method(whitened=True), uneven(prompt=4)
    parts = [one.training_step(batch_of(data, part)).metrics for part in (range(4), range(4, 8))]
    means = {name: float(parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    estimator = one.config.estimator()
    seen = [scored(one.student, one.teacher, one.written(batch_of(data, p))) for p in (range(4), range(4, 8))]
    returns = torch.cat([estimator.returns(s)[s.mask] for s in seen])
    one.watch(means)
    assert (one.centre, one.scale) == (0.0, 1.0), "not within the step"
    one.after_step()
    assert one.centre == pytest.approx(float(returns.mean()), abs=1e-5)
    assert one.scale == pytest.approx(float(returns.std(correction=0)), abs=1e-4)
    batch = batch_of(data, range(4), step=1)
    found = one.training_step(batch).terms["policy_gradient"]
    seen_then = scored(one.student, one.teacher, one.written(batch))
    wanted = estimator.surrogate(seen_then, one.centre, one.scale).sum() / (4 * NEW)
    assert_close(found, wanted)
    assert not torch.allclose(found, estimator.surrogate(seen_then).sum() / (4 * NEW))
    one.watch({**means, "squares": float("nan")})  # of a step that is skipped
    one.after_step()
    assert one.scale == pytest.approx(float(returns.std(correction=0)), abs=1e-4)
    other = method()
    other.load_state_dict(one.state_dict())
    assert (other.centre, other.scale) == (one.centre, one.scale)
    plain = method()
    plain.watch(means)
    plain.after_step()
    assert (plain.centre, plain.scale) == (0.0, 1.0)


def test_moments_without_a_spread_and_without_tokens() -> None:
    one = method(whitened=True)
    for below in (0.0, 1e-7):  # all returns are 0.5; what sums round may take more away than there is
        one.watch({"returns": 0.25, "squares": 0.125 - below, "tokens": 0.5})
        one.after_step()
        assert (one.centre, one.scale) == (0.5, pytest.approx(1e-4))
    one.watch({"returns": 0.0, "squares": 0.0, "tokens": 0.0})
    one.after_step()
    assert one.centre == 0.5


def test_a_teacher_that_is_smaller_is_named_once() -> None:
    one = method(pupil=student(width=32))
    assert "wrong way round" in one.watch(SEEN) and one.watch(SEEN) == "" and method().watch(SEEN) == ""


SEEN = {"returns": 0.0, "squares": 0.0, "tokens": 0.0}

# -- what is refused -------------------------------------------------------------------------------------------------------

PROMPTS_ALONE = TokenRows([Row((1, 2), (False, False), 2, completed=False)], END)


@pytest.mark.parametrize(
    ("config", "data", "named"),
    [
        ({}, uneven(), "--data.prompt_tokens"), ({"lm_weight": 1.0}, PROMPTS_ALONE, "--method.lm_weight 0"),
        ({"max_new_tokens": 29}, uneven(prompt=4), "--method.max_new_tokens"),
    ],
)  # fmt: skip
def test_data_that_it_cannot_train_on(config: Mapping[str, Any], data: TokenRows, named: str) -> None:
    with pytest.raises(InputError, match=named):
        MiniLLM(MiniLLMConfig(**{"max_new_tokens": NEW, **config}), student(), teacher(), data, END)
    MiniLLM(MiniLLMConfig(max_new_tokens=28), student(), teacher(), uneven(prompt=4), END)  # 32 positions in all
    MiniLLM(MiniLLMConfig(max_new_tokens=NEW), student(), teacher(), PROMPTS_ALONE, END)


def test_dropout_of_the_student_is_said() -> None:
    dry, wet = student(), student(resid_pdrop=0.1, attn_pdrop=0.25)
    assert method(pupil=dry).watch({"tokens": 0.0}) == ""
    note = method(pupil=wet).watch({"tokens": 0.0})
    assert "(attn_pdrop 0.25, resid_pdrop 0.1) is off where it writes" in note
    small = MiniLLM(
        MiniLLMConfig(max_new_tokens=NEW), student(width=48, resid_pdrop=0.1), teacher(), uneven(prompt=4), END
    )
    assert "wrong way round?; the student's dropout" in small.watch({"tokens": 0.0})
    losses = []
    for _ in range(2):
        batch = batch_of(uneven(prompt=4), range(6))
        losses.append(method(pupil=wet).training_step(batch).metrics["reverse_kl"])
    assert losses[0] != losses[1], "it is on where text is judged"


def test_a_teacher_without_keys_and_values_writes_nothing_along() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, state_size=4)
    other = CausalLM(built(0, lambda: MambaForCausalLM(config))).frozen()
    with pytest.raises(InputError, match=r"MambaForCausalLM; give --method\.teacher_share 0"):
        MiniLLM(MiniLLMConfig(max_new_tokens=NEW), student(), other, uneven(prompt=4), END)
    alone = MiniLLMConfig(max_new_tokens=NEW, teacher_share=0.0)
    assert MiniLLM(alone, student(), other, uneven(prompt=4), END).config is alone


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"variant": "ppo"}, "--method.variant"), ({"importance_weights": "none"}, "--method.importance_weights"),
        ({"teacher_share": 1.0}, "--method.teacher_share"), ({"teacher_share": -0.1}, "--method.teacher_share"),
        ({"variant": "reference", "importance_weights": "exact"}, "--method.variant"),
        ({"reward_clip": 0.0}, "--method.reward_clip"), ({"lm_weight": -1.0}, "--method.lm_weight"),
        ({"max_new_tokens": 0}, "--method.max_new_tokens"), ({"chunk_size": 0}, "--method.chunk_size"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(change: Mapping[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        MiniLLMConfig(**change)


# -- through the trainer ---------------------------------------------------------------------------------------------------

ALL: dict[str, Any] = {"whitened": True, "lm_weight": 0.3, "teacher_share": 0.3}


def fit(folder: Path, one: MiniLLM, **changes: Any) -> MiniLLM:
    train = {"max_train_steps": 5, "adam_epsilon": 1e-3, "learning_rate": 3e-3, "seed": 3, **changes}
    Trainer(options(**train), folder).fit(one, uneven(prompt=4))
    return one


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpointing_steps": 2, "ema_decay": 0.9}
    fit(tmp_path / "whole", method(**ALL), **changes)
    dying = method(**ALL)
    with pytest.raises(Killed), stopping_after(dying, 4, Killed.now):
        fit(tmp_path / "killed", dying, **changes)
    fit(tmp_path / "killed", method(seed=8, **ALL), **changes, resume_from_checkpoint="latest")
    same(tmp_path / "killed", tmp_path / "whole")


def test_one_batch_of_eight_is_two_of_four(tmp_path: Path) -> None:
    fit(tmp_path / "one", method(**ALL))
    fit(tmp_path / "two", method(**ALL), train_batch_size=4, gradient_accumulation_steps=2)
    assert_close(saved(tmp_path / "two")[0], saved(tmp_path / "one")[0], rtol=1e-4, atol=1e-5)
    assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"), rtol=1e-3, atol=1e-4)


def test_a_student_that_writes_is_not_shared_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="whole weights to write text with, got shards of them"):
        fit(tmp_path / "run", method(), parallel="fsdp")
    assert not (tmp_path / "run").exists(), "before anything trains"


@pytest.mark.slow
def test_the_kl_falls(tmp_path: Path) -> None:
    """On its own text, over 60 steps."""
    one = method(teacher_share=0.2, pupil=CausalLM(gpt2(1, width=24)).student(FULL))
    fit(tmp_path / "run", one, max_train_steps=60, learning_rate=1e-2, adam_epsilon=1e-8)
    found = [row["reverse_kl"] for row in rows(tmp_path / "run")]
    assert sum(found[-10:]) < 0.6 * sum(found[:10])
