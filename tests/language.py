"""Tiny language models, tokenizers and texts for the tests of distillation. Everything is a function of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.data.tokens import Row, TokenRows
from stepdistill.kd.networks import CausalLM
from stepdistill.networks.lora import StudentConfig

VOCABULARY, END = 40, 39
FULL = StudentConfig(kind="full")


def gpt2(
    seed: int, width: int = 16, layers: int = 1, vocabulary: int = VOCABULARY, positions: int = 32, **more: Any
) -> Any:
    """A GPT-2 without dropout, its weights larger than they are usually at first, so that it has opinions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    options = {
        "vocab_size": vocabulary, "n_positions": positions, "n_embd": width, "n_layer": layers, "n_head": 2, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": END, "eos_token_id": END, "initializer_range": 0.3,
    }  # fmt: skip
    config = GPT2Config(**{**options, **more})
    return built(seed, lambda: GPT2LMHeadModel(config))


def llama(seed: int, kind: str = "llama", vocabulary: int = VOCABULARY, **more: Any) -> Any:
    """A Llama, or what is laid out like one ("gemma2", "cohere", "granite"), with rotary positions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, bos_token_id=END, eos_token_id=END, pad_token_id=END,
        initializer_range=0.3, **more,
    )  # fmt: skip
    return built(seed, lambda: AutoModelForCausalLM.from_config(config))


def built(seed: int, build: Any) -> Any:
    """What `build` returns, its weights from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def student(seed: int = 1, **changes: Any) -> CausalLM:
    return CausalLM(gpt2(seed, **changes)).student(FULL)


def teacher(seed: int = 0, **changes: Any) -> CausalLM:
    return CausalLM(gpt2(seed, width=changes.pop("width", 24), **changes)).frozen()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY - 1, shape, generator=torch.Generator().manual_seed(seed))


def uneven(count: int = 24, longest: int = 12, prompt: int = 0) -> TokenRows:
    """Rows of 4 .. `longest` tokens that end with END; with prompts of 1 .. `prompt` tokens."""
    draws = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        length = 4 + i % (longest - 3)
        ids = (*torch.randint(0, VOCABULARY - 1, (length - 1,), generator=draws).tolist(), END)
        first = 1 + i % prompt if prompt else 0
        rows.append(Row(ids, (False,) * first + (True,) * (length - first), first))
    return TokenRows(rows, END)


def batch_of(
    rows: TokenRows, indices: Sequence[int], positions: Sequence[int] | None = None, seed: int = 0, step: int = 0
) -> Batch:
    from stepdistill.randomness import StepRandom

    return rows.batch(indices, StepRandom(seed, step, indices if positions is None else positions))


def words(template: bool = False, **special: str) -> Any:
    """A tokenizer of words; padding is the end-of-text token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [*"abcdefghijklmnopqrstuvwxyz", "<user>", "<bot>", "<unk>", "<end>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>", unk_token="<unk>", **special
    )
    if template:
        found.chat_template = (
            "{% for m in messages %}{{ '<bot> ' if m.role == 'assistant' else '<user> ' }}{{ m.content }} "
            "{% if m.role == 'assistant' %}<end> {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
        )
    return found
