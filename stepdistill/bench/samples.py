"""What is kept of a cell's images: features, scores and a hash of each, in the order of the prompts, in safetensors files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import InputError
from .features import FeatureExtractor, Images
from .plan import Batch, Plan
from .scores import Scorer
from .writing import write_whole

SCORE = "score/"  # before the names of scores, in files


@dataclass(frozen=True)
class Samples:
    """A cell's images as numbers.

    Attributes:
        features: [N, d] float32, a row a prompt.
        spread: [P, K, d] float32 of K more images of each of the first P prompts; None where none were made.
        scores: key of a quantity -> [N] float64.
        hashes: [N] int64 of the images' bytes; equal images have equal ones. None for real images.
        evaluations: of the network, an image, counted.
    """

    features: Tensor
    spread: Tensor | None
    scores: dict[str, Tensor]
    hashes: Tensor | None
    evaluations: float

    @property
    def copies(self) -> int:
        """How many of the N images are a copy of an earlier one."""
        return 0 if self.hashes is None else len(self.hashes) - len(self.hashes.unique())


def measured(
    images: Images, prompts: Sequence[str], features: FeatureExtractor, scorers: Mapping[str, Scorer]
) -> dict[str, Tensor]:
    """`features` [B, d] float32 and `score/<key>` [B] float64 of uint8 images [B, H, W, 3]; `scorers` by a quantity's key."""
    found = {"features": features(images).float()}
    for key, scorer in scorers.items():
        for name, values in scorer(prompts, images).items():
            whole = name == "all" or len(scorer.names) == 1
            found[SCORE + (key if whole else f"{key}/{name}")] = values.double()
    return found


def image_hashes(images: Images) -> Tensor:
    """[N] int64: the first 64 bits of the sha256 of each image's bytes."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests], dtype=torch.int64)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, there as a whole or not at all."""
    # not `save_file`, which has temporary files of its own, that a kill leaves behind
    write_whole(path, save({name: value.contiguous() for name, value in tensors.items()}))


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there and as long as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def merged(parts: Sequence[tuple[Batch, Path]]) -> dict[str, Tensor]:
    """The tensors of a whole cell from those of its batches, in order; InputError for a part that can't be read."""
    found: dict[str, list[Tensor]] = {}
    evaluations = 0
    for batch, path in parts:
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"expected the part {str(path)!r} of a sweep, got: {error}; see whether something else works in this folder, "
                "and start again"
            ) from error
        evaluations += int(tensors.pop("evaluations"))
        for name, values in tensors.items():
            found.setdefault(f"varied/{name}" if batch.varied else name, []).append(values)
    return {"evaluations": torch.tensor(evaluations), **{name: torch.cat(values) for name, values in found.items()}}


def read_samples(path: Path, plan: Plan) -> Samples:
    """The samples of a finished cell; InputError where the file can't be read."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"expected the samples of a cell in {str(path)!r}, got: {error}; delete the folder") from error
    prompts, images = plan.spread
    varied = tensors.get("varied/features")
    return Samples(
        features=tensors["features"],
        spread=None if varied is None else varied.reshape(prompts, images, -1),
        scores={name.removeprefix(SCORE): tensors[name] for name in sorted(tensors) if name.startswith(SCORE)},
        hashes=tensors["hashes"],
        evaluations=int(tensors["evaluations"]) / (len(plan.prompts) + prompts * images),
    )
