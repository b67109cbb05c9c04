"""A trained language model or classifier into a folder that stock Transformers opens: weights, tokenizer, facts, a model card.

It is opened again by the stock class, and what that computes must be what the student computes, to the bit; in half precision
what the student computes with rounded weights, and that may not be far from what it computes without.
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
from ..families.fingerprint import fingerprint, hashed
from ..families.loading import is_local
from ..networks.merge import merged
from ..networks.network import Network
from ..networks.pretrained import quiet
from .config import Dtype
from .folder import FACTS, TEMP, commit, put_back
from .licence import licence
from .lines import PLACE, quoted

SCHEMA = 1
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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
        teacher: checkpoint of the teacher, in the same way; None for what learned from none.
        results: JSON, for programs; {} where nothing was measured.
        details: lines of the card. They and the sections name no place on this machine: cards are uploaded.
        sections: heading -> Markdown.
        checkpoint: fit and step, where it was rebuilt from a checkpoint.
    """

    task: str
    method: str
    title: str
    base: str
    teacher: str | None
    results: Mapping[str, Any]
    details: Sequence[str] = ()
    sections: Mapping[str, str] = field(default_factory=dict)
    checkpoint: Mapping[str, Any] | None = None


def export_network(
    folder: str | Path,
    student: Network,
    companion: Any,
    probe: Mapping[str, Tensor],
    report: Report,
    dtype: Dtype = "fp32",
) -> Path:
    """Writes the student into `folder` with its tokenizer or image processor, stepdistill.json and README.md.

    An adapter is merged into the weights under it.

    Args:
        companion: tokenizer or image processor; its save_pretrained is called.
        probe: inputs of the module, on which the opened model is compared with the student.
        report: the rest.
        dtype: of the weights that are written.

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
        rounded = round_weights(module, DTYPES[dtype])
        (rounded if dtype == "fp32" else copy.deepcopy(rounded).to(DTYPES[dtype])).save_pretrained(str(temp))
        if LOADED[report.task] == "AutoTokenizer" and companion.is_fast:
            companion.backend_tokenizer.no_truncation()  # its last call's, which the file would keep
            companion.backend_tokenizer.no_padding()
        companion.save_pretrained(str(temp))
        for file in temp.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes files that only their owner can read
        verified = {"logits_differ_by": compare(temp, rounded, probe, report.task, DTYPES[dtype])}
        if dtype != "fp32":
            verified["rounding_moves_logits_by"] = check_rounding(module, rounded, probe, DTYPES[dtype])
        facts = _facts(student, module, report, verified, temp, dtype)
        (temp / "README.md").write_text(card(folder, facts), encoding="utf-8")
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
def round_weights(module: Any, dtype: torch.dtype) -> Any:
    """A copy in float32 whose weights are what `dtype` makes of them; in float32 the module itself."""
    if dtype == torch.float32:
        return module
    rounded = copy.deepcopy(module)
    for value in rounded.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.to(dtype))
    return rounded


def check_rounding(module: Any, rounded: Any, probe: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """How far rounded weights move the logits, as a share of the largest; ExportError for sqrt(eps) of the dtype or more."""
    plain, moved = _logits(module, probe), _logits(rounded, probe)
    share, bound = float((moved - plain).abs().max() / plain.abs().max()), torch.finfo(dtype).eps ** 0.5
    if not share <= bound:  # nan is none
        raise ExportError(
            f"weights in {dtype} compute something else: logits move by {share:.3g} of the largest, more than {bound:.2g}; "
            "export in another precision (--export.dtype fp32)"
        )
    return share


@torch.no_grad()
def _logits(module: Any, probe: Mapping[str, Tensor]) -> Tensor:
    device = next(module.parameters()).device
    with torch.autocast(device.type, enabled=False):
        logits: Tensor = module.eval()(**{name: value.to(device) for name, value in probe.items()}).logits
    return logits.cpu().double()  # MPS has no float64


def compare(
    folder: Path, module: Any, probe: Mapping[str, Tensor], task: str, dtype: torch.dtype = torch.float32
) -> float:
    """The largest difference between the logits of `module` and of what the stock class opens; ExportError unless it is 0.

    Args:
        module: in float32.
        dtype: of the weights in the files; opened in it, they are brought to float32.
    """
    import transformers

    try:
        opened, info = getattr(transformers, AUTO[task]).from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f"Transformers does not open {folder}: {' '.join(str(error).split())[:300]}") from error
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if wrong:
        raise ExportError(
            f"Transformers opens {folder} with {len(wrong)} weights missing or left over, first {wrong[0]}"
        )
    # weights mapped from a file lie at any address, and matrix products of unaligned ones may round in another way
    opened = copy.deepcopy(opened).to(next(module.parameters()).device, torch.float32)
    difference = float((_logits(opened, probe) - _logits(module, probe)).abs().max())
    if difference != 0.0:  # nan is unequal too
        raise ExportError(f"the opened student computes something else: its logits differ by up to {difference:.3g}")
    return difference


def weights_hash(network: Network, role: str = "") -> dict[str, str]:
    """dtype -> a hash of a teacher's weights, by which a resumed run knows it again; `role` tells several teachers apart."""
    dtype = str(next(network.module.parameters()).dtype).removeprefix("torch.")
    return {f"{role} {dtype}".strip(): fingerprint(type(network.module).__name__, network.module)}


