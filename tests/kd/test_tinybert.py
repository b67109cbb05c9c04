"""TinyBERT's losses: against sums written out, and what must not matter: padding, order, cuts, kills."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import CLASSES, FULL, batch_of, bert, more_padding, scores_by_hand, student, teacher, texts
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close
from toys import EXACT, Killed, options, rows, saved, stopping_after

from stepdistill.batch import Batch
from stepdistill.config import CommaList
from stepdistill.errors import InputError
from stepdistill.kd.text_classifier import TextClassifier, TextLabels, accuracy
from stepdistill.kd.tinybert import (
    TinyBERTConfig,
    TinyBERTLayers,
    TinyBERTPrediction,
    attention_distance,
    hidden_distance,
    layer_map,
    projection,
    soft_cross_entropy,
)
from stepdistill.training.trainer import Trainer

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def layers(pupil: TextClassifier, wise: TextClassifier, double: bool = True, **changes: Any) -> TinyBERTLayers:
    made = projection(pupil, wise, 5)
    if double:
        for network in (pupil, wise, made):
            network.module.double()
    return TinyBERTLayers(TinyBERTConfig(**changes), pupil, wise, made)


def by_hand(method: TinyBERTLayers, batch: Batch, attention: float, hidden: float) -> Tensor:
    """Eq. 6 to 9 and 11, one text without padding, one layer, one head after the other."""
    total = torch.zeros((), dtype=torch.float64)
    w_e, w_h = method.projection.module.embeddings.weight.T, method.projection.module.layers.weight.T
    lengths = batch.extra["attention_mask"].sum(1).tolist()
    for ids, length in zip(batch.extra["input_ids"], lengths, strict=True):
        ours, theirs = (alone(network, ids[None, :length]) for network in (method.student, method.teacher))
        for m, n in enumerate(method.map):
            w = w_e if m == 0 else w_h
            total = total + hidden * functional.mse_loss(ours[0][m] @ w, theirs[0][n].detach())
            if m:
                heads = ours[1][m - 1].shape[1]
                apart = [
                    functional.mse_loss(ours[1][m - 1][:, h], theirs[1][n - 1][:, h].detach()) for h in range(heads)
                ]
                total = total + attention * torch.stack(apart).sum() / heads
    return total / len(lengths)


def alone(network: Any, ids: Tensor) -> tuple[Any, list[Tensor]]:
    """Hidden states and scores of a text by itself, the scores from the weights."""
    states = network.module(input_ids=ids, output_hidden_states=True).hidden_states
    count = network.module.config.num_attention_heads
    return states, [scores_by_hand(network.module, m, states[m], count) for m in range(len(states) - 1)]


def gradients(method: TinyBERTLayers) -> dict[str, Tensor]:
    named = {**method.student.named_trainable(), **method.projection.named_trainable()}
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("stated", [None, "1,4"])
def test_the_loss_and_its_gradient_are_the_papers_written_out(stated: str | None) -> None:
    changes = {} if stated is None else {"layers": CommaList.parse(stated)}
    method = layers(student(), teacher(), attention_weight=0.7, hidden_weight=0.3, **changes)
    batch = batch_of(texts(), range(7))
    losses = method.training_step(batch)
    wanted = by_hand(method, batch, 0.7, 0.3)
    assert_close(losses.total, wanted, **CLOSE)
    assert losses.count == 7.0 and losses.terms.keys() == {"hidden", "attention"}
    losses.total.backward()
    found = gradients(method)
    for network in (method.student, method.projection):
        network.module.zero_grad()
    wanted.backward()
    assert_close(found, gradients(method), rtol=1e-9, atol=1e-12)
    assert found.keys() == {*method.student.named_trainable(), "embeddings.weight", "layers.weight"}, "all is reached"


def test_padding_is_in_no_sum_and_no_denominator() -> None:
    method, batch = layers(student(), teacher()), batch_of(texts(), range(6))
    wanted = method.training_step(batch)
    wanted.total.backward()
    gradient = gradients(method)
    for by in (0, 3, 20):
        for network in (method.student, method.projection):
            network.module.zero_grad()
        found = method.training_step(more_padding(batch, by))
        assert_close(found.terms, wanted.terms, **CLOSE)
        found.total.backward()
        assert_close(gradients(method), gradient, rtol=1e-9, atol=1e-12)
    shuffled = method.training_step(batch_of(texts(), [3, 0, 5, 4, 2, 1]))
    assert_close(shuffled.terms, wanted.terms, **CLOSE)


def test_what_stands_at_padding_is_never_looked_at() -> None:
    real = torch.tensor([[True, True, False], [True, False, False]])
    h, a = torch.randn(2, 3, 4), torch.randn(2, 2, 3, 3)
    wild_h, wild_a = h.clone(), a.clone()
    wild_h[~real] = 1e30
    wild_a[0, :, 2, :] = wild_a[0, :, :, 2] = wild_a[1, :, 1:, :] = wild_a[1, :, :, 1:] = torch.inf
    assert_close(hidden_distance(wild_h, h + 1, real), torch.ones(2))
    assert_close(attention_distance(wild_a, a + 2, real), torch.full((2,), 4.0))
    nothing = torch.zeros_like(real)
    assert_close(hidden_distance(h, h + 1, nothing), torch.zeros(2))
    assert_close(attention_distance(a, a + 1, nothing), torch.zeros(2))


def test_half_precision_is_squared_in_full() -> None:
    real = torch.ones(1, 2, dtype=torch.bool)
    ours, theirs = torch.full((1, 1, 2, 2), 600.0).half(), torch.zeros(1, 1, 2, 2).half()
    assert_close(attention_distance(ours, theirs, real), torch.tensor([360000.0]))
    assert hidden_distance(ours[0], theirs[0], real).dtype == torch.float32


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    pupil, wise = TextClassifier(bert(0)).student(FULL), TextClassifier(bert(0)).frozen()
    method = layers(pupil, wise)
    total = method.training_step(batch_of(texts(), range(6))).total
    total.backward()
    assert total.item() == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in gradients(method).values())
    losses = TinyBERTPrediction(TinyBERTConfig(temperature=2.0), pupil, wise).training_step(batch_of(texts(), range(6)))
    losses.total.backward()
    assert abs(losses.metrics["kl"].item()) < 1e-12 < losses.total.item(), "the teacher's entropy is left"
    assert all(float(p.grad.abs().max()) < 1e-12 for p in pupil.trainable())


def test_no_gradient_reaches_the_teacher_or_the_head() -> None:
    pupil, wise = student(), teacher()
    wise.module.requires_grad_(True)
    method = layers(pupil, wise)
    method.training_step(batch_of(texts(), range(4))).total.backward()
    assert all(p.grad is None for p in wise.module.parameters())
    trained = set(method.student.named_trainable())
    everything = set(dict(pupil.module.named_parameters()))
    assert {name.split(".")[0] for name in everything - trained} == {"classifier", "bert"}
    assert {name for name in everything - trained if name.startswith("bert.")} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    }  # fmt: skip
    prediction = TinyBERTPrediction(TinyBERTConfig(), pupil, wise)
    prediction.training_step(batch_of(texts(), range(4))).total.backward()
    assert all(p.grad is None for p in wise.module.parameters())
    assert set(prediction.student.named_trainable()) == everything
    assert all(p.grad is not None for p in prediction.student.trainable())


def test_hidden_states_alone_need_no_heads_that_match() -> None:
    pupil, wise = student(heads=2), teacher()
    with pytest.raises(InputError, match=r"--student.heads 3, or --method.attention_weight 0"):
        layers(pupil, wise)
    method = layers(pupil, wise, attention_weight=0.0)
    losses = method.training_step(batch_of(texts(), range(4)))
    assert losses.terms.keys() == {"hidden"}
    assert_close(losses.total, by_hand_hidden(method, batch_of(texts(), range(4))), **CLOSE)


def by_hand_hidden(method: TinyBERTLayers, batch: Batch) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for ids, length in zip(batch.extra["input_ids"], batch.extra["attention_mask"].sum(1).tolist(), strict=True):
        ours, theirs = (alone(n, ids[None, :length])[0] for n in (method.student, method.teacher))
        projected = method.projection(list(ours))
        total = total + sum(functional.mse_loss(p, theirs[n]) for p, n in zip(projected, method.map, strict=True))
    return total / len(batch.extra["input_ids"])


@pytest.mark.parametrize(
    ("student_layers", "teacher_layers", "stated", "wanted"),
    [
        (4, 12, None, (0, 3, 6, 9, 12)), (6, 12, None, (0, 2, 4, 6, 8, 10, 12)), (3, 3, None, (0, 1, 2, 3)),
        (2, 5, (2, 5), (0, 2, 5)), (2, 12, (11, 12), (0, 11, 12)),
    ],
)  # fmt: skip
def test_layer_maps(student_layers: int, teacher_layers: int, stated: Any, wanted: tuple[int, ...]) -> None:
    assert layer_map(student_layers, teacher_layers, stated) == wanted


@pytest.mark.parametrize(
    ("student_layers", "teacher_layers", "stated"),
    [(5, 12, None), (3, 2, None), (2, 4, (2,)), (2, 4, (2, 5)), (2, 4, (0, 4)), (2, 4, (4, 2)), (2, 4, (2, 2)), (2, 4, ())],
)  # fmt: skip
def test_layer_maps_that_do_not_fit(student_layers: int, teacher_layers: int, stated: Any) -> None:
    with pytest.raises(InputError, match=r"--method.layers"):
        layer_map(student_layers, teacher_layers, stated)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_answers_are_compared_at_the_temperature_without_its_square(temperature: float) -> None:
    z, v = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    z.requires_grad_(True)
    found = soft_cross_entropy(z, v, temperature)
    wanted = functional.cross_entropy(z / temperature, (v / temperature).softmax(1), reduction="none")
    assert_close(found, wanted, **CLOSE)
    found.sum().backward()
    assert_close(z.grad, ((z / temperature).softmax(1) - (v / temperature).softmax(1)).detach() / temperature, **CLOSE)


def test_prediction_is_the_mean_over_texts() -> None:
    pupil, wise, batch = student(), teacher(), batch_of(texts(), range(5))
    losses = TinyBERTPrediction(TinyBERTConfig(temperature=2.0), pupil, wise).training_step(batch)
    given = batch.extra["input_ids"], batch.extra["attention_mask"]
    z, v = pupil(*given), wise(*given)
    assert_close(losses.total, functional.cross_entropy(z / 2, (v / 2).softmax(1)))
    kl = functional.kl_div((z / 2).log_softmax(1), (v / 2).softmax(1), reduction="batchmean")
    assert_close(losses.metrics["kl"], kl.detach())
    assert_close(losses.metrics["accuracy"], (z.argmax(1) == batch.extra["labels"]).float().mean())
    plain = TextLabels(pupil).training_step(batch)
    assert_close(plain.total, functional.cross_entropy(z, batch.extra["labels"]))
    assert plain.count == losses.count == 5.0


def test_answers_of_other_classes_are_refused() -> None:
    with pytest.raises(InputError, match="--stages.fine_tuned"):
        TinyBERTPrediction(TinyBERTConfig(), student(), teacher(classes=CLASSES[::-1]))


def test_the_projection_starts_as_the_identity_or_from_its_seed() -> None:
    same_width = projection(student(width=18), teacher(), 5).module
    for part in (same_width.embeddings, same_width.layers):
        assert_close(part.weight, torch.eye(18), **EXACT)
    one, again, other = (projection(student(), teacher(), seed).module for seed in (5, 5, 6))
    assert one.layers.weight.shape == (18, 12) and one.layers.bias is None
    assert_close(dict(one.state_dict()), dict(again.state_dict()), **EXACT)
    assert not torch.equal(one.layers.weight, other.layers.weight)
    assert not torch.equal(one.layers.weight, one.embeddings.weight)
    columns = torch.cat([part.weight.detach().square().sum(1) for part in (one.layers, one.embeddings)])
    assert float(columns.mean()) == pytest.approx(1.0, abs=0.2), "of unit length on average"


def test_recomputed_activations_are_refused_with_scores() -> None:
    pupil = student()
    pupil.checkpoint_activations()
    with pytest.raises(InputError, match="--train.gradient_checkpointing false"):
        layers(pupil, teacher())
    method = layers(pupil, teacher(), attention_weight=0.0)
    method.training_step(batch_of(texts(), range(3))).total.backward()


def test_a_teacher_that_is_smaller_is_named_once() -> None:
    large, small = layers(student(), teacher()), layers(student(layers=1), teacher(layers=1, width=6))
    assert large.watch({}) == "" and "wrong way round" in small.watch({}) and small.watch({}) == ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_weight": -1.0}, "--method.attention_weight"), ({"hidden_weight": 0.0}, "--method.hidden_weight"),
        ({"temperature": 0.0}, "--method.temperature"), ({"layers_rate": float("inf")}, "--method.layers_rate"),
        ({"layers": CommaList.parse("a,b")}, "integers"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(change: Mapping[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        TinyBERTConfig(**change)


# -- through the trainer ---------------------------------------------------------------------------------------------------


class Run:
    """Two fits over one student and projection, and a third of the answers."""

    def __init__(self, seed: int = 1) -> None:
        self.student, self.general, self.tuned = student(seed), teacher(0), teacher(9)
        self.projection = projection(self.student, self.general, seed)
        self.config = TinyBERTConfig()

    def stages(self) -> list[tuple[str, Any]]:
        parts = (self.config, self.student)
        return [
            ("general", lambda: TinyBERTLayers(*parts, self.general, self.projection)),
            ("intermediate", lambda: TinyBERTLayers(*parts, self.tuned, self.projection)),
            ("prediction", lambda: TinyBERTPrediction(*parts, self.tuned)),
        ]

    def fit(self, folder: Path, die: tuple[str, int] | None = None, **changes: Any) -> Run:
        trainer = Trainer(options(**{"max_train_steps": 4, "adam_epsilon": 1e-3, **changes}), folder)
        for name, made in self.stages():
            method = made()
            if die is not None and die[0] == name:
                with pytest.raises(Killed), stopping_after(method, die[1], Killed.now):
                    trainer.fit(method, texts(), name)
                return self
            trainer.fit(method, texts(), name)
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {**self.student.state(), **{f"p/{n}": t for n, t in self.projection.state().items()}}


@pytest.mark.parametrize("die", [("general", 3), ("intermediate", 7), ("prediction", 11)])
def test_killed_in_any_stage_and_resumed_is_the_same_to_the_bit(tmp_path: Path, die: tuple[str, int]) -> None:
    changes: dict[str, Any] = {"checkpointing_steps": 2, "ema_decay": 0.9}
    wanted = Run().fit(tmp_path / "whole", **changes)
    Run().fit(tmp_path / "killed", die, **changes)
    found = Run(seed=6).fit(tmp_path / "killed", resume_from_checkpoint="latest", **changes)
    assert_close(found.tensors(), wanted.tensors(), **EXACT)
    for name in ("general", "intermediate"):
        (tensors, state), (wanted_tensors, wanted_state) = (
            saved(tmp_path / folder, name) for folder in ("killed", "whole")
        )
        assert {"projection/layers.weight", "projection.optimizer/state.1.exp_avg"} <= tensors.keys()
        assert_close(tensors, wanted_tensors, **EXACT)
        assert state == wanted_state
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert {"hidden", "attention", "embeddings", "grad_norm/projection"} <= rows(tmp_path / "whole")[0].keys()


def test_the_projection_goes_on_from_one_stage_to_the_next_and_the_head_waits(tmp_path: Path) -> None:
    run = Run()
    before = {name: value.clone() for name, value in run.tensors().items()}
    run.fit(tmp_path, die=("intermediate", 7), checkpointing_steps=1)
    general, _ = saved(tmp_path, "general")
    middle, _ = saved(tmp_path, "intermediate")
    for name in ("embeddings.weight", "layers.weight"):
        assert not torch.equal(general[f"projection/{name}"], before[f"p/{name}"])
        assert not torch.equal(general[f"projection/{name}"], middle[f"projection/{name}"])
        apart = (middle[f"projection/{name}"] - general[f"projection/{name}"]).abs().max()
        assert apart < (general[f"projection/{name}"] - before[f"p/{name}"]).abs().max() * 4, "it was not drawn anew"
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert_close(middle[f"student/{name}"], before[name], **EXACT)


@pytest.mark.parametrize("stage", [0, 2])
def test_one_batch_of_eight_is_two_of_four(tmp_path: Path, stage: int) -> None:
    for name, more in (("one", {}), ("two", {"train_batch_size": 4, "gradient_accumulation_steps": 2})):
        Trainer(options(max_train_steps=4, adam_epsilon=1e-3, **more), tmp_path / name).fit(
            Run().stages()[stage][1](), texts()
        )
    assert_close(saved(tmp_path / "two")[0], saved(tmp_path / "one")[0], rtol=1e-4, atol=1e-6)
    assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"), rtol=1e-5, atol=1e-6)


def test_the_rate_of_the_layers_is_a_factor(tmp_path: Path) -> None:
    run = Run()
    run.config = TinyBERTConfig(layers_rate=0.0625)
    plain = Run()
    for folder, one in (("slow", run), ("plain", plain)):
        more = {"learning_rate": 1e-2} if one is run else {"learning_rate": 1e-2 / 16}
        Trainer(options(max_train_steps=2, **more), tmp_path / folder).fit(one.stages()[0][1](), texts())
    assert_close(run.tensors(), plain.tensors(), **EXACT)


def test_accuracy_counts_what_is_right() -> None:
    pupil, data = student(), texts(90)
    found = [int(pupil(**alone_batch(data, i)).argmax()) == data.rows[i].label for i in range(90)]
    assert accuracy(pupil, data) == pytest.approx(sum(found) / 90)
    assert pupil.module.training


def alone_batch(data: Any, i: int) -> dict[str, Tensor]:
    ids = torch.tensor([data.rows[i].ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
