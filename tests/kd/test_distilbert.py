"""DistilBERT: layers copied to the bit, three losses against sums written out, what must not matter: padding, cuts, order."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cloze import framed, masked_model, pupil, sage, taken
from torch import Tensor
from torch.testing import assert_close
from toys import EXACT, Killed, options, recorded, rows, same, saved, stopping_after

from stepdistill.config import CommaList
from stepdistill.data.masked import MaskedRows, MaskedTokens
from stepdistill.data.tokens import Row
from stepdistill.errors import InputError
from stepdistill.kd.depth import PARTS, check_layers, shallower, spread
from stepdistill.kd.distilbert import DistilBERT, DistilBERTConfig, ShallowConfig, cosine_loss
from stepdistill.kd.masked import MaskedLM, MaskedToken
from stepdistill.method import Method
from stepdistill.training.trainer import Trainer

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
PAPER = (0, 2, 4, 7, 9, 11)
COSINE = {"kd_weight": 0.0, "mlm_weight": 0.0, "cosine_weight": 1.0}


# -- layers ----------------------------------------------------------------------------------------------------------------


def test_layers_are_spread_from_the_first_to_the_last() -> None:
    assert spread(12, 6) == PAPER
    assert spread(6, 3) == (0, 3, 5) and spread(4, 2) == (0, 3) and spread(24, 12)[::11] == (0, 23)
    for deep in range(1, 25):
        assert spread(deep, deep) == tuple(range(deep)) and spread(deep, 1) == (0,)
        for shallow in range(2, deep + 1):
            assert check_layers(spread(deep, shallow), deep)[0] == 0 and spread(deep, shallow)[-1] == deep - 1


@pytest.mark.parametrize(
    ("given", "deep", "said"),
    [
        ({"layers": "0,2,12"}, 12, r"12 layers, 0 to 11.*0,2,12 \(12 is none"), ({"layers": "-1,2"}, 4, "-1 is none"),
        ({"layers": "2,1"}, 4, "above the one before"), ({"layers": "1,1"}, 4, "above the one before"),
        ({"depth": 5}, 4, r"1 to 4 layers.*got 5.*--student\.depth"), ({"depth": 0}, 4, r"got 0.*--student\.depth"),
        ({"layers": "0,2", "depth": 3}, 4, "got 2 and 3"), ({"layers": "0,x"}, 4, r"0,x.*--student\.layers"),
        ({"segment": "both"}, 4, r"--student\.segment"),
    ],
)  # fmt: skip
def test_maps_that_do_not_fit(given: Mapping[str, Any], deep: int, said: str) -> None:
    known = {**given, **({"layers": CommaList.parse(given["layers"])} if "layers" in given else {})}
    with pytest.raises(InputError, match=said):
        ShallowConfig(**known).chosen(deep)


def test_which_layers_a_config_chooses() -> None:
    assert ShallowConfig().chosen(12) == PAPER and ShallowConfig().chosen(1) == (0,)
    assert ShallowConfig(depth=2).chosen(5) == (0, 4)
    assert ShallowConfig(layers=CommaList.parse("1,2"), depth=2).chosen(5) == (1, 2)


def test_copied_weights_are_the_teachers_to_the_bit() -> None:
    teacher = sage(layers=12)
    theirs, ours = teacher.module.state_dict(), shallower(teacher, PAPER, keep_segment=False).module.state_dict()
    assert len(ours) == 4 + 16 * 6 + 6
    block = {"q_lin": "attention.self.query", "k_lin": "attention.self.key", "v_lin": "attention.self.value",
             "out_lin": "attention.output.dense"}  # fmt: skip
    norms = {"sa_layer_norm": "attention.output.LayerNorm", "ffn.lin1": "intermediate.dense", "ffn.lin2": "output.dense",
             "output_layer_norm": "output.LayerNorm"}  # fmt: skip
    pairs = {f"attention.{name}": value for name, value in block.items()} | norms
    wanted = {}
    for kind in ("weight", "bias"):
        for place, layer in enumerate(PAPER):
            for name, source in pairs.items():
                wanted[f"distilbert.transformer.layer.{place}.{name}.{kind}"] = theirs[
                    f"bert.encoder.layer.{layer}.{source}.{kind}"
                ]
        wanted[f"distilbert.embeddings.LayerNorm.{kind}"] = theirs[f"bert.embeddings.LayerNorm.{kind}"]
        wanted[f"vocab_transform.{kind}"] = theirs[f"cls.predictions.transform.dense.{kind}"]
        wanted[f"vocab_layer_norm.{kind}"] = theirs[f"cls.predictions.transform.LayerNorm.{kind}"]
        wanted[f"vocab_projector.{kind}"] = theirs[f"cls.predictions.decoder.{kind}"]
    for name in ("word", "position"):
        wanted[f"distilbert.embeddings.{name}_embeddings.weight"] = theirs[f"bert.embeddings.{name}_embeddings.weight"]
    assert_close(dict(ours), wanted, **EXACT)
    kept = shallower(teacher, PAPER).module.state_dict()
    name = "distilbert.embeddings.position_embeddings.weight"
    segment = theirs["bert.embeddings.token_type_embeddings.weight"]
    assert torch.equal(kept[name], ours[name] + segment[0]) and not torch.equal(segment[0], segment[1])
    assert all(torch.equal(kept[n], ours[n]) for n in ours if n != name)
    assert len(set(PARTS.values())) == len(PARTS)


def test_the_student_computes_with_its_teachers_layers() -> None:
    """Hidden states of 12-layer BERT, its layers 0, 2, 4, 7, 9 and 11 applied one after the other by hand."""
    teacher = sage(layers=12)
    student = shallower(teacher, PAPER)
    tokens = MaskedTokens.of(taken(framed(), range(6, 12)))
    bert, mask = teacher.module.bert, tokens.attention_mask
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None, :]
    with torch.no_grad():
        state = bert.embeddings(tokens.input_ids)  # of segment 0
        wanted = [state]
        for layer in PAPER:
            out = bert.encoder.layer[layer](state, additive)
            state = out if isinstance(out, Tensor) else out[0]
            wanted.append(state)
        found = student.hidden_states(tokens.input_ids, mask)
        logits = student(tokens.input_ids, mask)
        assert_close([h[mask] for h in found], [h[mask] for h in wanted], rtol=1e-4, atol=1e-5)
        assert_close(logits[mask], teacher.module.cls(state)[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_all_layers_are_the_teacher(kind: str) -> None:
    teacher = sage(layers=3, kind=kind)
    student = shallower(teacher, (0, 1, 2))
    assert type(student.module).__name__ == {"bert": "DistilBert", "distilbert": "DistilBert", "roberta": "Roberta"}[
        kind
    ] + ("ForMaskedLM")
    tokens = MaskedTokens.of(taken(framed(), range(6, 12)))
    given = tokens.input_ids, tokens.attention_mask
    assert_close(student(*given)[given[1]], teacher(*given)[given[1]], rtol=1e-4, atol=1e-4)
    assert not {p.data_ptr() for p in student.module.parameters()} & {p.data_ptr() for p in teacher.module.parameters()}


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_other_layouts_keep_their_class_with_fewer_layers(kind: str) -> None:
    teacher = sage(layers=5, kind=kind)
    student = shallower(teacher, (1, 4))
    assert type(student.module) is type(teacher.module) and student.depth == 2 and teacher.depth == 5
    theirs, ours = teacher.module.state_dict(), student.module.state_dict()
    stack = {"roberta": "roberta.encoder.layer", "distilbert": "distilbert.transformer.layer"}[kind]
    for name, value in ours.items():
        source = name.replace(f"{stack}.1.", f"{stack}.4.").replace(f"{stack}.0.", f"{stack}.1.")
        assert torch.equal(value, theirs[source]), name
    head = student.output_layer
    table = student.module.get_input_embeddings()
    assert head.weight.data_ptr() == table.weight.data_ptr(), "tied, as in the teacher"


def test_a_bert_that_distilbert_cannot_be_keeps_its_class() -> None:
    student = shallower(sage(layers=2, layer_norm_eps=1e-5), (0,))
    assert type(student.module).__name__ == "BertForMaskedLM" and student.config.layer_norm_eps == 1e-5


def test_layouts_that_are_no_stack_of_layers_are_refused() -> None:
    with pytest.raises(InputError, match=r"stack like BERT's.*--teacher\.path"):
        shallower(MaskedLM(masked_model(0, 3, "albert")), (0, 2))


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0, 2, 3), (0, 3)])
def test_layers_of_a_modernbert_keep_their_kind_of_attention(layers: tuple[int, ...], tmp_path: Path) -> None:
    special = dict.fromkeys(("bos_token_id", "cls_token_id"), 1) | dict.fromkeys(("eos_token_id", "sep_token_id"), 2)
    teacher = sage(layers=4, kind="modernbert", local_attention=4, **special)
    student = shallower(teacher, layers)
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert student.config.layer_types == [kinds[layer] for layer in layers]
    tokens = MaskedTokens.of(taken(framed(), range(6, 12)))
    given = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask.long()}
    student.module.eval().save_pretrained(tmp_path)
    wanted: Any = copy.deepcopy(teacher.module)
    wanted.model.layers = torch.nn.ModuleList([wanted.model.layers[layer] for layer in layers])
    opened = type(wanted).from_pretrained(tmp_path)
    with torch.no_grad():
        for found in (student.module, opened):
            assert_close(found(**given).logits[tokens.attention_mask], wanted(**given).logits[tokens.attention_mask])


def test_a_modernbert_begins_with_its_first_layer() -> None:
    with pytest.raises(InputError, match=r"layer 0 to begin.*got 1,3; begin --student\.layers with 0"):
        shallower(sage(layers=4, kind="modernbert"), (1, 3))


def test_a_student_in_train_mode_that_shares_nothing() -> None:
    teacher, config = sage(layers=4, hidden_dropout_prob=0.1), ShallowConfig(depth=2)
    one, other = config.student(teacher), config.student(teacher, recompute=True)
    assert one.module.training and all(p.requires_grad for p in one.trainable()) and not teacher.module.training
    assert one.config.dropout == 0.1 and one.config.attention_dropout == 0.0
    assert_close(one.state(), other.state(), **EXACT)
    for student, times in ((one, 1), (other, 2)):
        with recorded(student.module.distilbert.transformer.layer[0].ffn.lin1) as calls:
            MaskedToken(student).training_step(taken(framed(), range(2))).total.backward()
        assert len(calls) == times, "activations are computed again in backward"
    state = torch.get_rng_state()
    first, second, third = (config.student(teacher, seed=seed).state() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    name = "vocab_transform.weight"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], third[name])
    assert not torch.equal(first[name], one.state()[name]) and first.keys() == one.state().keys()


# -- losses ----------------------------------------------------------------------------------------------------------------


def test_the_cosine_of_equal_orthogonal_and_opposite_states() -> None:
    h, everything = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.ones(1, 2, dtype=torch.bool)
    turned = torch.stack([-h[..., 1], h[..., 0]], -1)
    for other, wanted in ((h, 0.0), (7.0 * h, 0.0), (turned, 1.0), (-h, 2.0)):
        assert cosine_loss(h, other, everything).item() == pytest.approx(2 * wanted, abs=1e-6)
    mixed = torch.stack([h[:, 0], -h[:, 1]], 1)
    assert cosine_loss(h, mixed, torch.tensor([[True, False]])).item() == pytest.approx(0.0, abs=1e-6)
    assert cosine_loss(h.bfloat16(), turned.bfloat16(), everything).dtype == torch.float32


def reference(method: DistilBERT, data: MaskedRows, indices: Any, step: int = 0) -> dict[str, Tensor]:
    """The three sums, one row and one token after the other, of dense logits; in the student's precision."""
    sums = {name: torch.zeros((), dtype=method.student.head.weight.dtype) for name in ("kd", "mlm", "cosine")}
    count, t = 0, method.config.temperature
    for i in indices:
        tokens = MaskedTokens.of(taken(data, [i], step))
        ids = tokens.input_ids
        outs = [n.module(input_ids=ids, output_hidden_states=True) for n in (method.student, method.teacher)]
        z, w = outs[0].logits[0], outs[1].logits[0].detach()
        a, b = outs[0].hidden_states[-1][0], outs[1].hidden_states[-1][0].detach()
        for place in range(ids.shape[1]):
            count += 1
            masked = bool(tokens.loss_mask[0, place])
            p = (w[place] / t).softmax(0)
            kl = (p * (p.log() - (z[place] / t).log_softmax(0))).sum()
            if masked or method.config.kd_on == "all":
                sums["kd"] = sums["kd"] + t**2 * kl / (method.share if method.config.kd_on == "masked" else 1.0)
            if masked:
                sums["mlm"] = sums["mlm"] - z[place].log_softmax(0)[tokens.labels[0, place]] / method.share
            cos = (a[place] @ b[place]) / (a[place].norm() * b[place].norm())
            sums["cosine"] = sums["cosine"] + 1.0 - cos
    return {name: value / count for name, value in sums.items()}


