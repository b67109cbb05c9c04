"""What benchmarks/kd_cost.py compares: a divergence from hidden states and heads, as stepdistill, TRL and Liger get to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.kd.chunked import Head, chunked_loss
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.reduction import Objective

OURS, TRL_DENSE, TRL_CHUNKED = "ours", "TRL's GKD", "TRL's chunked"
LIGER, LIGER_SMALL = "Liger's chunked", "Liger's chunked by 128"
THEIRS = (TRL_DENSE, TRL_CHUNKED, LIGER, LIGER_SMALL)
IGNORED = -100  # the label that all of them take for "not this token"


@dataclass(frozen=True)
class Setting:
    """Hidden states of N tokens, two heads, and the tokens that count.

    Attributes:
        hidden: of the student, [N, H], requires grad.
        weight: of its head, [V, H], requires grad.
        teacher_hidden, teacher_weight: [N, H_T], [V, H_T].
        mask: [N].
        beta: of the generalised JSD.
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    mask: Tensor
    beta: float

    @classmethod
    def drawn(
        cls, tokens: int, vocabulary: int, widths: tuple[int, int], beta: float, seed: int, valid: float = 1.0
    ) -> Setting:
        """Random ones, whose logits have a spread of about 2; `valid` is the share of tokens that count, evenly spaced."""
        numbers = torch.Generator().manual_seed(seed)
        (h, w), (h_t, w_t) = (
            (torch.randn(tokens, d, generator=numbers), torch.randn(vocabulary, d, generator=numbers).mul_(2 * d**-0.5))
            for d in widths
        )
        at = torch.arange(tokens, dtype=torch.float64)
        mask = ((at + 1) * valid).floor() > (at * valid).floor()
        return cls(h.requires_grad_(), w.requires_grad_(), h_t, w_t, mask, beta)

    @property
    def labels(self) -> Tensor:
        """[N]: any token where the mask holds, IGNORED elsewhere."""
        return torch.where(self.mask, 1, IGNORED)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """A backward; of hidden states and head."""
        self.hidden.grad = self.weight.grad = None
        loss.backward()
        if self.hidden.grad is None or self.weight.grad is None:
            raise RuntimeError("expected gradients of hidden states and head, got none")
        return self.hidden.grad, self.weight.grad


def ours(s: Setting) -> Tensor:
    """Mean over valid tokens, a scalar with a graph; so do the others."""
    objective = Objective(Divergence("jsd", s.beta))
    return chunked_loss(objective, s.hidden, Head(s.weight), s.teacher_hidden, Head(s.teacher_weight), s.mask).mean


def trl_dense(s: Setting) -> Tensor:
    """GKDTrainer's loss on the logits of both."""
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher = s.teacher_hidden @ s.teacher_weight.t()
    student = s.hidden @ s.weight.t()
    loss: Tensor = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], s.labels[None], beta=s.beta)
    return loss


def trl_chunked(s: Setting) -> Tensor:
    """DistillationTrainer's loss."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    states = s.hidden[None], s.teacher_hidden[None]
    loss: Tensor = _chunked_divergence_loss(*states, s.weight, s.teacher_weight, s.mask[None], s.beta)[0]
    return loss


def liger(s: Setting, chunk_size: int = 1024) -> Tensor:
    """LigerFusedLinearJSDLoss without its hard loss, eager: a compiled one needs a compiler where it runs."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, s.beta, IGNORED, compiled=False, chunk_size=chunk_size)
    found: Tensor = loss(s.hidden, s.weight, s.teacher_hidden, s.teacher_weight, s.labels)
    return found


SIDES: dict[str, Callable[[Setting], Tensor]] = {
    OURS: ours,
    TRL_DENSE: trl_dense,
    TRL_CHUNKED: trl_chunked,
    LIGER: liger,
    LIGER_SMALL: lambda s: liger(s, 128),
}


def installed() -> dict[str, str]:
    """Versions of TRL and Liger, those that are there."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("trl", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            warnings.warn(f"{name} is not installed; pip install -e '.[peers]'", stacklevel=2)
    return found


def available() -> list[str]:
    """The sides that can be measured here, ours first."""
    known = installed()
    return [OURS, *(s for s in THEIRS if ("trl" if s.startswith("TRL") else "liger-kernel") in known)]
