import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.batch import Cond
from stepdistill.diffusion.guidance import guide_scale, guide_w
from stepdistill.diffusion.prediction import KINDS, Kind, read, target
from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule, Tabulated
from stepdistill.diffusion.solver import ddim, sample
from stepdistill.families.analytic import Analytic, Gaussian, LinearStudent, Mixture, TwoClass


class VarianceExploding(NoiseSchedule):
    """alpha = 1, sigma = 6 t^2."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return 6.0 * t.square()


SD = Tabulated(torch.cumprod(1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0))
SCHEDULES: dict[str, NoiseSchedule] = {
    "sd": SD,
    "two levels, to zero": Tabulated(torch.tensor([0.6, 0.0], dtype=torch.float64)),
    "flow": Flow(),
    "cosine": Cosine(),
    "ve": VarianceExploding(),
}
X = torch.tensor([[-1.3], [0.4], [1.1], [2.6]], dtype=torch.float64)
LABELS: Cond = {"label": torch.tensor([0, 1, -1, 1])}


def at(value: float, batch: int = len(X)) -> Tensor:
    return torch.full((batch,), value, dtype=torch.float64)


def teacher(name: str, schedule: NoiseSchedule, kind: Kind = "eps") -> Analytic:
    if name == "gaussian":
        return Gaussian(2.0, 0.3, schedule, kind)
    if name == "mixture":
        return Mixture([-1.0, 1.5], [0.25, 0.4], [0.35, 0.65], schedule, kind)
    return TwoClass([-1.0, 2.0], 0.3, schedule, kind)


TEACHERS = ("gaussian", "mixture", "two classes")


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return SCHEDULES[request.param]


def solve_ode(denoiser: Analytic, x: Tensor, t: float, u: float) -> Tensor:
    """The probability-flow ODE dx/dt = alpha' x0 + sigma' eps by Runge-Kutta, from what the denoiser predicts."""
    from scipy.integrate import solve_ivp

    def velocity(time: float, state: np.ndarray) -> np.ndarray:
        x_t, now = torch.from_numpy(state.copy()).reshape(x.shape), at(time)
        prediction = denoiser(x_t, now, LABELS)
        return target("flow", denoiser.schedule, prediction.x0, prediction.eps, now).flatten().numpy()

    solution = solve_ivp(velocity, (t, u), x.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(solution.y[:, -1]).reshape(x.shape)


# DOP853 is SciPy's 8th-order Runge-Kutta; RK45 needs ten times the evaluations for these digits and is used once below.
@pytest.mark.parametrize(
    ("teacher_name", "kind"), [*(("gaussian", k) for k in KINDS), ("mixture", "v"), ("two classes", "v")]
)
def test_the_exact_map_is_the_ode(teacher_name: str, kind: Kind, schedule: NoiseSchedule) -> None:
    # between the knots: a kink inside costs the integrator its order. SD's knots are 1e-3 apart.
    spans = [(0.9997, 0.9992), (0.0207, 0.0201)] if schedule is SD else [(0.98, 0.55), (0.48, 0.2)]
    denoiser = teacher(teacher_name, schedule, kind)
    for t, u in spans:
        assert_close(solve_ode(denoiser, X, t, u), denoiser.exact_map(X, at(t), at(u), LABELS), rtol=0, atol=1e-10)


def test_the_exact_map_against_rk45() -> None:
    from scipy.integrate import solve_ivp

    mixture = teacher("mixture", Cosine(), "x0")

    def velocity(time: float, state: np.ndarray) -> np.ndarray:
        prediction = mixture(torch.from_numpy(state.copy()), at(time), {})
        return target("flow", Cosine(), prediction.x0, prediction.eps, at(time)).numpy()

    solution = solve_ivp(velocity, (0.9, 0.3), X[:, 0].numpy(), method="RK45", rtol=1e-9, atol=1e-10)
    expected = mixture.exact_map(X[:, 0], at(0.9), at(0.3))
    assert_close(torch.from_numpy(solution.y[:, -1]), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", TEACHERS)
def test_all_kinds_say_the_same_and_explain_x_t(name: str, schedule: NoiseSchedule) -> None:
    t = torch.tensor([0.98, 0.7, 0.31, 0.02], dtype=torch.float64)
    reference = teacher(name, schedule)
    x0, score = reference.posterior_mean(X, t, LABELS), reference.score(X, t, LABELS)
    eps = -schedule.sigma(t)[:, None] * score
    assert_close(schedule.add_noise(x0, eps, t), X, rtol=0, atol=1e-13)  # Tweedie's formula
    for kind in KINDS:
        denoiser = teacher(name, schedule, kind)
        assert_close(denoiser.call(X, t, LABELS), target(kind, schedule, x0, eps, t), rtol=0, atol=1e-13)
        prediction = denoiser(X, t, LABELS)
        assert_close(prediction.x0, x0, rtol=0, atol=1e-11)
        assert_close(prediction.eps, eps, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_score_is_the_gradient_of_the_log_density(name: str, schedule: NoiseSchedule) -> None:
    t = torch.tensor([0.98, 0.7, 0.31, 0.0], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    means, stds, shares = {
        "gaussian": ([[2.0]] * 4, [0.3], [1.0]),
        "mixture": ([[-1.0, 1.5]] * 4, [0.25, 0.4], [0.35, 0.65]),
        "two classes": ([[-1.0], [2.0], [0.5], [2.0]], [0.3], [1.0]),
    }[name]
    x = X[:, 0].clone().requires_grad_(True)
    std = torch.sqrt((alpha[:, None] * torch.tensor(stds)) ** 2 + sigma[:, None] ** 2)
    normal = torch.distributions.Normal(alpha[:, None] * torch.tensor(means, dtype=torch.float64), std)
    log_p = (torch.tensor(shares).double().log() + normal.log_prob(x[:, None])).logsumexp(1)
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    assert_close(teacher(name, schedule).score(X, t, LABELS)[:, 0], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TEACHERS)
def test_maps_compose_and_start_at_the_identity(name: str, schedule: NoiseSchedule) -> None:
    denoiser = teacher(name, schedule)
    x, t, s, u = X, at(0.93), at(0.5), at(0.0)
    assert_close(denoiser.exact_map(x, t, t, LABELS), x, rtol=0, atol=1e-12)
    halfway = denoiser.exact_map(x, t, s, LABELS)
    direct = denoiser.exact_map(x, t, u, LABELS)
    assert_close(denoiser.exact_map(halfway, s, u, LABELS), direct, rtol=0, atol=1e-11)
    assert_close(denoiser.exact_map(direct, u, t, LABELS), x, rtol=0, atol=1e-11)


def test_gaussian_map_by_hand() -> None:
    gaussian = teacher("gaussian", Flow())
    # at t = 1 all is noise; at t = .5: centre 1, variance .25 * .09 + .25
    assert_close(gaussian.exact_map(X, at(1.0), at(0.0)), 2 + 0.3 * X, rtol=0, atol=1e-15)
    assert_close(gaussian.exact_map(X, at(1.0), at(0.5)), 1 + math.sqrt(0.2725) * X, rtol=0, atol=1e-15)


def test_quantile_map_of_one_component_is_the_gaussian_map(schedule: NoiseSchedule) -> None:
    mixture, gaussian = Mixture([2.0, 2.0], [0.3, 0.3], [1, 3], schedule), Gaussian(2.0, 0.3, schedule)
    x = torch.tensor([[-30.0], [-1.0], [2.5], [40.0]], dtype=torch.float64)  # far tails too
    for t, u in ((1.0, 0.0), (0.8, 0.3), (0.2, 0.9)):
        assert_close(mixture.exact_map(x, at(t), at(u)), gaussian.exact_map(x, at(t), at(u)), rtol=1e-13, atol=1e-13)


def test_quantile_map_of_a_mirrored_mixture_is_mirrored() -> None:
    """Both tails, out to where 1 - F is far below float64's resolution near 1."""
    mixture = Mixture([-1.0, 1.5], [0.25, 0.4], [0.35, 0.65], Cosine())
    mirrored = Mixture([1.0, -1.5], [0.25, 0.4], [0.35, 0.65], Cosine())
    x = torch.linspace(-15, 15, 31, dtype=torch.float64)
    t, u = at(0.7, 31), at(0.0, 31)
    assert_close(mirrored.exact_map(-x, t, u), -mixture.exact_map(x, t, u), rtol=1e-12, atol=1e-12)
    assert_close(mixture.exact_map(mixture.exact_map(x, t, u), u, t), x, rtol=1e-11, atol=1e-11)


