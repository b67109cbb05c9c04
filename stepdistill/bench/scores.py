"""What single images are worth, given their prompts: prompt accuracy in the demo's world, CLIP score anywhere.

A score is a number for each image, so that intervals can be paired over prompts. Anything that is called with prompts and
images and gives such numbers is a scorer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.prompts import unique
from ..demo.reading import read_labels
from ..demo.world import ATTRIBUTES
from ..errors import InputError
from .extractors import VisionFeatures
from .features import Images, JudgeFeatures, hash_weights
from .judge import Judge
from .metrics import prompt_hits

FLAG = "--clip"


class Scorer(Protocol):
    """Prompts and their images to numbers, higher being better."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of what a call gives, in order."""

    @property
    def weights_hash(self) -> str:
        """Tells it from one with other weights."""

    def __call__(self, prompts: Sequence[str], images: Images) -> dict[str, Tensor]:
        """For each of `names` a number per image, [N] float64 on the CPU, of N prompts and uint8 images [N, H, W, 3]."""


class JudgeAccuracy:
    """Whether images of the demo's world show what their captions say: 1 or 0 for each attribute, and for "all" together.

    Args:
        judge: classifier of the world's attributes.

    Raises ValueError for a judge of other attributes.
    """

    name = "prompt accuracy"

    def __init__(self, judge: Judge) -> None:
        expected = {name: len(values) for name, values in ATTRIBUTES.items()}
        if judge.attributes != expected:
            raise ValueError(f"expected a judge of {expected}, got one of {judge.attributes}; use the demo's judge")
        self._features, self.names = JudgeFeatures(judge), (*ATTRIBUTES, "all")
        self.weights_hash = self._features.weights_hash

    def __call__(self, prompts: Sequence[str], images: Images) -> dict[str, Tensor]:
        """[N] float64 by name, of N captions and uint8 images [N, R, R, 3].

        Raises InputError for a prompt that is no caption of the world, or images of another size than the judge's;
        ValueError for unequal numbers.
        """
        _check_numbers(prompts, images)
        labels = dict(zip(ATTRIBUTES, read_labels(prompts).unbind(1), strict=True))
        hits = prompt_hits(self._features.logits(images), labels)
        return {name: hits[name].double() for name in self.names}


class ClipScore:
    """How well images fit their prompts in CLIP's space: 100 max(cos(image, text), 0) (arXiv 2104.08718, eq. 1 with w = 1).

    As torchmetrics has it, but for the maximum, which the paper takes for each image and torchmetrics of the mean.

    Args:
        path: a whole CLIP: a folder that `save_pretrained` wrote, with tokenizer and preprocessor_config.json, or a hub id
            (`id@revision`).
        batch_size: images or prompts a forward.
        device: where the networks run.
        flag: where the path was given, for messages.

    Raises:
        InputError: no CLIP there, or one without tokenizer, image settings or some of its weights.
    """

    names = ("clip",)

    def __init__(self, path: str, batch_size: int = 32, device: str | torch.device = "cpu", flag: str = FLAG) -> None:
        self._vision = VisionFeatures(path, batch_size, device, flag)
        self.name, tower = f"CLIP score, {path}", self._vision.tower
        if self._vision.config.model_type != "clip":
            raise InputError(
                f"expected a CLIP at {tower}, got a {self._vision.config.model_type}; give one that reads images and "
                "text, such as openai/clip-vit-large-patch14"
            )
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        config = self._vision.config.text_config
        config.projection_dim = self._vision.dim  # as for images: the parts' own configs may say another
        module, missing = tower.load(CLIPTextModelWithProjection, "a CLIP", config=config)
        tower.complete("text model", missing)
        with tower.explained("the tokenizer of a CLIP"):
            self._tokenizer = AutoTokenizer.from_pretrained(tower.path, **tower.options)
        size = module.config.vocab_size
        if len(self._tokenizer) != size:
            raise InputError(
                f"expected a tokenizer of {size} tokens at {tower}, got {len(self._tokenizer)}; save the CLIP's own "
                "tokenizer into the folder"
            )
        self._text: Any = module.to(device)
        self._batch_size, self._device = batch_size, torch.device(device)
        self.weights_hash = hash_weights(module, self._vision.weights_hash)

    def __call__(self, prompts: Sequence[str], images: Images) -> dict[str, Tensor]:
        """{"clip": [N] float64, 0-100} of N prompts and uint8 images [N, H, W, 3].

        Prompts longer than CLIP's context are cut, as its tokenizer does it, with a warning. ValueError for unequal numbers.
        """
        _check_numbers(prompts, images)
        texts, rows = unique(prompts)
        cosine = F.cosine_similarity(self._vision(images), self._embed(texts)[rows])
        return {"clip": 100 * cosine.clamp(min=0)}

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        """[N, d] float64 of N texts; padded to one length always, so that no text's length changes another's rounding."""
        limit = self._text.config.max_position_embeddings
        lengths = [len(ids) for ids in self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
        if cut := sum(length > limit for length in lengths):
            warnings.warn(
                f"CLIP score reads {limit} tokens of a prompt: {cut} of {len(texts)} prompts are longer and are cut",
                stacklevel=3,
            )
        tokens = self._tokenizer(
            list(texts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        pairs = zip(
            tokens["input_ids"].split(self._batch_size), tokens["attention_mask"].split(self._batch_size), strict=True
        )
        parts = [self._text(input_ids=i.to(self._device), attention_mask=m.to(self._device)) for i, m in pairs]
        return torch.cat([part.text_embeds.double().cpu() for part in parts])


def _check_numbers(prompts: Sequence[str], images: Images) -> None:
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(
            f"expected a prompt for each of {len(images)} images, got {len(prompts)}; repeat shared prompts"
        )
