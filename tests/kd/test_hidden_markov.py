"""A hidden Markov model as teacher: what it says next is known exactly, and depends on all that was said before.

KL divergences are sums over all sequences, not samples.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from language import FULL, built
from torch import Tensor, nn
from torch.testing import assert_close
from toys import options

from stepdistill.data.tokens import Row, TokenRows
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.gkd import GKD, GKDConfig
from stepdistill.kd.language_model import LanguageModelKD, LanguageModelKDConfig
from stepdistill.kd.networks import CausalLM
from stepdistill.networks.network import Network
from stepdistill.training.trainer import Trainer

V, LENGTH = 4, 5
END = 4  # the fifth symbol of those that end
NEW = 3


class HiddenMarkov(nn.Module):
    """Log-probabilities of the next symbol by the forward algorithm; symbols that the mask leaves out were never said.

    Args:
        first: [S], of the hidden state at the first symbol.
        moves: [S, S], from a state (row) to the next.
        says: [S, V], the symbol in a state.
    """

    def __init__(self, first: Tensor, moves: Tensor, says: Tensor) -> None:
        super().__init__()
        self.first, self.moves, self.says = (nn.Parameter(p, requires_grad=False) for p in (first, moves, says))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Symbols [B, T] -> [B, T, V]: at t, what comes after symbols 0 .. t."""
        ahead = self.first.expand(len(ids), -1)  # p(state now | symbols before)
        found = []
        for t in range(ids.shape[1]):
            seen = ahead * self.says[:, ids[:, t]].t()  # the forward variable, normalised in the next line
            after = seen / seen.sum(1, keepdim=True).clamp(min=1e-30) @ self.moves
            ahead = torch.where(mask[:, t, None], after, ahead)
            found.append(ahead @ self.says)
        return torch.stack(found, 1).clamp(min=1e-30).log()

    def beginning(self) -> Tensor:
        """[V], of the first symbol."""
        return self.first @ self.says


