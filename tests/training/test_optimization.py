import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from toys import EXACT, network, options

from stepdistill.errors import InputError
from stepdistill.method import Losses
from stepdistill.training.optimization import Role, Sums, lr_factor, make_optimizer


@pytest.mark.parametrize(
    ("scheduler", "warmup", "expected"),
    [
        ("constant", 4, [1, 1, 1, 1, 1, 1, 1, 1]),  # as in Diffusers, constant has no warm-up
        ("constant_with_warmup", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("linear", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]),
        ("cosine", 4, [1 / 4, 2 / 4, 3 / 4, 1] + [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]),
    ],
)
def test_learning_rates_over_a_round_of_eight_steps(scheduler: Any, warmup: int, expected: list[float]) -> None:
    config = options(lr_scheduler=scheduler, lr_warmup_steps=warmup)
    assert_close([lr_factor(config, step, 8) for step in range(8)], [float(e) for e in expected], rtol=1e-12, atol=0)


def test_a_warm_up_longer_than_the_run_only_warms_up() -> None:
    config = options(lr_scheduler="cosine", lr_warmup_steps=100)
    assert [lr_factor(config, step, 8) for step in range(8)] == [(step + 1) / 100 for step in range(8)]


def test_the_optimizer_is_adamw_with_the_options_given() -> None:
    config = options(learning_rate=0.1, adam_beta1=0.5, adam_beta2=0.7, adam_weight_decay=0.2, adam_epsilon=1e-3)
    (group,) = make_optimizer(config, network(0)).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.1, (0.5, 0.7), 0.2, 1e-3)
    assert len(group["params"]) == 4
    with pytest.raises(ValueError, match="trainable"):
        make_optimizer(config, network(0).frozen_copy())


def with_gradients(value: float = 1.0, scaler: Any = None, seed: int = 0, **changes: Any) -> Role:
    """A role whose gradients are all `value`."""
    role = Role("student", network(seed), options(**changes), scaler)
    for parameter in role.parameters:
        parameter.grad = torch.full_like(parameter, value)
    return role


def gradients(role: Role) -> Tensor:
    return torch.cat([p.grad.flatten() for p in role.parameters if p.grad is not None])


