"""Feature extractors for any images: the vision models of transformers, and Inception as older papers have it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..families.loading import BROKEN, DEMO_JUDGE
from ..families.preprocessing import Preprocessing
from ..families.towers import Tower
from .features import FeatureExtractor, Images, JudgeFeatures, checked_images, hash_weights, to_levels
from .judge import Judge

FLAG = "--features"
# cuDNN's default rounds what goes into a convolution to TF32, a thousandth of it
EXACT = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}


class VisionFeatures:
    """Any vision model of transformers as an extractor: its own resize and normalisation, float32, frozen.

    The feature is, by the first of these that the checkpoint has weights for:

    1. `image_embeds`, the projection into the space shared with text, not normalised (CLIP);
    2. `pooler_output` (DINOv2: the normalised CLS token; ConvNeXt: the mean over the picture; SigLIP: the attention pool);
    3. the CLS token of `last_hidden_state` (a ViT saved without its pooler, or as a classifier).

    Of a model for images and text only the part for images is loaded. A picture's feature doesn't depend on its
    batch, to 1e-6 of its length.

    Args:
        path: a folder that `save_pretrained` wrote, with its preprocessor_config.json, or a hub id, of which `id@revision` is
            a branch, tag or commit.
        batch_size: images a forward.
        device: where the network runs.
        flag: where the path was given, for messages.

    Raises:
        InputError: no checkpoint there, no vision model, weights or image settings missing, a model without any of the
            three features, or one that draws random numbers (masked autoencoders hide a part of the picture).
        ValueError: batch_size < 1.
    """

    def __init__(self, path: str, batch_size: int = 32, device: str | torch.device = "cpu", flag: str = FLAG) -> None:
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {batch_size}; raise it")
        self.name, self._batch_size, self._device = path, batch_size, torch.device(device)
        self.tower = Tower.find(path, flag)
        self.config = self.tower.config()
        self.preprocessing = Preprocessing.read(self.tower.image_settings(), str(self.tower), self.tower.fix)
        self.module = self.tower.vision_model(self.config).to(self._device)
        self.weights_hash = hash_weights(self.module, self.preprocessing.identity())
        self.dim = self._probe()

    def _probe(self) -> int:
        """The length of a feature, once two looks at one picture give the same."""
        side = self.module.config.to_dict().get("image_size")
        side = side if isinstance(side, int) else 64  # only counts where the checkpoint resizes nothing
        picture = np.add.outer(np.arange(side), np.arange(2 * side, step=2)) % 256
        picture = np.repeat(picture[None, :, :, None], 3, axis=3).astype(np.uint8)
        with self.tower.explained("a vision model, which takes pixel_values alone,"):
            first, second = self(picture), self(picture)
        if not torch.equal(first, second):
            raise InputError(
                f"expected the same features of the same image from {self.tower}, got others at each call "
                f"(masked autoencoders hide a random part); {self.tower.fix}"
            )
        return int(first.shape[1])

    @torch.inference_mode()
    def __call__(self, images: Images) -> Tensor:
        """Features [N, dim] float64 on the CPU of uint8 images [N, H, W, 3].

        Raises ValueError for images of another form, InputError for a size that a checkpoint without a resize doesn't take.
        """
        images = checked_images(images)
        if self.preprocessing.resizes:
            return torch.cat([self._pooled(part) for part in self._batches(images)])
        with self.tower.explained(f"a vision model that takes images of {images.shape[1]}x{images.shape[2]}"):
            return torch.cat([self._pooled(part) for part in self._batches(images)])

    def _batches(self, images: Images) -> Iterator[Tensor]:
        for start in range(0, len(images), self._batch_size):
            yield self.preprocessing(images[start : start + self._batch_size])

    def _pooled(self, pixels: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(**EXACT):
            output = self.module(pixel_values=pixels.to(self._device))
        for key in ("image_embeds", "pooler_output"):
            if output.get(key) is not None:
                return output[key].flatten(1).double().cpu()
        tokens = output.get("last_hidden_state")
        names = [name.rsplit(".", 1)[-1] for name, _ in self.module.named_parameters()]
        if tokens is None or tokens.ndim != 3 or not {"cls_token", "class_embedding"} & set(names):
            raise InputError(
                f"expected image_embeds, pooler_output or a CLS token from {self.tower}, got a "
                f"{type(self.module).__name__} without; {self.tower.fix}"
            )
        return tokens[:, 0].double().cpu()


class InceptionFeatures:
    """Inception-v3 as the Frechet Inception distance was defined with (arXiv 1706.08500), by torch-fidelity: 2048 numbers.

    The network resizes by itself, bilinearly and without antialiasing, as the TensorFlow graph of 2015 did: for comparison with
    published numbers only. Its weights (about 90 MB) are downloaded at the first use.

    Args:
        batch_size: images a forward.
        device: where the network runs.

    Raises:
        InputError: torch-fidelity or torchvision, which it needs, is not installed or doesn't fit this torch, or there are no
            weights and no network.
        ValueError: batch_size < 1.
    """

    name, dim = "inception", 2048

    def __init__(self, batch_size: int = 32, device: str | torch.device = "cpu") -> None:
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {batch_size}; raise it")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: a torchvision made for another torch
            raise InputError(
                f"expected torch-fidelity for {FLAG} inception, got: {error}; pip install 'stepdistill[inception]'. It needs "
                "torchvision: install the one that fits your torch first and from the same index, or pip may exchange torch"
            ) from error
        try:
            net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        except (*BROKEN, EOFError, pickle.UnpicklingError) as error:
            raise InputError(
                f"expected Inception's weights for {FLAG} inception, got: {error}; torch-fidelity downloads them from "
                f"github.com into {torch.hub.get_dir()}/checkpoints: put the file there by hand, or give {FLAG} a vision model"
            ) from error
        self._net, self._batch_size = net.to(device).requires_grad_(False).eval(), batch_size
        self._device, self.weights_hash = torch.device(device), hash_weights(net)

    @torch.inference_mode()
    def __call__(self, images: Images) -> Tensor:
        """Features [N, 2048] float64 on the CPU of uint8 images [N, H, W, 3]; ValueError for images of another form."""
        images = checked_images(images)
        parts = [images[start : start + self._batch_size] for start in range(0, len(images), self._batch_size)]
        with torch.backends.cudnn.flags(**EXACT):
            return torch.cat([self._net(to_levels(part).to(self._device))[0].double().cpu() for part in parts])


def open_features(spec: str, judge: Judge | None = None, device: str | torch.device = "cpu") -> FeatureExtractor:
    """The extractor that --features names.

    Args:
        spec: "demo" for the judge of the demo's world, "inception", or else a folder or hub id (`id@revision`) of a vision
            model.
        judge: in place of the one that ships, for "demo".
        device: where networks run, but the judge, which is small.

    Raises InputError as the extractors do.
    """
    if spec == "demo":
        return JudgeFeatures(Judge.load(DEMO_JUDGE) if judge is None else judge)
    return InceptionFeatures(device=device) if spec == "inception" else VisionFeatures(spec, device=device)