def hidden_markov(states: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> HiddenMarkov:
    """Of `V` symbols, states that are kept for a while and say different things."""
    draws = torch.Generator().manual_seed(seed)

    def rows(*shape: int, spread: float) -> Tensor:
        return (spread * torch.randn(*shape, generator=draws, dtype=torch.float64)).softmax(-1)

    moves = 0.15 * rows(states, states, spread=1.0) + 0.85 * torch.eye(states, dtype=torch.float64)
    parts = rows(states, spread=0.5), moves, rows(states, V, spread=1.5)
    return HiddenMarkov(*(p.to(dtype) for p in parts))


def ending() -> HiddenMarkov:
    """The same with two states, and a third that says END for ever; END comes from nowhere else."""
    living = hidden_markov(2, seed=3)
    moves, says = torch.zeros(3, 3), torch.zeros(3, V + 1)
    moves[:2, :2], moves[:2, 2], moves[2, 2] = (
        living.moves * torch.tensor([[0.9], [0.7]]),
        torch.tensor([0.1, 0.3]),
        1.0,
    )
    says[:2, :V], says[2, END] = living.says, 1.0
    return HiddenMarkov(torch.cat([living.first, torch.zeros(1)]), moves, says)


class Model(Network):
    """A module of (ids, mask) where a language model is expected."""

    is_factored, window = False, None

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.net(ids, mask)


class Table(nn.Module):
    """Logits of their own after each of the V + V^2 + ... sequences that are shorter than LENGTH: all can be said."""

    def __init__(self) -> None:
        super().__init__()
        self.starts = [sum(V**k for k in range(1, t + 1)) for t in range(LENGTH)]
        self.logits = nn.Parameter(torch.zeros(sum(V**k for k in range(1, LENGTH + 1)), V))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        number, rows = torch.zeros(len(ids), dtype=torch.int64), []
        for t in range(ids.shape[1]):
            number = number * V + ids[:, t]
            rows.append(self.starts[t] + number)
        return self.logits[torch.stack(rows, 1)]


class Recurrent(nn.Module):
    """A GRU."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(V, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, V)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(ids))[0])


def sequences(length: int, symbols: int = V) -> Tensor:
    """[symbols^length, length], all of them."""
    return torch.tensor(list(itertools.product(range(symbols), repeat=length)))


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def picked(logs: Tensor, ids: Tensor) -> Tensor:
    """[N, T - 1]: of each symbol but the first, its log-probability after those before."""
    return logs[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)


# -- the teacher -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [1, 2, 3])
def test_the_forward_algorithm_is_a_sum_over_hidden_paths(states: int) -> None:
    teacher, ids = hidden_markov(states, dtype=torch.float64), sequences(4)
    wanted = torch.zeros(len(ids), dtype=torch.float64)
    for path in itertools.product(range(states), repeat=4):
        term = teacher.first[path[0]] * teacher.says[path[0]][ids[:, 0]]
        for t in range(1, 4):
            term = term * teacher.moves[path[t - 1], path[t]] * teacher.says[path[t]][ids[:, t]]
        wanted = wanted + term
    assert float(wanted.sum()) == pytest.approx(1.0, abs=1e-12)
    logs = teacher(ids, torch.ones_like(ids).bool())
    found = teacher.beginning()[ids[:, 0]].log() + picked(logs, ids).sum(1)
    assert_close(found, wanted.log(), rtol=0, atol=1e-12)
    assert_close(logs.exp().sum(-1), torch.ones(len(ids), 4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_it_remembers_more_than_the_last_symbol_and_not_what_is_masked() -> None:
    teacher, ids = hidden_markov(dtype=torch.float64), sequences(3)
    logs = teacher(ids, torch.ones_like(ids).bool())
    for last in range(V):
        after = logs[ids[:, 2] == last, 2]
        assert float(kl(after[:1], after).max()) > 0.05, "no bigram says this"
    padded = torch.cat([torch.full((len(ids), 2), 1), ids], 1)
    mask = torch.cat([torch.zeros(len(ids), 2), torch.ones(len(ids), 3)], 1).bool()
    assert_close(teacher(padded, mask)[:, 2:], logs, rtol=0, atol=1e-15)


# -- on given text ---------------------------------------------------------------------------------------------------------


def trained(folder: Path, module: nn.Module, steps: int, rate: float) -> Callable[[Tensor], Tensor]:
    """The student's log-probabilities after distillation with the forward KL, on a text for every beginning."""
    data = TokenRows([Row((*row, 0), (True,) * LENGTH) for row in sequences(LENGTH - 1).tolist()], 0)
    method = LanguageModelKD(LanguageModelKDConfig(), Model(module), Model(hidden_markov()))  # type: ignore[arg-type]
    train = options(max_train_steps=steps, train_batch_size=128, learning_rate=rate, adam_weight_decay=0.0,
                    lr_scheduler="cosine", adam_beta2=0.99)  # fmt: skip
    Trainer(train, folder).fit(method, data)
    module.eval()
    return lambda ids: module(ids, torch.ones_like(ids).bool()).detach().log_softmax(-1)


def forward_kl(student: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """(mean over what the teacher says, most after any beginning) of KL(teacher || student) a token, in nats."""
    teacher, ids = hidden_markov(), sequences(LENGTH)
    log_p, log_q = teacher(ids, torch.ones_like(ids).bool()), student(ids)
    weight = (teacher.beginning()[ids[:, 0]].log() + picked(log_p, ids).sum(1)).exp()
    assert float(weight.sum()) == pytest.approx(1.0, abs=1e-5)
    each = kl(log_p, log_q)[:, :-1]  # as many predictions as there are symbols but the first
    return float((weight[:, None] * each).sum() / (LENGTH - 1)), float(each.max())


@pytest.mark.parametrize(
    ("build", "steps", "rate"), [(Table, 60, 0.3), (Recurrent, 150, 2e-2)], ids=["table", "recurrent"]
)
def test_a_student_that_can_say_it_says_it(tmp_path: Path, build: Any, steps: int, rate: float) -> None:
    module = built(1, build).train()
    began, _ = forward_kl(lambda ids: module(ids, torch.ones_like(ids).bool()).detach().log_softmax(-1))
    mean, most = forward_kl(trained(tmp_path, module, steps, rate))
    assert began > 0.1 and mean < 1e-3, (began, mean, most)
    assert most < 2e-2, "also after what the teacher hardly says"


def test_no_bigram_comes_near() -> None:
    """The best of them gives after a symbol the mean of what the teacher says after it, over all places."""
    teacher, ids = hidden_markov(), sequences(LENGTH)
    log_p = teacher(ids, torch.ones_like(ids).bool())
    weight = (teacher.beginning()[ids[:, 0]].log() + picked(log_p, ids).sum(1)).exp()
    joint = torch.zeros(V, V)
    for t in range(LENGTH - 1):
        joint.index_add_(0, ids[:, t], weight[:, None] * log_p[:, t].exp())
    best, _ = forward_kl(lambda ids: (joint / joint.sum(1, keepdim=True)).log()[ids])
    assert best > 0.03, "30 times the bound on those that remember"


# -- on its own text -------------------------------------------------------------------------------------------------------


def gpt2() -> CausalLM:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=V + 1, n_positions=8, n_embd=32, n_layer=1, n_head=2, bos_token_id=END, eos_token_id=END,
        pad_token_id=END, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    return CausalLM(built(1, lambda: GPT2LMHeadModel(config))).student(FULL)


def prompts() -> list[tuple[int, ...]]:
    """All of one symbol and of two."""
    return [p for n in (1, 2) for p in itertools.product(range(V), repeat=n)]


def reverse_kl(student: CausalLM, teacher: Network, given: Sequence[tuple[int, ...]]) -> float:
    """KL(student || teacher) a written token, over all that the student may write after each prompt."""
    total = count = 0.0
    for prompt in given:
        written = sequences(NEW, V + 1)
        over = ((written == END).long().cumsum(1) - (written == END).long()) > 0  # after an end
        ids = torch.cat([torch.tensor(prompt).expand(len(written), -1), written], 1)[~(over & (written != END)).any(1)]
        over = over[~(over & (written != END)).any(1)]  # what follows an END is END: one sequence, not many
        mask = torch.ones_like(ids).bool()
        with student.evaluating():
            log_q, log_p = student(ids, mask).log_softmax(-1), teacher(ids, mask)
        start = len(prompt) - 1
        q = picked(log_q, ids)[:, start:].masked_fill(over, 0.0).sum(1).exp()
        assert float(q.sum()) == pytest.approx(1.0, abs=1e-5)
        each = kl(log_q, log_p)[:, start:-1].masked_fill(over, 0.0)
        total += float((q[:, None] * each).sum())
        count += float((q[:, None] * (~over).float()).sum())
    return total / count


def test_gkd_on_policy_with_the_reverse_kl_learns_what_to_say_after_its_own_words(tmp_path: Path) -> None:
    """Prompts of two lengths in one batch: one is padded on the left. Where nothing was padded it must be right too."""
    student, teacher = gpt2(), Model(ending())
    rows = [Row(p, (False,) * len(p), len(p), completed=False) for p in prompts()]
    data = TokenRows(rows, END)
    began = reverse_kl(student, teacher, prompts())
    config = GKDConfig(lmbda=1.0, max_new_tokens=NEW, divergence=Divergence("reverse_kl"))
    method = GKD(config, student, teacher, data, END)  # type: ignore[arg-type]
    train = options(max_train_steps=100, train_batch_size=40, learning_rate=1e-2, adam_weight_decay=0.0,
                    lr_scheduler="cosine", adam_beta2=0.99)  # fmt: skip
    Trainer(train, tmp_path).fit(method, data)
    found = reverse_kl(student, teacher, prompts())
    assert began > 0.3 and found < 5e-3, (began, found)
