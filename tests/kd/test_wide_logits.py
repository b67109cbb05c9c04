"""Logits in float32 under autocast: values and gradients are those of the layer itself, log-ratios keep their digits."""

import pytest
import torch
from language import FULL, VOCABULARY, gpt2
from torch.testing import assert_close

from stepdistill.data.tokens import Tokens
from stepdistill.kd import chunked
from stepdistill.kd.head import Head
from stepdistill.kd.minillm import scored
from stepdistill.kd.networks import CausalLM
from stepdistill.kd.wide_logits import wide_logits


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_values_and_gradients_are_the_layers(bias: bool, softcap: float | None) -> None:
    given = [drawn(0, 5, 4), drawn(1, 9, 4), *([drawn(2, 9)] if bias else [])]

    def made(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return wide_logits(h, Head(w, b, softcap))

    hidden, *head = given
    assert_close(made(*given), Head(*head, *([] if bias else [None]), softcap).logits(hidden))
    assert torch.autograd.gradcheck(made, given)


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_what_does_not_train_gets_none(trained: tuple[bool, bool]) -> None:
    hidden, weight = (drawn(i, 3, 4).requires_grad_(wanted) for i, wanted in enumerate(trained))
    found = wide_logits(hidden, Head(weight))
    assert found.requires_grad == any(trained)
    if any(trained):
        found.sum().backward()
    assert tuple(x.grad is not None for x in (hidden, weight)) == trained


def test_half_precision_is_widened_and_its_gradients_are_narrow() -> None:
    hidden, weight = (drawn(i, 6, 4, dtype=torch.bfloat16) for i in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = wide_logits(hidden, Head(weight))
    assert_close(found, hidden.float() @ weight.float().t())
    found.square().sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def far_from_zero(seed: int) -> CausalLM:
    """Its logits lie near -60, as GPT-2's do: a softmax cancels that."""
    module = gpt2(seed)
    with torch.no_grad():
        module.transformer.ln_f.bias += 1.0
        module.transformer.wte.weight -= 60.0 / module.config.n_embd
    return CausalLM(module)


def test_log_ratios_under_autocast_are_as_good_as_the_hidden_states() -> None:
    """Logits in bfloat16 would have steps of 0.25 there."""
    pupil, other = far_from_zero(1).student(FULL), far_from_zero(0).frozen()
    ids = torch.randint(0, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(0))
    tokens = Tokens(ids, torch.ones_like(ids).bool(), torch.ones_like(ids).bool())
    assert pupil.is_factored and float(pupil(ids, tokens.attention_mask).detach().mean()) < -50.0
    with torch.autocast("cpu", torch.bfloat16):
        found = scored(pupil, other, tokens)
        states = [lm.hidden(ids, tokens.attention_mask) for lm in (pupil, other)]
    wanted = []
    for lm, hidden in zip((pupil, other), states, strict=True):
        log_p = lm.head.logits(hidden.float()).log_softmax(-1)[:, :-1]
        wanted.append(log_p.gather(2, ids[:, 1:, None]).squeeze(2))
    ratio, exact = found.log_p - found.log_q, wanted[1] - wanted[0]
    assert_close(ratio[found.mask], exact[found.mask], rtol=1e-4, atol=1e-4)


def test_factors_have_autocasts_precision_where_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; sums are in float32 there too."""
    monkeypatch.setattr(chunked, "_low_precision", lambda *_: torch.bfloat16)
    hidden, weight = (drawn(i, 5, 4, dtype=torch.float32) for i in range(2))
    found = wide_logits(hidden, Head(weight))
    a, b = (x.detach().bfloat16().float() for x in (hidden, weight))
    assert_close(found, a @ b.t())
    gradient = torch.ones(5, 5)
    found.backward(gradient)
    assert_close(hidden.grad, gradient @ b)
    assert_close(weight.grad, gradient.t() @ a)
