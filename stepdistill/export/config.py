"""How a student is exported. Imports nothing heavy, so that recipes and the command line can read it first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verify = Literal["shared", "full", "none"]
Dtype = Literal["fp32", "fp16", "bf16"]


@dataclass
class ExportConfig:
    """What is written, and how it is checked.

    Attributes:
        dtype: of the saved weights; training keeps fp32, and a pipeline in half precision casts on load.
        verify: "shared" loads the export back beside the student on the same weights, "full" into a fresh pipeline, "none"
            trusts it.
    """

    dtype: Dtype = "fp32"
    verify: Verify = "shared"
