"""The gradient of KL(student || teacher) over whole sequences, from samples (MiniLLM, arXiv 2306.08543, section 2.2).

The next token's KL has its gradient in closed form (the single step); what a token does to all that come after it is a policy
gradient on their log-ratios (the long part). The estimate is the gradient of a surrogate, whose value means nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Variant = Literal["paper", "reference"]
Weights = Literal["token", "exact"]


@dataclass(frozen=True)
class Written:
    """What is known of each written token, [B, T] each; whatever stands where the mask is False is not looked at.

    Attributes:
        kl: KL(q_t || p_t) of the two next-token distributions, with a graph.
        log_q: log q_t(y_t) of the token that was written, with a graph.
        log_p: log p_t(y_t), without.
        mask: bool; a row's written tokens follow one another.
    """

    kl: Tensor
    log_q: Tensor
    log_p: Tensor
    mask: Tensor


@dataclass(frozen=True)
class PolicyGradient:
    """An estimator of the gradient of E_{y~q} sum_t log q_t(y_t) / p_t(y_t).

    Attributes:
        variant: "paper" is eq. 3. "reference" is what the authors' code computes: its returns begin with the token's own
            log-ratio, whose gradient the single step has already, so that this is counted twice.
        teacher_share: alpha of eq. 4, the teacher's share in what wrote the text; 0 is the student alone.
        weights: importance weights where the share isn't 0: "token" is the paper's approximation by one factor q_t / p~_t,
            biased; "exact" gives each log-ratio the product of the factors up to its own token, unbiased, and of a variance
            that grows with length. Eq. 5's product up to t is biased too: it stands before log-ratios of later tokens.
        length_normalised: returns are means over the tokens that they sum (eq. 6), so that long texts are not preferred for
            their length; the gradient is no longer that of the KL.
        reward_clip: log-ratios are clipped to +- this; None leaves them.
    """

    variant: Variant = "paper"
    teacher_share: float = 0.0
    weights: Weights = "token"
    length_normalised: bool = False
    reward_clip: float | None = None

    def surrogate(self, written: Written, centre: float = 0.0, scale: float = 1.0) -> Tensor:
        """[B] sums over the tokens of each row, with a graph whose gradient is the estimate.

        Args:
            written: what was sampled.
            centre, scale: a return R counts as (R - centre) / scale. A centre that doesn't depend on these samples changes no
                expectation.
        """
        mask, log_ratio = written.mask, self._log_weights(written)
        rewards, total = self._rewards(written), log_ratio.cumsum(1)
        own = torch.exp(log_ratio if self.weights == "token" else total)  # w_t, below eq. 5
        if self.weights == "exact":
            single, long = torch.exp(total - log_ratio), self._returns(rewards * own, mask)
        else:
            single = own if self.variant == "paper" else torch.ones_like(own)
            long = own * self._returns(rewards, mask)
        advantages = (long - own * centre) / scale
        # eq. 7: w_t [grad KL(q_t||p_t) - R_{t+1} grad log q_t(y_t)]
        return torch.where(mask, single * written.kl - advantages * written.log_q, 0.0).sum(1)

    def returns(self, written: Written) -> Tensor:
        """R [B, T] of the tokens, without importance weights and without a graph; 0 where the mask is False."""
        return self._returns(self._rewards(written), written.mask)

    def _rewards(self, written: Written) -> Tensor:
        """log p_t(y_t) / q_t(y_t), clipped; 0 where the mask is False."""
        rewards = torch.where(written.mask, (written.log_p - written.log_q).detach(), 0.0)
        return rewards if self.reward_clip is None else rewards.clamp(-self.reward_clip, self.reward_clip)

    def _returns(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """Sums (or means) of the rewards after each token; with it in the reference's form."""
        counts = mask.to(rewards.dtype)
        if self.variant == "paper":
            found, later = _after(rewards), _after(counts)  # eq. 3: R_{t+1}
        else:
            found, later = _after(rewards) + rewards, _after(counts) + counts  # R_t: r_t a second time
        if self.length_normalised:
            # eq. 6, over the number of terms: T - t, where the paper's T - t - 1 would be 0 for a sum of one
            found = found / later.clamp(min=1.0)
        return torch.where(mask, found, 0.0)

    def _log_weights(self, written: Written) -> Tensor:
        """log q_t(y_t) / p~_t(y_t), p~ = alpha p + (1 - alpha) q (eq. 4); 0 where the mask is False."""
        log_q, alpha = written.log_q.detach(), self.teacher_share
        if not alpha:
            return torch.zeros_like(log_q)
        log_mixed = torch.logaddexp(written.log_p + math.log(alpha), log_q + math.log1p(-alpha))
        return torch.where(written.mask, log_q - log_mixed, 0.0)


def _after(values: Tensor) -> Tensor:
    """[B, T] -> the sums of all later ones."""
    return values.flip(1).cumsum(1).flip(1) - values