def test_quantile_map_keeps_quantiles() -> None:
    mixture = teacher("mixture", Cosine())
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    y = mixture.exact_map(x, at(1.0, 25), at(0.0, 25))
    normal = torch.special.ndtr
    share = 0.35 * normal((y + 1.0) / 0.25) + 0.65 * normal((y - 1.5) / 0.4)
    assert_close(share, normal(x), rtol=0, atol=1e-14)


def test_ddim_multiplier_is_the_step_that_the_solver_makes(schedule: NoiseSchedule) -> None:
    gaussian = Gaussian(2.0, 0.3, schedule)
    t, u = at(0.9), torch.tensor([0.0, 0.2, 0.5, 0.9], dtype=torch.float64)
    step = ddim(schedule, gaussian(X, t, {}), u)
    k, alpha_t, alpha_u = (f[:, None] for f in (gaussian.ddim_multiplier(t, u), schedule.alpha(t), schedule.alpha(u)))
    assert_close(step, alpha_u * 2.0 + k * (X - alpha_t * 2.0), rtol=0, atol=1e-12)
    assert_close(gaussian.ddim_multiplier(t, t), torch.ones(4).double())


def test_fixed_point_of_latent_consistency_models() -> None:
    """The product of the k's down the 50-point grid, and the bias of that solver against the ODE."""
    gaussian = Gaussian(2.0, 0.3, SD)
    x = torch.tensor([0.8], dtype=torch.float64)
    grid = SD.time(torch.cat([torch.arange(50, 0, -1) * 20 - 1, torch.tensor([0])]))
    k = gaussian.ddim_multiplier(grid[:-1], grid[1:]).prod()
    fixed_point = SD.alpha(grid[-1:]) * 2 + k * (x - SD.alpha(grid[:1]) * 2)
    assert_close(sample(lambda x, t: gaussian(x, t, {}), SD, x, grid), fixed_point, rtol=0, atol=1e-13)
    assert_close(fixed_point.item(), 2.1825, rtol=0, atol=5e-5)
    assert_close(gaussian.exact_map(x, grid[:1], grid[-1:]).item(), 2.1995, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_shifts_the_mean(kind: Kind, schedule: NoiseSchedule) -> None:
    t, w = torch.tensor([0.98, 0.7, 0.31, 0.02], dtype=torch.float64), at(3.0)
    two = TwoClass([-1.0, 2.0], 0.3, schedule, kind, uncond_mean=0.7)
    label = {"label": torch.ones(4, dtype=torch.int64)}
    cond, uncond = two(X, t, label), two(X, t, {"label": -label["label"]})
    for guided, mean in ((guide_w(cond, uncond, w), 2 + 3 * 1.3), (guide_scale(cond, uncond, w), 0.7 + 3 * 1.3)):
        expected = Gaussian(mean, 0.3, schedule, kind)(X, t, {})
        assert_close(guided.x0, expected.x0, rtol=1e-11, atol=1e-11)
        assert_close(guided.eps, expected.eps, rtol=1e-11, atol=1e-11)
    closed = two.guided(1, 3.0)
    assert_close(closed(X, t, {}).x0, guide_w(cond, uncond, w).x0, rtol=1e-11, atol=1e-11)


def test_two_class_labels() -> None:
    two = TwoClass([-1.0, 2.0], 0.3, Flow())
    assert_close(two.exact_map(X, at(1.0), at(0.0), LABELS)[:, 0], torch.tensor([-1, 2, 0.5, 2]) + 0.3 * X[:, 0])
    for bad in ({}, {"label": torch.tensor([0, 1, 2, 0])}, {"label": torch.tensor([0, 1, -2, 0])}):
        with pytest.raises(ValueError, match="label"):
            two(X, at(0.5), bad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEACHERS)
def test_taps_gradients_and_no_weights(name: str, kind: Kind) -> None:
    denoiser = teacher(name, Flow(), kind)
    assert denoiser.trainable() == []
    assert list(denoiser.module.parameters()) == []
    x = X.clone().requires_grad_(True)
    t = at(0.6).requires_grad_(True)
    with denoiser.taps(denoiser.tap_points) as features:
        prediction = denoiser(x, t, LABELS)
    assert set(features) == {"x0", "eps"}
    assert_close(features["x0"], prediction.x0, rtol=0, atol=1e-12)
    assert_close(features["eps"], prediction.eps, rtol=0, atol=1e-12)
    for feature in features.values():  # a generator's step goes back through the teacher
        for gradient in torch.autograd.grad(feature.sum(), (x, t), retain_graph=True):
            assert bool((gradient != 0).all())


@pytest.mark.parametrize("name", TEACHERS)
def test_output_is_differentiable_in_t(name: str, schedule: NoiseSchedule) -> None:
    denoiser = teacher(name, schedule, "flow")
    t, h = at(0.6021), 1e-6
    leaf = t.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(denoiser.call(X, leaf, LABELS).sum(), leaf)
    numeric = (denoiser.call(X, t + h, LABELS) - denoiser.call(X, t - h, LABELS))[:, 0] / (2 * h)
    assert_close(gradient, numeric, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", TEACHERS)
def test_dtypes_and_shapes(name: str, dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    exact, x = teacher(name, SD, "v"), torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = exact(x.double(), at(0.9), LABELS)
    prediction = exact(x, at(0.9), LABELS)
    assert exact.call(x, at(0.9), LABELS).dtype == prediction.x0.dtype == prediction.eps.dtype == wide
    tolerance = 1e-5 if wide == torch.float32 else 1e-14
    assert_close(prediction.x0.double(), reference.x0, rtol=0, atol=tolerance)
    assert_close(prediction.eps.double(), reference.eps, rtol=0, atol=tolerance)
    mapped = exact.exact_map(x, at(0.9), at(0.1), LABELS)
    assert mapped.dtype == wide
    assert_close(mapped.double(), exact.exact_map(x.double(), at(0.9), at(0.1), LABELS), rtol=0, atol=tolerance)


def test_a_mean_with_a_shape() -> None:
    mean = torch.arange(6.0).reshape(2, 3)
    gaussian = Gaussian(mean, 0.3, Flow(), "flow")
    assert_close(gaussian.exact_map(torch.zeros(4, 2, 3), at(1.0), at(0.0)), mean.expand(4, 2, 3))
    assert_close(gaussian(torch.zeros(4, 2, 3), at(1.0), {}).x0, mean.expand(4, 2, 3))


@pytest.mark.parametrize("name", TEACHERS)
def test_frozen_copies_agree(name: str) -> None:
    denoiser = teacher(name, Flow(), "flow")
    assert torch.equal(denoiser.frozen_copy()(X, at(0.4), LABELS).x0, denoiser(X, at(0.4), LABELS).x0)
    assert torch.equal(copy.deepcopy(denoiser)(X, at(0.4), LABELS).x0, denoiser(X, at(0.4), LABELS).x0)


def test_distributions_that_are_none() -> None:
    with pytest.raises(ValueError, match="std > 0"):
        Gaussian(0.0, 0.0, Flow())
    for means, stds, weights in (
        ([], [], []),
        ([1.0], [1.0, 1.0], [1.0]),
        ([1.0], [0.0], [1.0]),
        ([1.0], [1.0], [0.0]),
    ):
        with pytest.raises(ValueError, match="expected as many"):
            Mixture(means, stds, weights, Flow())


GRID = torch.tensor([0.95, 0.6, 0.25, 0.1], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_student_learns_the_teacher(kind: Kind) -> None:
    gaussian, student = Gaussian(2.0, 0.3, SD, kind), LinearStudent(GRID, SD, kind)
    assert [p.shape for p in student.trainable()] == [(4,), (4,)]
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.LBFGS(student.trainable(), lr=1.0, max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = (student.call(x, GRID, {}) - gaussian.call(x, GRID, {})).square().mean()
        error.backward()
        return error

    optimizer.step(loss)
    probe, t = torch.tensor([[0.3], [0.3]]), GRID[[2, 0]]
    assert_close(student(probe, t, {}).x0, gaussian(probe, t, {}).x0, rtol=1e-2, atol=1e-2)


def test_linear_student_is_affine_by_grid_index() -> None:
    student = LinearStudent(GRID, Flow(), "v")
    table = dict(student.module.named_parameters())
    with torch.no_grad():
        table["weight"].copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        table["bias"].copy_(torch.tensor([10.0, 20.0, 30.0, 40.0]))
    x = torch.full((2, 1, 3), 0.5)
    out = student.call(x, GRID[[3, 1]], {})
    assert_close(out, torch.tensor([42.0, 21.0]).reshape(2, 1, 1).expand(2, 1, 3))
    assert_close(student(x, GRID[[3, 1]], {}).x0, read("v", Flow(), out, x, GRID[[3, 1]]).x0)
    with pytest.raises(ValueError, match="on this student's grid"):
        student(x, at(0.5, 2), {})


def test_linear_student_imitates() -> None:
    x, t = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)), GRID
    shaped = Gaussian(torch.arange(6.0).reshape(2, 3), 0.3, SD, "v")
    student = LinearStudent(GRID, SD, "v", shape=(2, 3)).imitate(shaped)
    assert_close(student(x, t, {}).x0, shaped(x, t, {}).x0, rtol=1e-5, atol=1e-5)
    two = TwoClass([-1.0, 2.0], 0.3, SD, "v")
    student = LinearStudent(GRID, SD, "v").imitate(two, LABELS)
    assert_close(student(x, t, {}).x0, two(x, t, LABELS).x0, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="predicts 'v'"):
        student.imitate(Gaussian(0.0, 1.0, SD, "eps"))
