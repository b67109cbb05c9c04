"""A trained language model or classifier into a folder that stock Transformers opens: weights, tokenizer, facts, a model card.

It is opened again by the stock class, and what that computes must be what the student computes, to the bit.
Like other students it is written into a hidden folder and moved into place as a whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import ExportError, InputError
from ..families.config import TeacherConfig
from ..families.fingerprint import fingerprint
from ..families.loading import is_local
from ..networks.merge import merged
from ..networks.network import Network
from ..networks.pretrained import quiet
from .folder import FACTS, TEMP, commit, put_back
from .licence import licence
from .lines import quoted

SCHEMA = 1
AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
LOADED = {
    "text-generation": "AutoTokenizer",
    "fill-mask": "AutoTokenizer",
    "text-classification": "AutoTokenizer",
    "image-classification": "AutoImageProcessor",
}


@dataclass(frozen=True)
class Report:
    """What a run says of its student.

    Attributes:
        task: text-generation, fill-mask, text-classification or image-classification.
        method: e.g. lm_kd.
        title: of the card, e.g. "Distilled language model".
        base: checkpoint that the student started from: folder or hub id, "demo" for random weights.
        teacher: checkpoint of the teacher, in the same way.
        results: JSON, for programs.
        details: lines of the card.
        sections: heading -> Markdown.
    """

    task: str
    method: str
    title: str
    base: str
    teacher: str
    results: Mapping[str, Any]
    details: Sequence[str] = ()
    sections: Mapping[str, str] = field(default_factory=dict)


def export_network(
    folder: str | Path, student: Network, companion: Any, probe: Mapping[str, Tensor], report: Report
) -> Path:
    """Writes the student into `folder` with its tokenizer or image processor, stepdistill.json and README.md.

    An adapter is merged into the weights under it.

    Args:
        companion: tokenizer or image processor; its save_pretrained is called.
        probe: inputs of the module, on which the opened model is compared with the student.
        report: the rest.

    Raises:
        ExportError: what was written does not open, or computes something else.
        InputError: it can't be written.
    """
    folder, temp = Path(folder), Path(folder) / TEMP
    module: Any = copy.deepcopy(student.module).eval() if student.adapters is None else merged(student)
    quiet()
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        put_back(folder)
        module.save_pretrained(str(temp))
        companion.save_pretrained(str(temp))
        for file in temp.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes files that only their owner can read
        difference = compare(temp, module, probe, report.task)
        facts = _facts(student, module, report, difference, temp)
        (temp / "README.md").write_text(card(folder, facts, report), encoding="utf-8")
        written = {str(path.relative_to(temp)) for path in temp.rglob("*") if path.is_file()}
        facts["files"] = sorted({*written, FACTS})
        (temp / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        commit(temp, folder)
    except OSError as error:
        raise InputError(
            f"expected to write the student into {folder}, got: {error}; free space or fix permissions"
        ) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


@torch.no_grad()
def compare(folder: Path, module: Any, probe: Mapping[str, Tensor], task: str) -> float:
    """The largest difference between the logits of `module` and of what the stock class opens; ExportError unless it is 0."""
    import transformers

    try:
        opened, info = getattr(transformers, AUTO[task]).from_pretrained(
            str(folder), dtype=module.dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f"Transformers does not open {folder}: {' '.join(str(error).split())[:300]}") from error
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if wrong:
        raise ExportError(
            f"Transformers opens {folder} with {len(wrong)} weights missing or left over, first {wrong[0]}"
        )
    # weights mapped from a file lie at any address, and matrix products of unaligned ones may round in another way
    opened, device = copy.deepcopy(opened), next(module.parameters()).device
    given = {name: value.to(device) for name, value in probe.items()}
    with torch.autocast(device.type, enabled=False):
        found, wanted = (m.eval()(**given).logits.double() for m in (opened.to(device), module))
    difference = float((found - wanted).abs().max())
    if difference != 0.0:  # nan is unequal too
        raise ExportError(f"the opened student computes something else: its logits differ by up to {difference:.3g}")
    return difference


def weights_hash(network: Network) -> dict[str, str]:
    """dtype -> a hash of a teacher's weights, by which a resumed run knows it again."""
    dtype = next(network.module.parameters()).dtype
    return {str(dtype).removeprefix("torch."): fingerprint(type(network.module).__name__, network.module)}


def _facts(student: Network, module: Any, report: Report, difference: float, saved: Path) -> dict[str, Any]:
    spec = None if student.adapters is None or student.adapter is None else student.adapters.specs[student.adapter]
    return {
        "schema": SCHEMA,
        "task": report.task,
        "method": report.method,
        "class": type(module).__name__,
        "base_model": None if report.base == "demo" else report.base,
        "teacher": report.teacher,
        "licence": {} if report.base == "demo" else licence(TeacherConfig(report.base)),
        "student": {
            "kind": "full" if spec is None else "lora",
            "parameters": sum(p.numel() for p in module.parameters()),
            **({} if spec is None else {"rank": spec.rank, "alpha": spec.alpha}),
        },
        "results": dict(report.results),
        "verified": {"logits_differ_by": difference},
        "weights": {p.name: _sha256(p) for p in sorted(saved.glob("*.safetensors"))},
        "versions": {"stepdistill": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }


def card(folder: Path, facts: Mapping[str, Any], report: Report) -> str:
    """The model card: what it is, how it is opened, how it was made and how well it does."""
    hub = facts["base_model"] is not None and not is_local(facts["base_model"])
    fields = {
        **({"base_model": facts["base_model"]} if hub else {}),
        **facts["licence"],
        "library_name": "transformers",
        "pipeline_tag": report.task,
    }
    rows = [*(f"{name}: {quoted(value)}" for name, value in fields.items()), "tags:"]
    front = "\n".join(["---", *rows, f"- {report.method}", "- distillation", "- stepdistill", "---"])
    auto, loaded = AUTO[report.task], LOADED[report.task]
    name = "tokenizer" if loaded == "AutoTokenizer" else "processor"
    code = (
        f"from transformers import {', '.join(sorted((auto, loaded)))}\n\nmodel = {auto}.from_pretrained({quoted(folder)})\n"
        f"{name} = {loaded}.from_pretrained({quoted(folder)})"
    )
    made = "made with " + ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
    size = f"{facts['class']}, {facts['student']['parameters']:,} parameters"
    details = "\n".join(f"- {line}" for line in (size, *report.details, made))
    parts = [front, f"# {report.title}", f"```python\n{code}\n```", "## Details", details]
    for heading, text in report.sections.items():
        parts += [f"## {heading}", text]
    return "\n\n".join(parts) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
