"""The losses through the real trainer: sequences of unequal lengths, however they are split into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import rows, train, weights

from stepdistill.batch import Batch
from stepdistill.kd.chunked import Head, chunked_loss
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.reduction import Objective, dense_loss, length_mask, next_token
from stepdistill.method import Losses, Method
from stepdistill.networks.network import Module, Network
from stepdistill.randomness import StepRandom

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
V, SIZE = 13, 7
OBJECTIVE = Objective(Divergence("jsd", temperature=2.0), 1.0, 0.5)


class Sequences:
    """Token sequences of lengths 0 to 7, padded with their end token 0 as far as `size`."""

    def __init__(self, lengths: Sequence[int] = (7, 1, 4, 0, 2, 6, 3, 5), size: int = SIZE) -> None:
        self.lengths = torch.tensor(lengths)
        numbers = torch.Generator().manual_seed(3)
        tokens = torch.randint(1, V, (len(lengths), max(size, SIZE)), generator=numbers)[:, :size]
        self.tokens = tokens * length_mask(self.lengths - 1, size)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        chosen = list(indices)
        return Batch(None, {}, {}, rng, {"tokens": self.tokens[chosen], "lengths": self.lengths[chosen]})


class Tiny(nn.Module):
    """A language model that sees the last token alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, width), nn.Linear(width, V)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.embed(tokens))


def model(seed: int, width: int) -> Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Module(Tiny(width))


class Distil(Method):
    """A student of 4 numbers a token after a teacher of 6."""

    def __init__(self, chunked: bool) -> None:
        self.student, self.teacher, self.chunked = model(0, 4), model(1, 6).frozen_copy(), chunked
        self.counts: list[float] = []

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        tokens = batch.extra["tokens"]
        mask = length_mask(batch.extra["lengths"], tokens.shape[1])
        hidden, labels, valid = next_token(self.student(tokens), tokens, mask)
        teacher = self.teacher(tokens)[:, :-1]
        heads = [Head.of(network.module.head) for network in (self.student, self.teacher)]  # type: ignore[arg-type]
        if self.chunked:
            loss = chunked_loss(OBJECTIVE, hidden, heads[0], teacher, heads[1], valid, labels, 3)
        else:
            loss = dense_loss(OBJECTIVE, heads[0].logits(hidden), heads[1].logits(teacher), valid, labels)
        self.counts.append(loss.losses().count)  # type: ignore[arg-type]
        return loss.losses()


def run(folder: Path, chunked: bool, data: Any = None, **options: Any) -> tuple[Any, Any, list[float]]:
    method = Distil(chunked)
    train(folder, method, data or Sequences(), **{"max_train_steps": 4, **options})
    return weights(method), rows(folder), method.counts


@pytest.mark.parametrize("chunked", [False, True])
def test_accumulation_changes_nothing(tmp_path: Path, chunked: bool) -> None:
    """Losses, gradient norms and weights of 1x8, 2x4, 4x2 and 8x1 sequences of 0 to 7 tokens."""
    runs = [
        run(tmp_path / str(size), chunked, train_batch_size=size, gradient_accumulation_steps=parts)
        for size, parts in SPLITS
    ]
    assert {sum(counts) / 4 for _, _, counts in runs} == {21.0}  # of 28 tokens, the first of seven predicted by none
    assert 0.0 in runs[-1][2]  # sequences of one token or none give micro-batches without a valid one
    before = weights(Distil(chunked))
    assert all(not torch.equal(runs[0][0][name], value) for name, value in before.items())
    for found in runs[1:]:
        assert_close(found[0], runs[0][0], rtol=0, atol=1e-6)
        assert_close(found[1], runs[0][1], rtol=1e-5, atol=1e-6)


def test_chunked_and_dense_train_alike(tmp_path: Path) -> None:
    """Also their logged parts."""
    dense, chunked = run(tmp_path / "dense", False), run(tmp_path / "chunked", True)
    assert_close(chunked[0], dense[0], rtol=0, atol=1e-6)
    assert_close(chunked[1], dense[1], rtol=1e-5, atol=1e-6)
    row = chunked[1][0]
    assert row["loss"] == row["distillation"] == pytest.approx(row["kd"] + 0.5 * row["ce"], rel=1e-6)


def test_the_mean_is_over_tokens_and_not_over_sequences(tmp_path: Path) -> None:
    """One step in micro-batches of one sequence, against all tokens at once."""
    method, data = Distil(False), Sequences()
    whole = method.training_step(data.batch(range(8), StepRandom(0, 0, range(8)))).total.item()
    _, found, _ = run(tmp_path, True, train_batch_size=1, gradient_accumulation_steps=8, max_train_steps=1)
    assert found[0]["loss"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("chunked", [False, True])
def test_padding_changes_nothing(tmp_path: Path, chunked: bool) -> None:
    lengths = (4, 1, 4, 0, 2, 3, 3, 4)
    short, long = (run(tmp_path / str(size), chunked, Sequences(lengths, size)) for size in (4, 7))
    assert_close(long[0], short[0], rtol=0, atol=1e-6)
    assert_close(long[1], short[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_step_without_a_valid_token_moves_nothing(tmp_path: Path, chunked: bool) -> None:
    found, told, counts = run(tmp_path, chunked, Sequences((1, 0) * 4), adam_weight_decay=0.0)
    assert set(counts) == {0.0} and [row["loss"] for row in told] == [0.0] * 4
    assert_close(found, weights(Distil(chunked)), rtol=0, atol=0)