@pytest.mark.parametrize("kd_on", ["all", "masked"])
@pytest.mark.parametrize("factored", [True, False])
def test_the_triple_loss_and_its_gradient_are_those_written_out(kd_on: Any, factored: bool) -> None:
    data = framed(8)
    config = DistilBERTConfig(3.0, 5.0, 2.0, 1.5, kd_on, chunk_size=5)
    student, teacher = pupil(), sage()
    for network in (student, teacher):
        network.module.double()
        network.explained = factored
    method = DistilBERT(config, student, teacher, data.share)
    losses = method.training_step(taken(data, range(8)))
    found = torch.autograd.grad(losses.total, student.trainable())
    parts = reference(method, data, range(8))
    wanted = 5.0 * parts["kd"] + 2.0 * parts["mlm"] + 1.5 * parts["cosine"]
    assert losses.total.dtype == torch.float64
    assert_close(losses.total, wanted, rtol=1e-10, atol=1e-12)
    assert_close(losses.metrics, {name: value.detach() for name, value in parts.items()}, rtol=1e-10, atol=1e-12)
    assert losses.count == sum(len(row.ids) for row in data.rows[:8])
    assert_close(found, torch.autograd.grad(wanted, student.trainable()), rtol=1e-8, atol=1e-11)


def test_in_blocks_of_one_size_the_terms_are_plain_means() -> None:
    """5 mean KD of real tokens + 2 mean CE of masked ones + mean 1 - cos of real tokens, as the reference code takes them."""
    draws = torch.Generator().manual_seed(1)
    ids = [(1, *torch.randint(4, 40, (14,), generator=draws).tolist(), 2) for _ in range(6)]
    data = MaskedRows([Row(i, (False, *[True] * 14, False)) for i in ids], framed().alphabet)
    method = DistilBERT(DistilBERTConfig(), pupil(), sage(), data.share)
    batch = taken(data, range(6))
    tokens = MaskedTokens.of(batch)
    losses = method.training_step(batch)
    plain = MaskedToken(method.student).training_step(batch)
    assert_close(losses.metrics["mlm"], plain.total.detach(), **CLOSE)
    z, w = (n(tokens.input_ids, tokens.attention_mask).flatten(0, 1) / 2.0 for n in (method.student, method.teacher))
    kd = torch.nn.functional.kl_div(z.log_softmax(1), w.softmax(1), reduction="batchmean") * 4.0
    assert_close(losses.metrics["kd"], kd.detach(), rtol=1e-4, atol=1e-5)
    wanted = 5.0 * kd + 2.0 * plain.total + losses.metrics["cosine"]
    assert_close(losses.total, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(kind: str) -> None:
    teacher = sage(layers=2, kind=kind)
    student = ShallowConfig(depth=2).student(teacher)
    method = DistilBERT(DistilBERTConfig(mlm_weight=0.0), student, teacher, framed().share)
    losses = method.training_step(taken(framed(), range(8)))
    losses.total.backward()
    assert abs(losses.total.item()) < 1e-5
    assert max(float(p.grad.abs().max()) for p in student.trainable() if p.grad is not None) < 1e-4
    assert float(losses.metrics["mlm"]) == 0.0, "what has no weight is not computed"
    with_words = DistilBERT(DistilBERTConfig(), student, teacher, framed().share).training_step(
        taken(framed(), range(8))
    )
    assert float(with_words.metrics["mlm"]) > 1.0


@pytest.mark.parametrize("change", [COSINE, {"mlm_weight": 0.0}, {"kd_weight": 0.0}, {}])
def test_all_that_trains_gets_a_gradient_as_ddp_wants_it(change: Mapping[str, Any]) -> None:
    student = pupil()
    method = DistilBERT(DistilBERTConfig(**change), student, sage(), framed().share)
    method.training_step(taken(framed(), range(4))).total.backward()
    assert all(p.grad is not None for p in method.networks()["student"].trainable())
    frozen = {name for name, p in student.module.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == (
        {"vocab_transform", "vocab_layer_norm", "vocab_projector"} if change == COSINE else set()
    )


@pytest.mark.parametrize("change", [COSINE, {"cosine_weight": 0.0}, {"kd_on": "masked"}])
def test_what_padding_holds_changes_nothing(change: Mapping[str, Any]) -> None:
    method = DistilBERT(DistilBERTConfig(**change), pupil(), sage(), framed().share)
    batch = taken(framed(), [2, 5, 8])
    wanted = method.training_step(batch)
    padding = ~batch.extra["attention_mask"]
    assert padding.any()
    batch.extra["input_ids"] = batch.extra["input_ids"].masked_fill(padding, 9)
    batch.extra["labels"] = batch.extra["labels"].masked_fill(padding, 10**6)
    found = method.training_step(batch)
    batch.extra = {name: torch.nn.functional.pad(value, (0, 4), value=0) for name, value in batch.extra.items()}
    longer = method.training_step(batch)
    for other in (found, longer):
        assert_close(other.total, wanted.total, **CLOSE)
        assert other.count == wanted.count
    grads = [torch.autograd.grad(x.total, method.student.trainable(), allow_unused=True) for x in (longer, wanted)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_a_word_to_guess_only_the_teacher_is_learned() -> None:
    data = MaskedRows([Row((1, 2, 2), (False,) * 3)], framed().alphabet)
    losses = DistilBERT(DistilBERTConfig(kd_on="masked"), pupil(), sage(), 0.15).training_step(taken(data, [0]))
    losses.total.backward()
    assert float(losses.metrics["kd"]) == float(losses.metrics["mlm"]) == 0.0 and losses.total.item() > 0
    plain = MaskedToken(pupil()).training_step(taken(data, [0]))
    plain.total.backward()
    assert plain.total.item() == 0.0 and plain.count == 0.0


def test_the_teacher_is_read_once_without_a_graph_and_said_to_be_small() -> None:
    student, teacher = pupil(layers=3), sage(layers=1)
    for parameter in teacher.module.parameters():
        parameter.requires_grad_(True)
    method = DistilBERT(DistilBERTConfig(), student, teacher, 0.15)
    with recorded(teacher.module.bert.encoder.layer[0].intermediate.dense) as calls:
        method.training_step(taken(framed(), range(4))).total.backward()
    assert [with_grad for _, with_grad in calls] == [False]
    assert all(p.grad is None for p in teacher.module.parameters())
    assert "wrong way round" in method.watch({}) and method.watch({}) == ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.0}, "--method.temperature"), ({"kd_weight": -1.0}, "--method.kd_weight"),
        ({"mlm_weight": float("nan")}, "--method.mlm_weight"), ({"cosine_weight": float("inf")}, "--method.cosine_weight"),
        ({"kd_weight": 0.0, "cosine_weight": 0.0}, "a teacher's share"), ({"kd_on": "some"}, "--method.kd_on"),
        ({"chunk_size": 0}, "--method.chunk_size"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(change: Mapping[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        DistilBERTConfig(**change)


def test_a_narrower_student_and_an_impossible_share_are_refused() -> None:
    with pytest.raises(InputError, match="as wide as its teacher.*got 16 and 8"):
        DistilBERT(DistilBERTConfig(), pupil(), sage(hidden_size=8), 0.15)
    with pytest.raises(ValueError, match="share of masked tokens"):
        DistilBERT(DistilBERTConfig(), pupil(), sage(), 0.0)


# -- through the trainer ---------------------------------------------------------------------------------------------------


def made(kind: str = "all", depth: int = 2) -> Method:
    teacher = sage(layers=4)
    student = ShallowConfig(depth=depth).student(teacher)
    if kind == "plain":
        return MaskedToken(student)
    return DistilBERT(DistilBERTConfig(kd_on=kind), student, teacher, framed().share)


def fit(folder: Path, method: Method, **changes: Any) -> Method:
    Trainer(options(**{"max_train_steps": 4, "adam_epsilon": 1e-3, **changes}), folder).fit(method, framed())
    return method


@pytest.mark.parametrize("kind", ["all", "plain"])
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"checkpointing_steps": 2, "ema_decay": 0.9, "lr_scheduler": "cosine"}
    fit(tmp_path / "whole", made(kind), **changes)
    dying = made(kind)
    with pytest.raises(Killed), stopping_after(dying, 3, Killed.now):
        fit(tmp_path / "killed", dying, **changes)
    again = made(kind)
    with torch.no_grad():
        for parameter in again.networks()["student"].trainable():
            parameter.zero_()  # what the run goes on with is the checkpoint's
    fit(tmp_path / "killed", again, **changes, resume_from_checkpoint="latest")
    same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["all", "masked", "plain"])
def test_one_batch_of_eight_is_two_of_four_with_rows_of_other_lengths(tmp_path: Path, kind: str) -> None:
    fit(tmp_path / "one", made(kind))
    fit(tmp_path / "two", made(kind), train_batch_size=4, gradient_accumulation_steps=2)
    assert_close(saved(tmp_path / "two")[0], saved(tmp_path / "one")[0], rtol=1e-4, atol=1e-5)
    assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"), rtol=1e-5, atol=1e-5)


def test_the_trained_student_comes_near(tmp_path: Path) -> None:
    method = DistilBERT(DistilBERTConfig(mlm_weight=0.0), pupil(), sage(), framed().share)
    before = {name: value.clone() for name, value in method.teacher.module.state_dict().items()}
    fit(tmp_path, method, max_train_steps=40, adam_epsilon=1e-8, learning_rate=3e-3)
    lines = rows(tmp_path)
    assert lines[-1]["kd"] < 0.5 * lines[0]["kd"] and lines[-1]["cosine"] < 0.7 * lines[0]["cosine"]
    assert_close(dict(method.teacher.module.state_dict()), before, **EXACT)
