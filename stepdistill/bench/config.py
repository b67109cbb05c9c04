"""Options of the evaluation at a recipe's end. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import CommaList
from ..errors import InputError


@dataclass
class EvalConfig:
    """The evaluation at the end of a run on the demo teacher.

    Attributes:
        images: images made for each row of the table; 0 skips it.
        steps: the student's numbers of steps.
        results: results file with the teacher's rows.
        reference: file with the statistics of the real images.
    """

    images: int = 1200
    steps: CommaList = CommaList(("8", "4", "2", "1"))  # noqa: RUF009  # immutable
    results: str = "benchmarks/results/demo_teacher.json"
    reference: str = "benchmarks/results/demo_reference.safetensors"

    def __post_init__(self) -> None:
        if self.images < 0 or self.images == 1:
            raise InputError(f"expected 0 images (no evaluation) or at least 2, got {self.images}; fix --eval.images")
        if not self.steps or min(self.steps.ints()) < 1:
            raise InputError(f"expected numbers of steps >= 1, got {','.join(self.steps)!r}; fix --eval.steps")
