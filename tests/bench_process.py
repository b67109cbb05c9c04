"""A sweep of the tiny pipeline in a process of its own, or in several under torchrun: `python bench_process.py FLAGS`.

With an environment variable DIE_AFTER it kills itself, as `kill -9` would, inside the batch after so many.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from stepdistill import cli
from stepdistill.bench.contenders import Contender


def dying(after: int) -> None:
    """Ends the process without a word once so many batches were made."""
    original, made = Contender.images, 0

    def images(self: Contender, *arguments: Any) -> Any:
        nonlocal made
        if made == after:
            os.kill(os.getpid(), signal.SIGKILL)
        made += 1
        return original(self, *arguments)

    Contender.images = images  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "DIE_AFTER" in os.environ:
        dying(int(os.environ["DIE_AFTER"]))
    cli.main(["bench", *sys.argv[1:]])
