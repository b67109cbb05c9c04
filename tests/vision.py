"""Tiny vision models of transformers, made from configs and a seed and saved with their image settings, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import CHARACTERS, LENGTH

SIDE, WIDTH, PROJECTION = 32, 16, 12
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SETTINGS = {
    "size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN, "image_std": STD, "resample": 3, "rescale_factor": 1 / 255,
}  # fmt: skip
SMALL = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SEES = {**SMALL, "image_size": SIDE, "patch_size": 8}


def images(n: int, height: int = 48, width: int | None = None, seed: int = 0) -> np.ndarray:
    """Smooth random colours with noise on them, uint8 [n, height, width, 3]."""
    draws = np.random.default_rng(seed)
    coarse = draws.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    large = np.stack([np.asarray(Image.fromarray(c).resize((width or height, height))) for c in coarse])
    noisy = large + draws.normal(0, 20, large.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def pixels(batch: np.ndarray, side: int = SIDE, resample: Image.Resampling = Image.Resampling.BICUBIC) -> torch.Tensor:
    """[n, 3, side, side] float32 of images: resized to a square by Pillow, scaled by 1/255 and normalised, written out."""
    resized = np.stack([np.asarray(Image.fromarray(image).resize((side, side), resample)) for image in batch])
    return torch.from_numpy((resized / 255 - np.array(MEAN)) / np.array(STD)).float().permute(0, 3, 1, 2)


def save(model: Any, folder: Path, **settings: Any) -> Path:
    """Saves the model with SETTINGS, some of them changed or, where None, left out."""
    model.save_pretrained(str(folder))
    given = {key: value for key, value in {**SETTINGS, **settings}.items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(given), encoding="utf-8")
    return folder


def build(name: str) -> Any:
    """A stock model, in eval mode, with weights that are large enough to tell pictures apart."""
    import transformers as t

    words = len(CHARACTERS) * 2 + 2
    text = {**SMALL, "vocab_size": words, "max_position_embeddings": LENGTH, "bos_token_id": words - 2}
    text |= {"eos_token_id": words - 1, "pad_token_id": words - 1}
    kinds = {
        "dinov2": (t.Dinov2Model, lambda: t.Dinov2Config(**SEES)),
        "vit": (t.ViTModel, lambda: t.ViTConfig(**SEES)),
        "classifier": (t.ViTForImageClassification, lambda: t.ViTConfig(**SEES)),
        "clip": (t.CLIPModel, lambda: t.CLIPConfig(text_config=text, vision_config=SEES, projection_dim=PROJECTION)),
        "projected": (
            t.CLIPVisionModelWithProjection,
            lambda: t.CLIPVisionConfig(**SEES, projection_dim=PROJECTION),
        ),
        "unprojected": (t.CLIPVisionModel, lambda: t.CLIPVisionConfig(**SEES)),
        "siglip": (
            t.SiglipModel,
            lambda: t.SiglipConfig(text_config={**SMALL, "vocab_size": words}, vision_config=SEES),
        ),
        "convnext": (
            t.ConvNextModel,
            lambda: t.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, image_size=SIDE),
        ),
        "resnet": (
            t.ResNetModel,
            lambda: t.ResNetConfig(embedding_size=8, hidden_sizes=[8, WIDTH], depths=[1, 1], layer_type="basic"),
        ),
        "masked": (t.ViTMAEModel, lambda: t.ViTMAEConfig(**SEES)),
        "tokenless": (t.IJepaModel, lambda: t.IJepaConfig(**SEES)),
        "text": (t.CLIPTextModel, lambda: t.CLIPTextConfig(**text)),
    }
    cls, config = kinds[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config()).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                if value.ndim > 1:
                    value.mul_(5)
                elif "lambda" in key or "layer_scale" in key:  # layers that start switched off
                    value.fill_(1)
            for key, value in model.named_buffers():
                if "running_" in key:  # of batches of training, which there were none of
                    value.copy_(torch.rand(value.shape) + 0.5)
    return model


def tokenizer(characters: str = CHARACTERS) -> Any:
    """CLIP's, one letter a token."""
    from transformers import CLIPTokenizer

    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=LENGTH)
