"""Language models of Transformers as networks: heads, padding, adapters, modes, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from language import END, FULL, VOCABULARY, built, gpt2, llama, student, teacher, tokens, words
from torch import nn
from torch.testing import assert_close
from toys import EXACT

from stepdistill.errors import InputError
from stepdistill.kd.networks import CausalLM, Classifier, smaller_teacher
from stepdistill.kd.vocabulary import check_same_tokens
from stepdistill.networks.lora import StudentConfig
from stepdistill.networks.merge import merged
from stepdistill.networks.pretrained import load_model, load_tokenizer


def opt(seed: int) -> Any:
    """Calls its decoder, not its base model; with positions that are learned."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=12,
        max_position_embeddings=32, bos_token_id=END, eos_token_id=END, pad_token_id=END, init_std=0.3, dropout=0.0,
    )  # fmt: skip
    return built(seed, lambda: OPTForCausalLM(config))


HEADS: dict[str, Any] = {
    "tied": lambda: gpt2(0), "rotary": lambda: llama(0), "soft-capped": lambda: llama(0, "gemma2", final_logit_softcapping=0.5),
    "past its base model": lambda: opt(0),
    "scaled": lambda: llama(0, "cohere", logit_scale=0.25), "divided": lambda: llama(0, "granite", logits_scaling=3.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_logits_are_the_head_of_the_hidden_states(kind: str) -> None:
    lm, ids = CausalLM(HEADS[kind]()), tokens(2, 7)
    mask = torch.ones_like(ids)
    assert lm.is_factored and lm.vocabulary == VOCABULARY and lm.window == 32
    logits = lm(ids, mask)
    assert_close(logits, lm.module(ids).logits, rtol=1e-5, atol=1e-5)
    assert_close(lm.head.logits(lm.hidden(ids, mask)), logits, rtol=1e-5, atol=1e-5)
    assert float(logits.std()) > 0.02, "or the comparison would say nothing"


class Odd(nn.Linear):
    """An output layer that is more than a product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sin()


def test_a_head_that_is_more_than_a_product_is_found_out() -> None:
    model = gpt2(0, tie_word_embeddings=False)
    odd = Odd(16, VOCABULARY, bias=False)
    model.set_output_embeddings(odd)
    assert not CausalLM(model).is_factored


def test_hidden_states_in_float32_meet_a_head_in_half_precision() -> None:
    """Mamba keeps its residual stream in float32."""
    model = gpt2(0).to(torch.bfloat16)
    model.transformer.ln_f.float()
    model.transformer.ln_f.register_forward_pre_hook(lambda _part, given: (given[0].float(),))
    model.lm_head.register_forward_pre_hook(lambda _part, given: (given[0].bfloat16(),))
    assert CausalLM(model).is_factored


@pytest.mark.parametrize("kind", ["tied", "rotary", "past its base model"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(kind: str) -> None:
    lm, ids = CausalLM(HEADS[kind]()), tokens(2, 7)
    mask, pad = torch.ones_like(ids), torch.full((2, 3), 5)
    wanted, none = lm(ids, mask), torch.zeros_like(pad)
    assert_close(lm(torch.cat([pad, ids], 1), torch.cat([none, mask], 1))[:, 3:], wanted, rtol=1e-4, atol=1e-5)
    assert_close(lm(torch.cat([ids, pad], 1), torch.cat([mask, none], 1))[:, :7], wanted, rtol=1e-4, atol=1e-5)
    assert_close(
        lm.hidden(torch.cat([pad, ids], 1), torch.cat([none, mask], 1))[:, 3:],
        lm.hidden(ids, mask),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_teacher_never_trains_and_a_student_does() -> None:
    wise, pupil = CausalLM(gpt2(0).train()).frozen(), student()
    assert wise.trainable() == [] and not any(p.requires_grad for p in wise.module.parameters())
    assert not any(part.training for part in wise.module.modules())
    assert pupil.module.training and len(pupil.trainable()) == len(list(pupil.module.parameters()))
    with pupil.evaluating():
        assert not pupil.module.training and not torch.is_grad_enabled()
    assert pupil.module.training and torch.is_grad_enabled()


def test_what_autocast_has_kept_without_a_graph_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to pytorch's pull request 165068 a forward after a rollout, in one autocast, found weights cut off from a graph."""
    pupil, ids, dropped = student(), tokens(2, 5), []
    clear = torch.clear_autocast_cache
    with torch.autocast("cpu", torch.bfloat16):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "clear_autocast_cache", lambda: (dropped.append(len(dropped)), clear()))
            with pupil.evaluating():
                pupil(ids, torch.ones_like(ids))
                assert not dropped
            assert dropped == [0]
        pupil(ids, torch.ones_like(ids)).sum().backward()
    assert all(p.grad is not None for p in pupil.trainable())


@pytest.mark.parametrize("build", [gpt2, llama])
def test_an_adapter_on_all_linear_layers_but_the_head(build: Any) -> None:
    lm, ids = CausalLM(build(0)), tokens(2, 5)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        before = lm(ids, mask)
    pupil = lm.student(StudentConfig(kind="lora", rank=2))
    with torch.no_grad():
        assert_close(pupil(ids, mask), before, **EXACT)
    assert all("lora_" in name for name, p in pupil.module.named_parameters() if p.requires_grad)
    assert not any("lm_head" in n or "wte" in n or "embed" in n for n in pupil.named_trainable())
    assert len(pupil.trainable()) == 2 * len(CausalLM(build(0)).lora_targets())
    for parameter in pupil.trainable():
        nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        assert_close(pupil.head.logits(pupil.hidden(ids, mask)), pupil(ids, mask), rtol=1e-5, atol=1e-5)
        assert_close(merged(pupil)(ids).logits, pupil(ids, mask), rtol=1e-4, atol=1e-5)
    assert pupil.state().keys() == pupil.named_trainable().keys()


def test_activations_recomputed_give_the_same_gradient() -> None:
    ids = tokens(2, 5)
    found = []
    for wanted in (False, True):
        pupil = student()
        pupil.checkpoint_activations(wanted)
        pupil.hidden(ids, torch.ones_like(ids)).square().sum().backward()
        found.append([None if p.grad is None else p.grad.clone() for p in pupil.trainable()])
    assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


# -- tokenizers ------------------------------------------------------------------------------------------------------------


def test_other_tokens_are_refused_and_other_padding_of_the_table_is_not() -> None:
    from tokenizers.pre_tokenizers import Split

    check_same_tokens(words(), words(template=True))
    more, cut = words(), words()
    more.add_tokens(["<extra>"])
    with pytest.raises(InputError, match="differ, first '<extra>'"):
        check_same_tokens(words(), more)
    cut.backend_tokenizer.pre_tokenizer = Split("", "isolated")
    with pytest.raises(InputError, match="other cuts"):
        check_same_tokens(words(), cut)


def test_a_teacher_that_is_smaller_is_said() -> None:
    assert "wrong way round" in smaller_teacher(student(width=32), teacher(width=16))
    assert smaller_teacher(student(width=16), teacher(width=16)) == ""


# -- checkpoints -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_whole_or_refused(tmp_path: Path) -> None:
    model = gpt2(0)
    model.save_pretrained(tmp_path / "whole")
    words().save_pretrained(tmp_path / "whole")
    loaded = load_model("AutoModelForCausalLM", str(tmp_path / "whole"), "--teacher.path")
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    assert not loaded.training
    assert load_tokenizer(str(tmp_path / "whole"), "--teacher.path").eos_token_id == 29
    with pytest.raises(InputError, match="--teacher.path"):
        load_model("AutoModelForCausalLM", str(tmp_path / "nowhere"), "--teacher.path")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no config.json"):
        load_model("AutoModelForCausalLM", str(tmp_path / "empty"), "--student.path")
    with pytest.raises(InputError, match="hub cannot be reached"):
        load_model("AutoModelForCausalLM", "nobody/nothing", "--student.path")
    model.transformer.save_pretrained(tmp_path / "body")  # a body without a head of its own: another class
    (tmp_path / "whole" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="--teacher.path"):
        load_model("AutoModelForCausalLM", str(tmp_path / "whole"), "--teacher.path")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    gpt2(0, layers=2).save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: t for n, t in kept.items() if ".h.1." not in n}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(InputError, match="missing or of another shape"):
        load_model("AutoModelForCausalLM", str(tmp_path), "--teacher.path")


def test_a_classifier_scales_its_pixels() -> None:
    class Mean(nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            return type("Output", (), {"logits": pixel_values.mean((2, 3))})

    images = torch.full((2, 3, 4, 4), 0.5)  # 0.75 in [0, 1]
    assert_close(Classifier(Mean())(images), torch.full((2, 3), 0.5))
    given = Classifier(Mean(), (0.25, 0.5, 0.75), (0.5, 0.25, 1.0))
    assert_close(given(images), torch.tensor([[1.0, 1.0, 0.0]]).expand(2, 3))
    with pytest.raises(InputError, match="--student.kind full"):
        given.student(StudentConfig(kind="lora"))
    assert given.student(FULL).module.training
    assert END < VOCABULARY
