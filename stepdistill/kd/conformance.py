"""What a distillation loss of language models has to get right, as checks with a number each.

python -m stepdistill.kd.conformance                  # ours, which passes all; exit status 1 otherwise
python -m stepdistill.kd.conformance --against trl    # what holds of TRL's losses, in the version that is installed
python -m stepdistill.kd.conformance --against liger

A check's deviation is 0 for the right loss, up to rounding. What a library leaves to its caller is said, not counted.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import InputError
from .adapters import LIBRARIES, Adapter, Case
from .cases import (
    H_T,
    LENGTHS,
    B,
    H,
    S,
    V,
    apart,
    case,
    drawn,
    evaluated,
    largest,
    logits_case,
    reference,
)


@dataclass(frozen=True)
class Check:
    """One property.

    Attributes:
        name: what holds.
        deviation: adapter -> how far it is from holding; NotImplementedError where it is no matter of the adapter's.
        bound: up to which it holds.
    """

    name: str
    deviation: Callable[[Adapter], float]
    bound: float


@dataclass(frozen=True)
class Outcome:
    """What came of a check.

    Attributes:
        check: its name.
        bound: of the check.
        deviation: the number; None where there is none.
        said: why there is none.
        holds: None where the check is no matter of the implementation's.
    """

    check: str
    bound: float
    deviation: float | None
    said: str
    holds: bool | None

    def line(self) -> str:
        """One row of a report."""
        verdict = {True: "holds", False: "FAILS", None: "none of its own"}[self.holds]
        number = self.said if self.deviation is None else f"{self.deviation:.2e} (bound {self.bound:.0e})"
        return f"  {self.check:<66} {verdict:<7} {number}".rstrip()


def from_reference(**changes: Any) -> Callable[[Adapter], float]:
    """How far loss and gradients of a case are from the definition's."""

    def deviation(adapter: Adapter) -> float:
        given = case(**changes)
        return apart(evaluated(adapter, given), reference(given))

    return deviation


def zero(adapter: Adapter) -> float:
    """Loss and gradients where student and teacher agree, in units of those of a case where they don't."""
    student, weight = case().student, case().weight
    same = case(teacher=student, teacher_weight=weight)
    return max(largest([a]) / largest([b]) for a, b in zip(evaluated(adapter, same), reference(case()), strict=True))


def symmetry(adapter: Adapter) -> float:
    """JSD(beta) of (p, q) against JSD(1 - beta) of (q, p)."""
    a, b = 2 * drawn(B, S, V, seed=0), 2 * drawn(B, S, V, seed=1)
    one = evaluated(adapter, logits_case(a, b, beta=0.3))[0]
    return apart([evaluated(adapter, logits_case(b, a, beta=0.7))[0]], [one])


def vanishing(adapter: Adapter) -> float:
    """JSD(beta) / beta -> KL(p||q): at beta = 0.001, of the paper's form."""
    small, pure = evaluated(adapter, case(beta=1e-3)), reference(case(beta=0.0))
    return apart([small[0] / 1e-3], [pure[0]])


def temperature(adapter: Adapter) -> float:
    """At T = 4: how far the gradients' norm is from that of T^2 D, as a share."""
    given = case(temperature=4.0, beta=0.0)
    return abs(float(evaluated(adapter, given)[2].norm() / reference(given)[2].norm()) - 1.0)


def accumulation(adapter: Adapter) -> float:
    """Two micro-batches of unequal numbers of tokens, summed, against all at once."""
    whole, items = case(), sum(LENGTHS)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        of: dict[str, Any] = {name: getattr(whole, name)[rows] for name in ("student", "teacher", "mask")}
        parts.append(evaluated(adapter, replace(whole, items=items, **of)))
    wanted = reference(whole)
    loss, weight = (sum(part[i] for part in parts) for i in (0, 2))
    return apart((loss, torch.cat([p[1] for p in parts]), weight), wanted)


def padding(adapter: Adapter) -> float:
    """Three masked places more in each sequence."""
    plain = case()
    more: dict[str, Any] = {
        "student": torch.cat([plain.student, drawn(B, 3, H, seed=8)], 1),
        "teacher": torch.cat([plain.teacher, drawn(B, 3, H_T, seed=9)], 1),
        "mask": torch.cat([plain.mask, torch.zeros(B, 3, dtype=torch.bool)], 1),
    }
    loss, student, weight = evaluated(adapter, replace(plain, **more))
    return max(apart((loss, student[:, :S], weight), reference(plain)), largest([student[:, S:]]))


def order(adapter: Adapter) -> float:
    """The sequences in another order."""
    plain, turned = case(), [2, 0, 3, 1]
    moved: dict[str, Any] = {name: getattr(plain, name)[turned] for name in ("student", "teacher", "mask")}
    loss, student, weight = evaluated(adapter, replace(plain, **moved))
    wanted = reference(plain)
    return apart((loss, student, weight), (wanted[0], wanted[1][turned], wanted[2]))


def spoiled(adapter: Adapter) -> float:
    """Logits of masked places are NaN: the loss and the logits' gradients."""
    mask = case().mask
    given = logits_case(drawn(B, S, V, seed=0), drawn(B, S, V, seed=1), mask=mask)
    student, teacher = (torch.where(mask[..., None], x, math.nan) for x in (given.student, given.teacher))
    return apart(evaluated(adapter, replace(given, student=student, teacher=teacher))[:2], reference(given)[:2])


