"""What every configuration of the demo is measured with: prompts whose pictures are known, real images of the same captions.

The world draws what a caption asks for, so everything has a known best: real images of the very same captions give the floor of
the distance, the ceiling of the accuracy, and the diversity within a caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..demo.world import ATTRIBUTES, REFERENCE_SEED, TEST_SEED, World
from ..errors import InputError
from .features import Images, JudgeFeatures, to_images
from .manifold import diversity, recall
from .metrics import bootstrap_interval, frechet_to, kid, prompt_accuracy, prompt_hits
from .reference import Reference
from .table import Row

if TYPE_CHECKING:
    from .judge import Judge

N = 1200  # images a configuration
RESAMPLES = 300
PROMPTS, IMAGES = 40, 8  # captions whose diversity is looked at, and images of each
APART = 1_000_000  # index of the first of those images: their noise is no other image's


class Yardstick:
    """Measures images of the test world's captions.

    Args:
        judge: classifier of the demo world.
        sizes: numbers of images that rows are made for: the first so many captions of the test world, one image each.
        seed: of the noise of the images and of the bootstrap.
        reference: real images' statistics; measured anew by default.

    Raises InputError for sizes below 2 or none.
    """

    def __init__(
        self, judge: Judge, sizes: Sequence[int] = (N,), seed: int = 0, reference: Reference | None = None
    ) -> None:
        if not sizes or min(sizes) < 2:
            raise InputError(f"expected at least 2 images a configuration, got {sizes}; raise the number of images")
        self.sizes, self.n, self.seed, self.features = tuple(sizes), max(sizes), seed, JudgeFeatures(judge)
        self.reference = reference or Reference.measure(self.features, judge.resolution)
        self._distance = frechet_to(self.reference.mean, self.reference.cov)
        test = World(TEST_SEED, judge.resolution)
        self.prompts = test.captions(range(self.n))
        self.varied = [prompt for prompt in self.prompts[:PROMPTS] for _ in range(IMAGES)]
        self._labels = dict(zip(ATTRIBUTES, test.labels(range(self.n)).unbind(1), strict=True))
        real = to_images(test.pixels(range(self.n)))
        variants = test.variants(range(min(PROMPTS, self.n)), IMAGES)
        self.real = self.rows("real images", 0, 1.0, real, to_images(variants), evaluations=0)

    def labels(self, n: int) -> dict[str, Tensor]:
        """Attribute -> [n] int64, what the first n prompts ask for."""
        return {name: column[:n] for name, column in self._labels.items()}

    def rows(
        self, model: str, steps: int, guidance: float, images: Images, varied: Images, evaluations: float
    ) -> list[Row]:
        """A row for each of `sizes`, not timed yet.

        Args:
            images: one for each of `prompts`.
            varied: one for each of `varied`.
            evaluations: of the network, an image.
        """
        features, logits = self.features(images), self.features.logits(images)
        spread = self.features(varied)
        within = diversity(spread.reshape(-1, IMAGES, spread.shape[1]))
        interval = partial(bootstrap_interval, n=RESAMPLES, seed=self.seed, paired=True)

        def row(n: int) -> Row:
            some, labels = features[:n], self.labels(n)
            scores = {name: values[:n] for name, values in logits.items()}
            right = prompt_hits(scores, labels)["all"].double()
            return Row(
                model=model,
                steps=steps,
                guidance=guidance,
                frechet=self._distance(some),
                interval=interval(self._distance, some, centred=True),
                kid=kid(some, self.reference.features.double()),
                recall=recall(some, self.reference.features.double()),
                diversity=within,
                accuracy=prompt_accuracy(scores, labels),
                accuracy_interval=interval(lambda hits: float(hits.mean()), right),
                seconds=(),
                evaluations=evaluations,
                n=n,
            )

        return [row(n) for n in self.sizes]

    def identity(self) -> dict[str, Any]:
        """The part of the protocol that must be equal for distances to compare."""
        return {
            "features": {"name": self.features.name, "hash": self.features.weights_hash, "dim": self.features.dim},
            "seeds": {"noise": self.seed, "prompts": TEST_SEED, "reference": REFERENCE_SEED},
            "reference": f"the first {self.reference.count} images of the reference world, the same for every row; "
            f"for recall and KID the first {len(self.reference.features)}",
        }

    def protocol(self) -> dict[str, Any]:
        """How the numbers are made, for the results file."""
        return {
            **self.identity(),
            "sizes": list(self.sizes),
            "prompts": "the first N captions of the test world, one image each, initial noise by prompt",
            "real": {str(row.n): _facts(row) for row in self.real},
            "recall": "improved recall (arXiv 1904.06991), k = 3",
            "diversity": f"mean distance of features within a caption, {PROMPTS} captions of {IMAGES} images",
            "bootstrap": f"{RESAMPLES} resamples of the images, reference fixed, distances centred for their bias",
            "seconds": "pipeline calls with one prompt, configurations in turns",
        }


def _facts(row: Row) -> Mapping[str, Any]:
    """What a table needs to know of real images."""
    names = ("frechet", "interval", "kid", "recall", "diversity", "accuracy")
    return {name: list(value) if isinstance(value := getattr(row, name), tuple) else value for name in names}