def test_gradients_are_scaled_and_clipped_and_the_norm_is_that_before_clipping() -> None:
    role = with_gradients(2.0, max_grad_norm=1.0)
    size = sum(p.numel() for p in role.parameters)
    before = 0.5 * 2.0 * math.sqrt(size)
    assert before > 1
    assert_close(role.clip(0.5), before, rtol=1e-6, atol=0)
    assert_close(float(gradients(role).norm()), 1.0, rtol=1e-5, atol=0)
    assert_close(gradients(role), torch.full((size,), 1 / math.sqrt(size)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("limit", [0.0, 1e6])
def test_below_the_limit_and_without_one_gradients_stay_as_they_are(limit: float) -> None:
    role = with_gradients(2.0, max_grad_norm=limit)
    role.clip(1.0)
    assert_close(gradients(role), torch.full_like(gradients(role), 2.0), **EXACT)


def test_the_step_uses_the_clipped_gradient_and_the_learning_rate_given() -> None:
    role, size = with_gradients(2.0, max_grad_norm=0.1, adam_weight_decay=0.0), 0
    before = [p.detach().clone() for p in role.parameters]
    clipped = 0.1 / math.sqrt(sum(p.numel() for p in role.parameters))
    role.clip(1.0)
    role.step(0.25)
    for old, new in zip(before, role.parameters, strict=True):
        # AdamW's first step is lr g / (|g| + eps) whatever g is; the moments tell what it was
        assert_close(new.detach(), old - 0.25, rtol=0, atol=1e-5)
        assert_close(role.optimizer.state[new]["exp_avg"], torch.full_like(new, 0.1 * clipped), rtol=1e-4, atol=0)
        size += new.numel()
    assert all(p.grad is None for p in role.parameters)


def test_a_role_that_no_gradient_reached_says_so() -> None:
    role = Role("critic", network(0), options(), None)
    with pytest.raises(ValueError, match="no gradient reached 'critic'"):
        role.clip(1.0)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    role = with_gradients()
    lonely = role.parameters[0]
    lonely.grad, before = None, lonely.detach().clone()
    role.clip(1.0)
    role.step(0.1)
    assert_close(lonely.detach(), before, **EXACT)


def test_a_reset_forgets_the_moments() -> None:
    role = with_gradients()
    role.clip(1.0)
    role.step(0.1)
    assert role.optimizer_state()["state"]
    role.reset()
    assert not role.optimizer_state()["state"]


def test_restored_moments_come_with_the_options_of_now() -> None:
    role = with_gradients(adam_weight_decay=0.5)
    role.clip(1.0)
    role.step(0.1)
    other = Role("student", network(0), options(adam_weight_decay=0.1, adam_beta1=0.8), None)
    other.load_optimizer_state(role.optimizer_state())
    (group,) = other.optimizer.param_groups
    assert (group["weight_decay"], group["betas"][0]) == (0.1, 0.8)
    for mine, theirs in zip(other.parameters, role.parameters, strict=True):
        assert_close(other.optimizer.state[mine], role.optimizer.state[theirs], **EXACT)


# -- fp16's loss scaler, which PyTorch also has on the CPU ---------------------------------------------------------------


def test_two_roles_of_one_phase_share_one_scale() -> None:
    """Both were scaled by the same backward, so both are divided by the same, and the scale moves once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    scaler.scale(torch.ones(()))
    roles = [with_gradients(1024.0, scaler, seed, max_grad_norm=0.0) for seed in (0, 1)]
    for role in roles:
        role.clip(0.5)
        assert_close(gradients(role), torch.full_like(gradients(role), 0.5), **EXACT)
    for role in roles:
        role.step(0.1)
    scaler.update()
    assert scaler.get_scale() == 2048.0
    moments = [role.optimizer.state[role.parameters[0]]["exp_avg"] for role in roles]
    assert_close(moments[0], torch.full_like(moments[0], 0.05), rtol=1e-6, atol=0)
    assert_close(moments[1], moments[0], **EXACT)


def test_the_scaler_skips_an_overflow_and_lowers_its_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    role = with_gradients(math.inf, scaler)
    before = [p.detach().clone() for p in role.parameters]
    assert not math.isfinite(role.clip(1.0))
    role.step(0.1)
    scaler.update()
    assert scaler.get_scale() == 512.0
    for old, new in zip(before, role.parameters, strict=True):
        assert_close(new.detach(), old, **EXACT)


# -- means over micro-batches ---------------------------------------------------------------------------------------------


class Alone:
    num_processes, process_index = 1, 0


class Doubled:
    """Two processes that computed the same."""

    num_processes, process_index = 2, 1

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return 2 * values


def parts() -> Sums:
    sums = Sums()
    for value, count in ((1.0, 3.0), (5.0, 1.0)):
        terms = {"a": torch.tensor(value, requires_grad=True), "b": torch.tensor(10.0)}
        sums.add(Losses(terms, {"m": torch.tensor(value)}, torch.tensor(count)))
    return sums


@pytest.mark.parametrize(("accelerator", "count"), [(Alone(), 4.0), (Doubled(), 8.0)])
def test_means_are_weighted_by_their_counts(accelerator: Any, count: float) -> None:
    assert parts().means(accelerator) == ({"loss": 12.0, "a": 2.0, "b": 10.0, "m": 2.0}, count, [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("accelerator", "found"), [(Alone(), [2]), (Doubled(), [5])])
def test_micro_batches_without_a_finite_loss_are_found(accelerator: Any, found: list[int], value: float) -> None:
    sums = parts()
    sums.add(Losses({"a": torch.tensor(value), "b": torch.tensor(1.0)}, {"m": torch.tensor(1.0)}, 2.0))
    means, _, broken = sums.means(accelerator)
    assert broken == found and not math.isfinite(means["loss"]) and means["m"] == 10.0 / 6.0


def test_nothing_to_average_is_zero_not_nan() -> None:
    sums = Sums()
    sums.add(Losses({"a": torch.tensor(0.0)}, count=0))
    assert sums.means(Alone()) == ({"loss": 0.0, "a": 0.0}, 1.0, [])


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_train_steps": 0}, {"train_batch_size": -1}, {"gradient_accumulation_steps": 0}, {"checkpointing_steps": 0},
        {"lr_warmup_steps": -1}, {"max_grad_norm": -0.5}, {"max_grad_norm": math.nan}, {"adam_weight_decay": -1.0},
        {"adam_beta1": 1.0}, {"adam_beta2": -0.1}, {"adam_epsilon": 0.0}, {"learning_rate": 0.0}, {"seed": -1},
        {"learning_rate": math.nan}, {"ema_decay": 1.0}, {"checkpoints_total_limit": 0}, {"validation_steps": -1},
    ],
)  # fmt: skip
def test_impossible_options_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"fix --train.{next(iter(wrong))}"):
        options(**wrong)