def student_hash(student: Network) -> str:
    """Of all weights that a student computes with, an adapter's own and those under it: what results belong to."""
    name = type(student.module).__name__
    return hashed(name if student.adapters is None else fingerprint(name, student.module), student.state())


def _facts(
    student: Network, module: Any, report: Report, verified: Mapping[str, float], saved: Path, dtype: Dtype
) -> dict[str, Any]:
    spec = None if student.adapters is None or student.adapter is None else student.adapters.specs[student.adapter]
    return {
        "schema": SCHEMA,
        "task": report.task,
        "method": report.method,
        "title": report.title,
        "class": type(module).__name__,
        "base_model": None if report.base == "demo" else report.base,
        "teacher": report.teacher,
        "licence": {} if report.base == "demo" else licence(TeacherConfig(report.base)),
        "student": {
            "kind": "full" if spec is None else "lora",
            "parameters": sum(p.numel() for p in module.parameters()),
            **({} if spec is None else {"rank": spec.rank, "alpha": spec.alpha}),
            "dtype": dtype,
            "hash": student_hash(student),
        },
        **({} if report.checkpoint is None else {"checkpoint": dict(report.checkpoint)}),
        "results": dict(report.results),
        "details": list(report.details),
        "sections": dict(report.sections),
        "verified": dict(verified),
        "weights": {p.name: _sha256(p) for p in sorted(saved.glob("*.safetensors"))},
        "versions": {"stepdistill": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }


def elsewhere(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts for readers at other machines: without paths of this one."""
    places = {
        key: PLACE.format(Path(path).name)
        for key in ("base_model", "teacher")
        if (path := facts[key]) not in (None, "demo") and is_local(path)
    }
    return {**facts, **places}


def card(place: str | Path, facts: Mapping[str, Any]) -> str:
    """The model card: what it is, how it is opened from `place`, how it was made and how well it does."""
    hub = facts["base_model"] is not None and not is_local(facts["base_model"])
    fields = {
        **({"base_model": facts["base_model"]} if hub else {}),
        **facts["licence"],
        "library_name": "transformers",
        "pipeline_tag": facts["task"],
    }
    rows = [*(f"{name}: {quoted(value)}" for name, value in fields.items()), "tags:"]
    tags = [] if facts["teacher"] is None else [facts["method"], "distillation"]
    front = "\n".join(["---", *rows, *(f"- {tag}" for tag in (*tags, "stepdistill")), "---"])
    auto, loaded = AUTO[facts["task"]], LOADED[facts["task"]]
    name = "tokenizer" if loaded == "AutoTokenizer" else "processor"
    code = (
        f"from transformers import {', '.join(sorted((auto, loaded)))}\n\nmodel = {auto}.from_pretrained({quoted(place)})\n"
        f"{name} = {loaded}.from_pretrained({quoted(place)})"
    )
    made = "made with " + ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
    details = "\n".join(f"- {line}" for line in (*_detail_lines(facts), made))
    parts = [front, f"# {facts['title']}", f"```python\n{code}\n```", "## Details", details]
    for heading, text in facts["sections"].items():
        parts += [f"## {heading}", text]
    return "\n\n".join(parts) + "\n"


def _detail_lines(facts: Mapping[str, Any]) -> list[str]:
    student, lines = facts["student"], []
    size = f"{facts['class']}, {student['parameters']:,} parameters, {student['dtype']}"
    if student["dtype"] != "fp32" and facts["results"]:
        size += "; it was measured in float32, before its weights were rounded"
    if facts["teacher"] is not None:
        lines.append(f"teacher: {facts['teacher']}")
    if "checkpoint" in facts:
        lines.append("checkpoint: step {step} of the fit {fit}".format(**facts["checkpoint"]))
    return [size, *lines, *facts["details"]]


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
