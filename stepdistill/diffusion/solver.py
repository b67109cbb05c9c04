"""Deterministic sampling. In (alpha, sigma) one line is DDIM (arXiv 2010.02502, eq. 12) and Euler on a flow alike."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .prediction import Prediction
from .schedule import NoiseSchedule, expand


def ddim(schedule: NoiseSchedule, prediction: Prediction, s: Tensor) -> Tensor:
    """x_s = alpha(s) x0 + sigma(s) eps: one step to time s [B]; returns [B, ...].

    On a variance-preserving schedule this is DDIM with eta = 0; on :class:`Flow` it is x_t + (s - t) v, Euler's step.
    A step to s where every sigma is 0 reads x0 alone, and one to alpha = 0 reads eps alone.
    """
    if not bool(schedule.sigma(s).any()):  # eps may be undetermined at t = 0, and is not needed
        return schedule.at(s, prediction.x0)[0] * prediction.x0
    alpha, sigma = schedule.at(s, prediction.eps)
    if not bool(schedule.alpha(s).any()):
        return sigma * prediction.eps
    return alpha * prediction.x0 + sigma * prediction.eps


def x0_of_step(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """The x0 with which one :func:`ddim` step from x_t at t lands on x_s at s < t; [B, ...], in float32 or better.

        x0 = (x_s - r x_t) / (alpha_s - r alpha_t),    r = sigma_s / sigma_t        (arXiv 2202.00512, algorithm 2)

    It asks for no eps, so it holds at alpha_t = 0 too, and at s = 0 it is x_s. On :class:`Flow` the velocity that goes with it
    is (x_s - x_t) / (s - t). t and s are [B]; ValueError where s is not before t.
    """
    r = schedule.sigma(s) / schedule.sigma(t)
    rest = schedule.alpha(s) - r * schedule.alpha(t)
    if not bool((rest > 0).all()):
        bad = ~(rest > 0)
        raise ValueError(f"expected steps towards the data, s < t, got t = {t[bad].tolist()}, s = {s[bad].tolist()}")
    return expand(1.0 / rest, x_s) * x_s - expand(r / rest, x_t) * x_t


def sample(
    denoise: Callable[[Tensor, Tensor], Prediction], schedule: NoiseSchedule, x_t: Tensor, grid: Tensor
) -> Tensor:
    """Follows `grid` [steps + 1] (decreasing times) from x_t [B, ...] at grid[0] to grid[-1], one :func:`ddim` a step.

    Args:
        denoise: (x_t, t [B]) -> Prediction.
    """
    if grid.ndim != 1 or len(grid) < 2 or not bool((grid[1:] < grid[:-1]).all()):
        raise ValueError(f"expected a grid of at least two strictly decreasing times, got {grid.tolist()}")
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        t, s = (u.double().expand(len(x_t)) for u in (t, s))
        x_t = ddim(schedule, denoise(x_t, t), s)
    return x_t


def multistep_consistency(
    denoise: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x_t: Tensor,
    times: Tensor,
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1): predict x0, re-noise to the next time, repeat.

    Args:
        denoise: (x_t, t [B]) -> x0, the consistency function.
        times: [steps] decreasing; x_t is at times[0].
        noise: step number (1, 2, ...) -> fresh noise like x_t.
    """
    x0 = denoise(x_t, times[0].double().expand(len(x_t)))
    for i, t in enumerate(times[1:], start=1):
        t = t.double().expand(len(x_t))
        x0 = denoise(schedule.add_noise(x0, noise(i), t), t)
    return x0
