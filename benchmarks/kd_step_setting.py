"""The networks and data of benchmarks/kd_step.py: small layouts with random weights, random tokens and pixels.

Whoever asks twice gets the same weights twice, in modules of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.data.labelled import CLASSES, LabelledImages
from stepdistill.data.labelled_text import TextRow, TextRows
from stepdistill.data.masked import Alphabet, MaskedRows
from stepdistill.data.tokens import Row, TokenRows
from stepdistill.kd.distilbert import ShallowConfig
from stepdistill.kd.layouts import END, bert_layout, gpt2_layout, resnet_layout, seeded
from stepdistill.kd.masked import MaskedLM
from stepdistill.kd.networks import CausalLM, Classifier
from stepdistill.kd.text_classifier import TextClassifier
from stepdistill.networks.lora import StudentConfig

SAMPLES = 64
TEXT_CLASSES = 8
SPECIAL = 3  # ids of a BERT before its words: begin, end, mask; the last id is the padding
RESNETS = {
    "teacher": ((3, 4, 6, 3), (16, 32, 64, 128)),
    "student": ((2, 2, 2, 2), (8, 16, 32, 64)),
}  # the recipe's demo
FULL = StudentConfig(kind="full")

Shape = tuple[int, int]  # layers and width


def word_tokenizer(vocabulary: int) -> Any:
    """One word a token, the last of them the end of text; for models that are given ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(vocabulary - 1)} | {END: vocabulary - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token=END))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END, unk_token=END)


@dataclass(frozen=True)
class Setting:
    """Sizes.

    Attributes:
        vocabulary: entries of all tables of tokens.
        batch: texts a step.
        block: tokens of a text.
        prompt, new: tokens of each prompt, and what is written after it.
        teacher, student: layers and width of the text models.
        images: images a step.
        resolution: their side.
        seed: of weights, data and what is written.
    """

    vocabulary: int
    batch: int
    block: int
    prompt: int
    new: int
    teacher: Shape
    student: Shape
    images: int
    resolution: int
    seed: int

    @property
    def end(self) -> int:
        """The end-of-text token: one that no model writes, so that all texts are of one length."""
        return self.vocabulary

    @property
    def window(self) -> int:
        """Positions of the text models."""
        return max(self.block, self.prompt + self.new)

    def tokenizer(self) -> Any:
        """Of the vocabulary."""
        return word_tokenizer(self.vocabulary)

    def causal(self) -> tuple[CausalLM, CausalLM]:
        """(student, teacher) in GPT-2 layouts."""
        tokenizer = self.tokenizer()
        student = gpt2_layout(*self.student, tokenizer, self.window, self.seed)
        teacher = gpt2_layout(*self.teacher, tokenizer, self.window, self.seed + 1)
        return CausalLM(student).student(FULL), CausalLM(teacher).frozen()

    def masked(self) -> tuple[MaskedLM, MaskedLM]:
        """(student, teacher): a BERT layout, and a DistilBERT of as many of its layers as the students have."""
        teacher = MaskedLM(bert_layout(*self.teacher, self.tokenizer(), self.window, self.seed + 1)).frozen()
        return ShallowConfig(depth=self.student[0]).student(teacher), teacher

    def text_classifiers(self) -> tuple[TextClassifier, TextClassifier]:
        """(student, teacher) in BERT layouts with as many attention heads."""
        teacher = self._text_classifier(*self.teacher, None, self.seed + 1).frozen()
        heads = int(teacher.module.config.num_attention_heads)  # type: ignore[union-attr]
        return self._text_classifier(*self.student, heads, self.seed).student(FULL), teacher

    def _text_classifier(self, layers: int, width: int, heads: int | None, seed: int) -> TextClassifier:
        from transformers import BertForSequenceClassification

        config = bert_layout(layers, width, self.tokenizer(), self.window, seed, heads).config
        config.num_labels = TEXT_CLASSES
        return TextClassifier(seeded(seed, lambda: BertForSequenceClassification(config)))

    def image_classifiers(self) -> tuple[Classifier, Classifier]:
        """(student, teacher): the ResNets of the recipe's demo."""
        student = resnet_layout(*RESNETS["student"], CLASSES, self.seed)
        teacher = resnet_layout(*RESNETS["teacher"], CLASSES, self.seed + 1)
        return Classifier(student).student(FULL), Classifier(teacher).frozen()

    def ids(self, tokens: int) -> Tensor:
        """Random words [SAMPLES, tokens]."""
        numbers = torch.Generator().manual_seed(self.seed)
        return torch.randint(SPECIAL, self.vocabulary - 1, (SAMPLES, tokens), generator=numbers)

    def texts(self) -> TokenRows:
        """Texts all of which is learned; their first words serve as prompts too."""
        rows = [Row(tuple(row), (True,) * self.block, self.prompt) for row in self.ids(self.block).tolist()]
        return TokenRows(rows, self.vocabulary - 1)

    def prompts(self) -> TokenRows:
        """Prompts with completions."""
        learned = (False,) * self.prompt + (True,) * self.new
        ids = self.ids(self.prompt + self.new).tolist()
        return TokenRows([Row(tuple(row), learned, self.prompt) for row in ids], self.vocabulary - 1)

    def masked_texts(self) -> MaskedRows:
        """Texts between their special tokens, words of which are masked anew in each step."""
        begin, end, mask = range(SPECIAL)
        alphabet = Alphabet(begin, end, self.vocabulary - 1, mask, torch.arange(SPECIAL, self.vocabulary - 1))
        words = self.ids(self.block - 2).tolist()
        return MaskedRows([Row((begin, *row, end), (False, *[True] * len(row), False)) for row in words], alphabet)

    def labelled_texts(self) -> TextRows:
        """Texts with classes."""
        rows = [TextRow(tuple(row), i % TEXT_CLASSES) for i, row in enumerate(self.ids(self.block).tolist())]
        return TextRows(rows, self.vocabulary - 1)

    def labelled_images(self) -> LabelledImages:
        """Images with classes."""
        numbers = torch.Generator().manual_seed(self.seed)
        size = (SAMPLES, 3, self.resolution, self.resolution)
        images = torch.randint(256, size, generator=numbers, dtype=torch.uint8)
        return LabelledImages(images, torch.arange(SAMPLES) % len(CLASSES), CLASSES)