def nothing(adapter: Adapter) -> float:
    """A micro-batch without a valid token: loss and gradients."""
    return largest(evaluated(adapter, case(mask=torch.zeros(B, S, dtype=torch.bool))))


def shift(adapter: Adapter) -> float:
    """Two tokens, the second to be learned: the share of the gradient that is not in the first row."""
    student, tokens = drawn(1, 2, V, seed=0).requires_grad_(), torch.tensor([[3, 5]])
    loss = adapter.sequence_loss(student, drawn(1, 2, V, seed=1), tokens, torch.tensor([[False, True]]))
    (gradient,) = torch.autograd.grad(loss, student)
    return float(gradient[0, 1].norm() / gradient.norm()) if gradient.norm() > 0 else math.inf


def end_token(adapter: Adapter) -> float:
    """Samples padded with their end token 0: places where the mask is wrong."""
    tokens = torch.tensor([[7, 0, 4, 5, 0, 0, 0], [7, 8, 4, 5, 6, 0, 0], [7, 8, 4, 5, 6, 9, 3]])
    wanted = torch.arange(7) >= 2
    wanted = wanted & (torch.arange(7) < torch.tensor([5, 6, 7])[:, None])
    return float((adapter.mask(tokens, 2, 0).bool() != wanted).sum())


def chunk_size(adapter: Adapter) -> float:
    """Chunks of 1, 3, 4 and 5 tokens."""
    if not adapter.chunked:
        raise NotImplementedError
    wanted = reference(case())
    return max(apart(evaluated(adapter, case(chunk_size=size)), wanted) for size in (1, 3, 4, 5))


def half_precision(adapter: Adapter) -> float:
    """bfloat16 inputs, in 64 chunks of 4 tokens: loss and the head's gradient, in units of a rounding to bfloat16."""
    shapes = {"student": (1, 256, H), "weight": (V, H), "teacher": (1, 256, H_T), "teacher_weight": (V, H_T)}
    states: dict[str, Any] = {name: drawn(*shape, seed=i).bfloat16() for i, (name, shape) in enumerate(shapes.items())}
    rounded = Case(**states, mask=torch.ones(1, 256, dtype=torch.bool), chunk_size=4)
    found, wanted = evaluated(adapter, rounded), reference(rounded)
    return apart(found[::2], wanted[::2]) / torch.finfo(torch.bfloat16).eps


CHECKS = (
    Check("JSD(0.5) and its gradients are those of the definition", from_reference(), 1e-5),
    Check("JSD(0.1) and its gradients are those of the definition", from_reference(beta=0.1), 1e-5),
    Check("beta = 0 is the forward KL", from_reference(beta=0.0), 1e-5),
    Check("beta = 1 is the reverse KL", from_reference(beta=1.0), 1e-5),
    Check("JSD(beta) / beta approaches the forward KL", vanishing, 0.1),
    Check("JSD(beta)(p, q) = JSD(1 - beta)(q, p)", symmetry, 1e-5),
    Check("zero loss and gradient where student and teacher agree", zero, 1e-5),
    Check("gradients keep their size over temperatures (T^2)", temperature, 1e-4),
    Check("a mean over valid tokens, however they are split", accumulation, 1e-5),
    Check("more padding changes nothing", padding, 1e-5),
    Check("the order of samples changes nothing", order, 1e-5),
    Check("what masked tokens hold changes nothing", spoiled, 1e-5),
    Check("a batch without a valid token: zero, and so are its gradients", nothing, 0.0),
    Check("row i learns token i + 1, and the mask moves along", shift, 0.0),
    Check("a sample's end token is learned where it pads, too", end_token, 0.0),
    Check("the chunk size changes nothing", chunk_size, 1e-5),
    Check("bfloat16 inputs, sums in float32 (units of one rounding)", half_precision, 1.0),
    Check("a teacher with more entries: the shared ones, renormalised", from_reference(entries=(V, V + 4)), 1e-5),
    Check("a student with more entries: the shared ones, renormalised", from_reference(entries=(V + 4, V)), 1e-5),
)


def examine(adapter: Adapter) -> list[Outcome]:
    """All checks of one implementation. What it raises is told, and does not hold."""
    found = []
    for check in CHECKS:
        try:
            deviation = check.deviation(adapter)
        except NotImplementedError:
            found.append(Outcome(check.name, check.bound, None, "", None))
        except (RuntimeError, ValueError, IndexError) as error:
            said = f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
            found.append(Outcome(check.name, check.bound, None, said, False))
        else:
            found.append(Outcome(check.name, check.bound, deviation, "", deviation <= check.bound))
    return found


def main(args: list[str] | None = None) -> int:
    """Prints a report; 1 if ours fails, 0 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=sorted(LIBRARIES), default="ours", help="whose losses to check")
    chosen = parser.parse_args(args).against
    failed = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries announce experimental features
            for make in LIBRARIES[chosen]:
                adapter = make()
                outcomes = examine(adapter)
                print(f"{adapter.name} ({adapter.versions})")
                print("\n".join(outcome.line() for outcome in outcomes))
                counts = [sum(o.holds is verdict for o in outcomes) for verdict in (True, False, None)]
                print("  {} hold, {} fail, {} are not its own matter\n".format(*counts))
                failed += counts[1]
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return int(chosen == "ours" and failed > 0)


if __name__ == "__main__":
    sys.exit(main())
