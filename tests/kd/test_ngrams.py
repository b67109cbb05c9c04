"""Teachers whose every conditional is known: a table learns a bigram exactly; a student too small shows what each KL is for."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from language import batch_of
from torch import Tensor, nn
from toys import options

from stepdistill.data.tokens import Row, TokenRows
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.language_model import LanguageModelKD, LanguageModelKDConfig
from stepdistill.networks.network import Network
from stepdistill.training.trainer import Trainer

V = 17


class Table(nn.Module):
    """Logits [V, V] of the next token by the last one."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits[ids]


class Bell(nn.Module):
    """The same discrete Gaussian after every token: a mean and a width for all it can say."""

    def __init__(self, mean: float, log_width: float) -> None:
        super().__init__()
        self.mean, self.log_width = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(log_width))

    def forward(self, ids: Tensor) -> Tensor:
        away = torch.arange(V, dtype=torch.float32) - self.mean
        return (-0.5 * (away / self.log_width.exp()).square()).expand(*ids.shape, V)


class Model(Network):
    """Either of them where a language model is expected."""

    is_factored = False

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.net(ids)


def data(count: int = 64) -> TokenRows:
    """Uniform tokens: every one is followed."""
    ids = torch.randint(0, V, (count, 16), generator=torch.Generator().manual_seed(2))
    return TokenRows([Row(tuple(row), (True,) * 16) for row in ids.tolist()], 0)


def trained(folder: Path, module: nn.Module, teacher: Tensor, kind: Any, steps: int, rate: float) -> nn.Module:
    wise = Model(Table(teacher).requires_grad_(False))
    method = LanguageModelKD(LanguageModelKDConfig(Divergence(kind)), Model(module), wise)  # type: ignore[arg-type]
    train = options(
        max_train_steps=steps,
        train_batch_size=16,
        learning_rate=rate,
        adam_weight_decay=0.0,
        lr_scheduler="cosine",
        adam_beta2=0.99,
    )
    Trainer(train, folder).fit(method, data())
    return module


def bigram(seed: int = 0) -> Tensor:
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed))


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_table_learns_every_conditional_of_a_bigram(tmp_path: Path, kind: str) -> None:
    table = trained(tmp_path, Table(torch.zeros(V, V)), bigram(), kind, 150, 0.1)
    log_p = bigram().log_softmax(1)
    found = kl(log_p, next(table.parameters()).detach().log_softmax(1))
    assert float(kl(log_p, torch.zeros(V, V).log_softmax(1)).mean()) > 0.3, "where it began"
    assert float(found.max()) < 1e-3


def bell(mean: float, width: float) -> Tensor:
    with torch.no_grad():
        return Bell(mean, math.log(width))(torch.zeros(1, dtype=torch.int64))[0].log_softmax(0)


def test_a_student_too_small_covers_both_modes_or_seeks_one(tmp_path: Path) -> None:
    """Two modes after every token, at 5 and at 11: one bell can't have both. The optima are found by search."""
    two = torch.logaddexp(bell(5.0, 0.7) + math.log(0.6), bell(11.0, 0.7) + math.log(0.4))
    grid = [(m / 4, 1.2**w) for m in range(65) for w in range(-6, 12)]
    covering = min(grid, key=lambda g: float(kl(two, bell(*g))))
    seeking = min(grid, key=lambda g: float(kl(bell(*g), two)))
    assert 7.0 <= covering[0] <= 8.0 and covering[1] > 2.5, "the mean of all, and wide"
    assert seeking[0] == 5.0 and seeking[1] < 1.0, "the larger mode, and as narrow"
    for kind, wanted in (("forward_kl", covering), ("reverse_kl", seeking)):
        start = Bell(6.5, 0.5)  # nearer to the first mode
        module = trained(tmp_path / kind, start, two.expand(V, V), kind, 150, 0.1)
        mean, width = module.mean.item(), module.log_width.exp().item()
        assert abs(mean - wanted[0]) < 0.3 and abs(math.log(width / wanted[1])) < 0.25, (kind, mean, width, wanted)
        between = bell(mean, width).exp()[7:10].sum()  # where the teacher says nothing
        assert (float(between) > 0.2) == (kind == "forward_kl")


def test_the_data_are_what_they_are_said_to_be() -> None:
    batch = batch_of(data(), range(64))
    assert set(batch.extra["input_ids"].flatten().tolist()) == set(range(V))
