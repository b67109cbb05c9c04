"""What is measured, in one list: the key in results files, what people call it, which way is better, how it is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Quantity:
    """One column.

    Attributes:
        key: in results files, and in `--fail_if`.
        label: in tables and plots.
        better: "neither" where both too little and too much are wrong, as for diversity.
        form: format of a value.
        floored: real images don't score 0 at a finite number of images, so ratios are taken less what they score.
        note: a sentence for the legend.
    """

    key: str
    label: str
    better: Better
    form: str = ".3g"
    floored: bool = False
    note: str = ""


ACCURACY = "accuracy"  # accuracy is of all attributes at once, accuracy/<name> of one of them

QUANTITIES = (
    Quantity("fd", "Frechet distance", "lower", floored=True, note="Gaussians of the features (arXiv 1706.08500)"),
    Quantity("fd_infinity", "FD at infinity", "lower", note="extrapolated in 1/N (arXiv 1911.07023)"),
    Quantity(
        "kid", "KID", "lower", ".2g", note="unbiased cubic-kernel MMD (arXiv 1801.01401): about 0 for real images"
    ),
    Quantity("cmmd", "CMMD", "lower", note="unbiased Gaussian-kernel MMD, x 1000 (arXiv 2401.09603)"),
    Quantity("recall", "recall", "higher", ".2f", note="improved recall, k = 3 (arXiv 1904.06991)"),
    Quantity("coverage", "coverage", "higher", ".2f", note="k = 5 (arXiv 2002.09797)"),
    Quantity("diversity", "diversity", "neither", note="mean feature distance between images of one prompt"),
    Quantity("clip_score", "CLIP score", "higher", ".1f", note="100 cos(image, prompt) (arXiv 2104.08718)"),
    Quantity("rms_to_teacher", "RMS to teacher", "lower", ".3f", note="pixels in [0, 1], same prompt and noise"),
    Quantity("features_to_teacher", "features to teacher", "lower", note="feature distance, same prompt and noise"),
    Quantity(ACCURACY, "all right", "higher", ".1%", note="share of images that show all that the prompt asks for"),
)
OPTIONAL = ("fd_infinity", "cmmd", "coverage")  # measured only where they are asked for
BY_KEY = {quantity.key: quantity for quantity in QUANTITIES}


def quantity(key: str) -> Quantity:
    """The quantity of a key; that of one attribute's accuracy is made as it is asked for. KeyError for unknown keys."""
    if key.startswith(f"{ACCURACY}/"):
        return Quantity(key, key.removeprefix(f"{ACCURACY}/"), "higher", ".1%")
    return BY_KEY[key]
