"""Models made anew: GPT-2, BERT, NomicBERT and ResNet layouts, weights from a seed, and tokenizers trained on the texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data.text import Example
from ..errors import InputError

END = "<|endoftext|>"
PAD, UNKNOWN, BEGIN, SEPARATOR, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"  # as in BERT


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """What `build` returns, its weights drawn from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        return build()


def train_tokenizer(examples: Sequence[Example], size: int, window: int) -> Any:
    """A byte-level BPE tokenizer (arXiv 1508.07909) of `size` tokens, a function of the texts alone; every text can be read.

    Its padding is its end-of-text token, as in GPT-2.
    """
    from transformers import PreTrainedTokenizerFast

    inner = _byte_pairs(examples, size, [END])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END, model_max_length=window)


def train_masked_tokenizer(examples: Sequence[Example], size: int, window: int) -> Any:
    """The same with BERT's special tokens; a text that it reads gets [CLS] before and [SEP] after it.

    Byte-level like RoBERTa's, not WordPiece: no word is unknown.
    """
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    mask = AddedToken(
        MASK, lstrip=True, special=True
    )  # a word's token has the blank before it, and so the mask takes it
    special = [PAD, UNKNOWN, BEGIN, SEPARATOR, mask]
    inner = _byte_pairs(examples, size, special)
    inner.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A {SEPARATOR}", pair=f"{BEGIN} $A {SEPARATOR} $B:1 {SEPARATOR}:1",
        special_tokens=[(name, special.index(name)) for name in (BEGIN, SEPARATOR)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, unk_token=UNKNOWN, cls_token=BEGIN, sep_token=SEPARATOR, mask_token=mask,
        model_max_length=window,
    )  # fmt: skip


def _byte_pairs(examples: Sequence[Example], size: int, special: Sequence[Any]) -> Any:
    """A byte-level BPE of `size` tokens, the special ones first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if size < 256 + len(special):
        raise InputError(
            f"expected {256 + len(special)} tokens or more (each byte and the special ones), got {size}; fix --vocabulary"
        )
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=sorted(alphabet), show_progress=False
    )
    inner.train_from_iterator((text for example in examples for text in _texts(example)), trainer)
    return inner


def _texts(example: Example) -> list[str]:
    if example.messages:
        return [message["content"] for message in example.messages]
    return [text for text in (example.text, example.prompt, example.completion) if text]


def gpt2_layout(layers: int, width: int, tokenizer: Any, window: int, seed: int) -> Any:
    """GPT2LMHeadModel with random weights, without dropout: the data order is all that is random in its training."""
    from transformers import GPT2Config, GPT2LMHeadModel

    end = tokenizer.eos_token_id
    heads = _heads(width)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=window, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=end,
        eos_token_id=end, pad_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return seeded(seed, lambda: GPT2LMHeadModel(config))


def bert_layout(layers: int, width: int, tokenizer: Any, window: int, seed: int, heads: int | None = None) -> Any:
    """BertForMaskedLM (arXiv 1810.04805) with random weights, without dropout; a head for each 32 entries by default."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads or _heads(width),
        intermediate_size=4 * width, max_position_embeddings=window, pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return seeded(seed, lambda: BertForMaskedLM(config))


def rotary_layout(layers: int, width: int, tokenizer: Any, window: int, seed: int, heads: int | None = None) -> Any:
    """NomicBertForMaskedLM (arXiv 2402.01613), a BERT with rotary positions and gated units, as :func:`bert_layout`.

    What demos begin with: positions that have to be learned keep a small BERT at the frequencies of single words for a
    thousand steps and more; rotary ones (arXiv 2104.09864) need a hundred.
    """
    from transformers import NomicBertConfig, NomicBertForMaskedLM

    heads = heads or _heads(width)
    if width % (2 * heads):
        raise InputError(
            f"expected an even number of entries in each of {heads} heads, got a width of {width}; fix "
            "--teacher.width, or --student.width and --student.heads"
        )
    config = NomicBertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * width, max_position_embeddings=window, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )  # fmt: skip
    return seeded(seed, lambda: NomicBertForMaskedLM(config))


def _heads(width: int) -> int:
    """One for each 32 entries."""
    heads = max(1, width // 32)
    if width % heads:
        raise InputError(f"expected a width that {heads} heads divide, got {width}; a multiple of 32 always is")
    return heads


def resnet_layout(depths: Sequence[int], widths: Sequence[int], classes: Sequence[str], seed: int) -> Any:
    """ResNetForImageClassification of basic blocks (arXiv 1512.03385) with random weights and the stock stem."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=widths[0], hidden_sizes=list(widths), depths=list(depths), layer_type="basic",
        id2label=dict(enumerate(classes)), label2id={name: i for i, name in enumerate(classes)},
    )  # fmt: skip
    return seeded(seed, lambda: ResNetForImageClassification(config))
