import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.diffusion.prediction import KINDS, Kind, Prediction, coefficients, determines, read, target
from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule, Tabulated

TIMES = torch.tensor([0.003, 0.0304, 0.25, 0.5, 0.77, 0.998], dtype=torch.float64)


def pair(
    numbers: torch.Generator, batch: int = len(TIMES), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    x0, eps = (torch.randn(batch, 2, 3, dtype=torch.float64, generator=numbers).to(dtype) for _ in range(2))
    return x0, eps


@pytest.mark.parametrize("kind", KINDS)
def test_target_then_read_is_the_identity(kind: Kind, schedule: NoiseSchedule, numbers: torch.Generator) -> None:
    x0, eps = pair(numbers)
    x_t = schedule.add_noise(x0, eps, TIMES)
    prediction = read(kind, schedule, target(kind, schedule, x0, eps, TIMES), x_t, TIMES)
    # one unknown is a difference divided by a small factor near the ends, hence the condition number in the tolerance
    condition = float((1 / torch.minimum(schedule.sigma(TIMES), schedule.alpha(TIMES))).max())
    assert_close(prediction.x0, x0, rtol=0, atol=max(1e-12, 1e-15 * condition))
    assert_close(prediction.eps, eps, rtol=0, atol=max(1e-12, 4e-15 * condition))


def test_targets_by_hand(schedule: NoiseSchedule, numbers: torch.Generator) -> None:
    x0, eps = pair(numbers)
    alpha, sigma = (f.reshape(-1, 1, 1) for f in (schedule.alpha(TIMES), schedule.sigma(TIMES)))
    assert_close(target("eps", schedule, x0, eps, TIMES), eps)
    assert_close(target("x0", schedule, x0, eps, TIMES), x0)
    assert_close(target("v", schedule, x0, eps, TIMES), alpha * eps - sigma * x0)
    # flow is the velocity of x_t at fixed (x0, eps), by finite differences at times off the knots
    t, h = TIMES - 1.3e-5, 1e-7
    velocity = (schedule.add_noise(x0, eps, t + h) - schedule.add_noise(x0, eps, t - h)) / (2 * h)
    assert_close(target("flow", schedule, x0, eps, t), velocity, rtol=1e-6, atol=1e-6)
    assert_close(target("flow", Flow(), x0, eps, TIMES), eps - x0)


@pytest.mark.parametrize("kind", ["v", "flow"])
@pytest.mark.parametrize("name", ["cosine", "table"])
def test_both_ends_are_determined_by_v_and_flow(kind: Kind, name: str, numbers: torch.Generator) -> None:
    schedule = Cosine() if name == "cosine" else Tabulated(torch.tensor([0.7, 0.2, 0.0]))
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x0, eps = pair(numbers, 2)
    prediction = read(kind, schedule, target(kind, schedule, x0, eps, t), schedule.add_noise(x0, eps, t), t)
    assert_close(prediction.x0, x0, rtol=0, atol=1e-12)
    assert_close(prediction.eps, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "schedule_at_zero", [Flow(), Cosine(), Tabulated(torch.tensor([0.5, 0.0]))], ids=lambda s: type(s).__name__
)
def test_what_is_not_determined_raises_and_the_rest_does_not(
    schedule_at_zero: NoiseSchedule, numbers: torch.Generator
) -> None:
    x0, eps = pair(numbers, 2)
    t = torch.tensor([0.5, 1.0], dtype=torch.float64)  # one good sample, one with alpha = 0
    prediction = read("eps", schedule_at_zero, eps, schedule_at_zero.add_noise(x0, eps, t), t)
    assert_close(prediction.eps, eps)
    with pytest.raises(ValueError, match="at t = 1 "):
        _ = prediction.x0

    t = torch.tensor([0.5, 0.0], dtype=torch.float64)  # sigma = 0
    prediction = read("x0", schedule_at_zero, x0, schedule_at_zero.add_noise(x0, eps, t), t)
    assert_close(prediction.x0, x0)
    with pytest.raises(ValueError, match="at t = 0 "):
        _ = prediction.eps

    # the good halves: x0 of an eps output on clean data, eps of an x0 output on pure noise
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert_close(read("eps", schedule_at_zero, eps, x0, zero).x0, x0)
    assert_close(read("x0", schedule_at_zero, x0, eps, one).eps, eps)


@pytest.mark.parametrize("bad", [999.0, 1.01, -0.001, float("nan")])
def test_times_outside_the_unit_interval(bad: float) -> None:
    x = torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"times in \[0, 1\]"):
        read("v", Flow(), x, x, torch.tensor([0.5, bad], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: Kind, dtype: torch.dtype, sd: Tabulated, numbers: torch.Generator) -> None:
    expected = torch.promote_types(dtype, torch.float32)
    x0, eps = pair(numbers, dtype=dtype)
    assert target(kind, sd, x0, eps, TIMES).dtype == expected
    prediction = read(kind, sd, eps, x0, TIMES)
    assert prediction.x0.dtype == prediction.eps.dtype == expected


def test_a_half_precision_output_is_read_in_float32(sd: Tabulated, numbers: torch.Generator) -> None:
    x_t, output = pair(numbers, 2, torch.float16)
    t = torch.ones(2, dtype=torch.float64)
    exact = read("eps", sd, output.double(), x_t.double(), t).x0
    assert_close(read("eps", sd, output, x_t, t).x0.double(), exact, rtol=1e-5, atol=1e-5)  # in half: off by 1e-2


def test_eps_error_is_amplified_at_the_end_of_the_table(sd: Tabulated) -> None:
    x, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    amplified = read("eps", sd, x, x, one).x0 - read("eps", sd, x + 1, x, one).x0
    assert_close(amplified.item(), 14.61, rtol=0, atol=0.01)  # sigma / alpha


def test_gradients_reach_output_and_x_t(schedule: NoiseSchedule) -> None:
    t = torch.tensor([0.4], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
    output, x_t = (torch.ones(1, 1, dtype=torch.float64).requires_grad_(True) for _ in range(2))
    by_output, by_x_t = torch.autograd.grad(read("eps", schedule, output, x_t, t).x0.sum(), (output, x_t))
    assert_close((by_output.item(), by_x_t.item()), (-sigma / alpha, 1 / alpha))


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_differentiable_in_t(kind: Kind, schedule: NoiseSchedule, numbers: torch.Generator) -> None:
    output, x_t = pair(numbers, 1)
    t, h = torch.tensor([0.6021], dtype=torch.float64), 1e-6

    def total(u: Tensor) -> Tensor:
        prediction = read(kind, schedule, output, x_t, u)
        return (prediction.x0 + 2 * prediction.eps + 0 * u.reshape(-1, 1, 1)).sum()

    numeric = (total(t + h) - total(t - h)) / (2 * h)
    leaf = t.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    assert_close(gradient.squeeze(), numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, at the first jvp of a process
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_agrees_with_backward(kind: Kind, sd: Tabulated, numbers: torch.Generator) -> None:
    output, x_t = pair(numbers, 1)
    t = torch.tensor([0.6021], dtype=torch.float64)
    for schedule in (sd, Flow(), Cosine()):

        def total(u: Tensor, schedule: NoiseSchedule = schedule) -> Tensor:
            prediction = read(kind, schedule, output, x_t, u)
            return (prediction.x0 + 2 * prediction.eps).sum()

        leaf = t.clone().requires_grad_(True)
        (backward,) = torch.autograd.grad(total(leaf), leaf)
        _, forward = torch.func.jvp(total, (t,), (torch.ones_like(t),))
        assert_close(forward, backward.squeeze())


def test_a_first_look_under_no_grad_keeps_the_graph() -> None:
    output, t = torch.ones(1, 1, requires_grad=True), torch.tensor([0.5], dtype=torch.float64)
    prediction = read("v", Flow(), output, torch.ones(1, 1), t)
    with torch.no_grad():
        _ = prediction.x0.mean(), prediction.eps.mean()
    assert prediction.x0.requires_grad
    assert prediction.eps.requires_grad
    assert not prediction.detach().x0.requires_grad
    assert not prediction.detach().eps.requires_grad
    with torch.no_grad():
        made_without = read("v", Flow(), output, torch.ones(1, 1), t)
    assert not made_without.x0.requires_grad


def test_programming_errors() -> None:
    with pytest.raises(ValueError, match="both x0 and eps"):
        Prediction(x0=torch.ones(1))
    with pytest.raises(ValueError, match="prediction kind"):
        coefficients("score", Flow(), TIMES)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_determined_is_known_beforehand(kind: Kind, schedule: NoiseSchedule) -> None:
    x = torch.ones(1, 2, dtype=torch.float64)
    for u in (0.0, 0.4, 0.5, 1.0):  # at a half a flow has as much data as noise
        t = torch.full((1,), u, dtype=torch.float64)
        prediction = read(kind, schedule, x, x, t)
        try:
            known = prediction.x0 is not None and prediction.eps is not None
        except ValueError:
            known = False
        assert determines(kind, schedule, t).tolist() == [known]


def test_which_kinds_determine_both_at_zero_terminal_snr() -> None:
    one = torch.ones(1, dtype=torch.float64)
    for zero in (Flow(), Cosine()):
        assert {kind: bool(determines(kind, zero, one)) for kind in KINDS} == {
            "eps": False, "x0": True, "v": True, "flow": True
        }  # fmt: skip
