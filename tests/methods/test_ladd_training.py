"""LADD through the real Trainer: a one-step generator reaches a mixture; killed, or cut otherwise, a game is the same."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adversaries import MEANS, WEIGHTS, Pixels, Pixelwise, Prompted, config, game, mixture, mixture_samples
from torch import Tensor
from torch.testing import assert_close
from toys import EXACT, Killed, options, rows, same, saved, stopping_after, weights

from stepdistill.methods.ladd import LADD
from stepdistill.training.trainer import Trainer

BOUND = 0.2  # an eighth of the distance that one mode alone leaves; each .01 of weight in the wrong mode costs .025


def transport(x: Tensor, y: Tensor) -> float:
    """W1 of two samples of one size."""
    return float((x.flatten().sort().values - y.flatten().sort().values).abs().mean())


def truth(n: int) -> Tensor:
    draws = torch.Generator().manual_seed(77)
    return mixture_samples(torch.randn(n, generator=draws), torch.rand(n, generator=draws))


def test_what_the_bound_tells_apart() -> None:
    """The mean, one mode and modes of equal weight are all well beyond it; fresh samples are well within."""
    real, n = truth(20_000), 20_000
    normal = torch.randn(n, generator=torch.Generator().manual_seed(5))
    assert (
        transport(mixture_samples(normal, torch.rand(n, generator=torch.Generator().manual_seed(6))), real) < BOUND / 5
    )
    assert transport(torch.full((n,), sum(m * w for m, w in zip(MEANS, WEIGHTS, strict=True))), real) > 5 * BOUND
    assert transport(MEANS[1] + 0.2 * normal, real) > 3 * BOUND
    even = torch.linspace(0, WEIGHTS[0] / 0.5, n)  # first half to the first mode
    assert transport(mixture_samples(normal, even), real) > 2 * BOUND


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3, 4))])
def test_a_one_step_generator_reaches_both_modes_with_their_weights(tmp_path: Path, seed: int) -> None:
    """Heads on what the perfect teacher says of x0 and eps, and no loss but theirs."""
    # with r1 in every 4th of 200 steps 3 of 25 seeds collapse, and which ones a CPU's rounding decides
    given = config(head_width=16, noise_mean=-2.0, r1_every=2, guard_every=0)
    student = Pixelwise(seed=seed)
    method = LADD(given, student, mixture(), (1, 16, 16), {}, seed)
    noise = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    start = student(noise, torch.ones(4).double(), {}).x0.detach()
    assert transport(start, truth(start.numel())) > 2.5 * BOUND
    train = options(
        max_train_steps=250, train_batch_size=4, learning_rate=5e-3, lr_scheduler="cosine", adam_beta1=0.0, adam_beta2=0.99,
        adam_weight_decay=0.0, checkpointing_steps=10**6, seed=seed,
    )  # fmt: skip
    Trainer(train, tmp_path).fit(method, Pixels())
    found = student(noise, torch.ones(4).double(), {}).x0.detach()
    assert transport(found, truth(found.numel())) < BOUND
    # equal weights would be .2 off; .065 was seen, by how a CPU rounds
    assert abs(float((found < 0).float().mean()) - WEIGHTS[0]) < 0.1
    losses = {"loss/student", "loss/discriminator", "adversarial", "real_or_made", "r1_penalty"}
    known = {"r1", "logit_real", "logit_fake", "accuracy"}
    told = {key for row in rows(tmp_path) for key in row}
    assert told - losses - known == {"step", "loss", "grad_norm/student", "grad_norm/discriminator", "learning_rate"}


# -- killed and resumed ----------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "max_train_steps": 6, "train_batch_size": 4, "checkpointing_steps": 2, "ema_decay": 0.9, "lr_scheduler": "cosine"
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "warmup_steps": 3,
    "warmup_probabilities": (0.0, 0.0, 0.5, 0.5),
    "r1_every": 2,
    "guard_every": 2,
}


def play(folder: Path, kind: str, seed: int = 0, **changes: Any) -> LADD:
    method = game(kind, seed=seed, **OPTIONS)
    Trainer(options(**{**SETTINGS, **changes}), folder).fit(method, Prompted())
    return method


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    wanted = play(tmp_path / "whole", kind)
    for death in (3, 4, 5):
        folder = tmp_path / f"killed-{death}"
        dying = game(kind, **OPTIONS)
        with pytest.raises(Killed), stopping_after(dying, death, Killed.now):
            Trainer(options(**SETTINGS), folder).fit(dying, Prompted())
        found = play(folder, kind, seed=9, resume_from_checkpoint="latest")  # heads of other first weights
        same(folder, tmp_path / "whole")
        assert_close(weights(found), weights(wanted), **EXACT)
        assert found.taken == 6 and found.guard.state_dict() == wanted.guard.state_dict()
    tensors, state = saved(tmp_path / "whole")
    for name in ("heads.0.point.u", "heads.1.last.v", "scales", "embed.0.weight"):
        assert f"discriminator/{name}" in tensors
    assert {name.split("/")[0] for name in tensors} >= {"student.ema", "student.optimizer", "discriminator.optimizer"}
    assert state["method"]["taken"] == 6 and state["method"]["guard"]["accuracy"] != 0.5


def test_the_warm_up_goes_on_where_it_was(tmp_path: Path) -> None:
    """After two of three steps, one is left."""
    play(tmp_path / "whole", "full")
    play(tmp_path / "run", "full", max_train_steps=2, lr_scheduler="constant")
    method = game("full", **OPTIONS)
    times: list[list[float]] = []
    original = method.look
    method.look = lambda one: (times.append(original(one).t.tolist()), original(one))[1]  # type: ignore[method-assign]
    again = options(**{**SETTINGS, "lr_scheduler": "constant", "resume_from_checkpoint": "latest"})
    Trainer(again, tmp_path / "run").fit(method, Prompted())
    assert max(times[0]) <= 0.5 and max(max(t) for t in times[2:]) == 1.0


# -- cut in other ways -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    "penalties", [{}, {"approximate_r1": 1.0, "distillation": 1.0, "w": 0.5, "loss_type": "non_saturating"}]
)
def test_the_same_global_batch_in_other_parts_is_the_same_game(
    tmp_path: Path, kind: str, penalties: dict[str, Any]
) -> None:
    """1 x 8 == 2 x 4 == 8 x 1, in every tensor of both roles, the spectral vectors and the metrics."""
    folders: list[Path] = []
    for size in (8, 4, 1):
        folders.append(tmp_path / str(size))
        # with its default epsilon Adam would make a whole step of a gradient that is nothing but rounding
        train = options(
            max_train_steps=4,
            train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            adam_epsilon=1e-3,
            ema_decay=0.9,
        )
        method = game(kind, **{**OPTIONS, **penalties})
        Trainer(train, folders[-1]).fit(method, Prompted())
    (tensors, state), told = saved(folders[0]), rows(folders[0])
    for other in folders[1:]:
        found, its_state = saved(other)
        assert_close(found, tensors, rtol=1e-4, atol=1e-6)
        assert_close(rows(other), told, rtol=1e-4, atol=1e-5)
        assert its_state["method"]["taken"] == state["method"]["taken"] == 4


def test_a_spectral_norm_that_advanced_with_each_micro_batch_would_depend_on_the_cut(tmp_path: Path) -> None:
    """What the test above guards against, made on purpose."""
    ends = []
    for size in (8, 2):
        method = game()
        original = method.look

        def look(one: Any, game: LADD = method, original: Any = original) -> Any:
            game.discriminator.advance()
            return original(one)

        method.look = look  # type: ignore[method-assign]
        train = options(
            max_train_steps=3, train_batch_size=size, gradient_accumulation_steps=8 // size, adam_epsilon=1e-3
        )
        Trainer(train, tmp_path / str(size)).fit(method, Prompted())
        ends.append(weights(method))
    assert any(not torch.allclose(ends[0][n], ends[1][n], rtol=1e-4, atol=1e-6) for n in ends[0])


def test_a_finished_game_is_not_played_again(tmp_path: Path) -> None:
    first = play(tmp_path, "full")
    copied = tmp_path.parent / f"{tmp_path.name}-copy"
    shutil.copytree(tmp_path / "checkpoints", copied)
    again = play(tmp_path, "full", seed=5, resume_from_checkpoint="latest")
    assert_close(weights(again), weights(first), **EXACT)
    shutil.rmtree(copied)


def test_low_rates_of_the_discriminator_are_low(tmp_path: Path) -> None:
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    method = game(discriminator_rate=0.25)
    before = weights(method)
    train = options(max_train_steps=1, learning_rate=1e-2, adam_weight_decay=0.0, adam_epsilon=1e-12, max_grad_norm=0.0)
    Trainer(dataclasses.replace(train, train_batch_size=4), tmp_path).fit(method, Prompted())
    after = weights(method)
    steps = {role: max(float((after[n] - before[n]).abs().max()) for n in after if n.startswith(role) and n.endswith("weight"))
             for role in ("student", "discriminator")}  # fmt: skip
    assert math.isclose(steps["student"], 1e-2, rel_tol=1e-3) and math.isclose(
        steps["discriminator"], 2.5e-3, rel_tol=1e-3
    )
