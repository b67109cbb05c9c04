"""`stepdistill doctor`: what this machine can do, and what would stop a training on it.

Each function looks at one thing and returns a :class:`Check`. Imports that may crash run in processes of their own, so that
the rest is still told. Nothing needs the network, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PYTHON = (3, 11)
GIB = 2**30
ENOUGH = (
    10  # GiB on disk; checkpoints keep the optimizer too, and latents of 100,000 images come to 13 for Stable Diffusion
)
INSTALL = "install stepdistill again: pip install -c constraints.txt -e ."
# what recipes import from each library; in the order in which one needs the other
IMPORTS = {
    "torch": "import torch",
    "transformers": "from transformers import CLIPTextModel, CLIPTokenizer",
    "peft": "from peft import LoraConfig, inject_adapter_in_model",
    "accelerate": "from accelerate import Accelerator",
    "torchmetrics": "from torchmetrics.image.fid import FrechetInceptionDistance",
    "diffusers": "from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel",
}


@dataclass(frozen=True)
class Check:
    """What one look found.

    Attributes:
        name: what was looked at.
        status: "problem" is what would stop a training, "warning" what may, "info" what is only good to know.
        detail: what is there.
        fix: what to do about a problem or warning.
    """

    name: str
    status: Literal["ok", "info", "warning", "problem"]
    detail: str
    fix: str = ""


def diagnose(output_dir: str, cache_dir: str | None) -> int:
    """Prints all checks, each as soon as it is known; returns 0 if all that is needed works, else 1."""
    problems = 0
    for check in examine(output_dir, cache_dir):
        print(shown(check), flush=True)
        problems += check.status == "problem"
    print(f"\n{problems} problem{'s' * (problems > 1)} to fix" if problems else "\nall that is needed works")
    return int(problems > 0)


def shown(check: Check) -> str:
    """A check as aligned lines."""
    first, *others = textwrap.wrap(check.detail, 87, break_long_words=False, break_on_hyphens=False)
    if check.fix:
        others.append(f"fix: {check.fix}")  # in one line, since commands in it are to be copied
    return "\n".join([f"{check.status:<8} {check.name:<13} {first}", *(f"{'':<23}{line}" for line in others)])


def examine(output_dir: str, cache_dir: str | None) -> Iterator[Check]:
    """All checks; `cache_dir` None means the place that training would take."""
    with ThreadPoolExecutor() as pool:  # the slow ones side by side
        libraries, vision, network = (pool.submit(look) for look in (imports, torchvision, hub))
        yield python()
        yield from contained("packages", packages)
        yield libraries.result()
        yield vision.result()
        yield from contained("compute", compute)
        yield folder("output", Path(output_dir), "--output_dir")
        yield from contained("cache", lambda: cache(cache_dir))
        yield network.result()


def contained(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    """`look()`, or the error that it ends with as a problem: in a broken installation anything can fail."""
    try:
        return look()
    except Exception as error:
        return [Check(name, "problem", f"can't be looked at: {type(error).__name__}: {error}", INSTALL)]


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """The interpreter."""
    detail = ".".join(map(str, version))
    if version < PYTHON:
        needed = ".".join(map(str, PYTHON))
        return Check("python", "problem", f"{detail}, {needed} is needed", f"make a venv with Python {needed} or newer")
    return Check("python", "ok", f"{detail} ({sys.executable})")


def packages() -> list[Check]:
    """Installed versions against the ranges of stepdistill's own metadata: one check for all that fit, one for each other."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("stepdistill") or []
    except metadata.PackageNotFoundError:
        return [Check("packages", "warning", "stepdistill is not installed, so no ranges are known", INSTALL)]
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
    checks = [package(requirement) for requirement in wanted]
    fit = ", ".join(f"{c.name} {c.detail}" for c in checks if c.status == "ok")
    return [*([Check("packages", "ok", fit)] if fit else []), *(c for c in checks if c.status != "ok")]


def package(requirement: Requirement) -> Check:
    """One installed package."""
    name, wanted = requirement.name, str(requirement.specifier)
    fix = f"pip install '{name}{wanted}'"
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "problem", f"not installed, {wanted or 'any version'} is needed", fix)
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(name, "problem", f"{found}, {wanted} is needed", fix)
    return Check(name, "ok", found)


def run_python(code: str, seconds: float = 120.0) -> tuple[str, str]:
    """(what it printed, why it failed or "") of a program in a process of its own, with this one's packages."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # a folder named torch where one stands is no package
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return "", f"no end after {seconds:g} s"
    if done.returncode < 0:
        return done.stdout, f"killed by {signal.Signals(-done.returncode).name}"
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return done.stdout, last[:300] if done.returncode else ""


def imports() -> Check:
    """Whether the parts that recipes use can be imported."""
    code = "\n".join(f"print({name!r}, flush=True)\n{statement}" for name, statement in IMPORTS.items())
    printed, failure = run_python(code)
    if not failure:
        return Check("imports", "ok", f"{', '.join(IMPORTS)} with what recipes use of them")
    name = (printed.split() or ["python"])[-1]
    fix = "mend torchvision first" if "torchvision" in failure else f"pip install --force-reinstall {name}"
    return Check("imports", "problem", f"{name} does not import: {failure}", fix)


def torchvision() -> Check:
    """A torchvision of another build than torch's breaks transformers, peft and torchmetrics, which look for it."""
    code = (
        "import importlib.util\n"
        "if importlib.util.find_spec('torchvision'):\n"
        "    import torchvision\n"
        "    print(torchvision.__version__)\n"
    )
    printed, failure = run_python(code)
    if failure:
        fix = "pip uninstall torchvision (nothing here needs it), or install the build that matches torch"
        return Check("torchvision", "problem", f"does not import: {failure}", fix)
    return Check("torchvision", "ok", printed.strip() or "not installed, and not needed")


def compute() -> list[Check]:
    """Cores, devices with the precisions that work on them, and what connects processes."""
    import torch

    found = devices()
    names = [check.name for check in found if check.status == "ok"] or ["cpu"]
    return [cores(usable_cores(), torch.get_num_threads()), *found, *map(precision, names), distributed()]


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores this process may use: by affinity, and by the quota that containers set (may be a fraction)."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(allowed, _quota(cgroup))


def _quota(cgroup: Path) -> float:
    """The control group's quota in cores; infinite without one."""
    with contextlib.suppress(OSError, ValueError):  # version 2: "max 100000", or "150000 100000"
        used, period = (cgroup / "cpu.max").read_text().split()
        return int(used) / int(period)
    with contextlib.suppress(OSError, ValueError):  # version 1: -1 for none
        used, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(used) / int(period) if int(used) > 0 else math.inf
    return math.inf


def cores(usable: float, threads: int) -> Check:
    """More threads than cores slow every operation down."""
    detail = f"{usable:g} of {os.cpu_count()} cores usable, torch uses {threads} thread{'s' * (threads > 1)}"
    if threads > max(1.0, usable):
        return Check("cpu", "warning", detail, f"export OMP_NUM_THREADS={max(1, int(usable))}")
    return Check("cpu", "ok", detail)


def devices(nvidia: Path = Path("/proc/driver/nvidia/version")) -> list[Check]:
    """GPUs by the names that torch gives them; a driver that torch makes nothing of is a warning."""
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        detail = f"{about.name}, {about.total_memory / GIB:.0f} GiB, capability {about.major}.{about.minor}"
        found.append(Check(f"cuda:{i}", "ok", detail))
    if torch.backends.mps.is_available():
        found.append(Check("mps", "ok", "Apple GPU; its memory is the machine's"))
    if found or not nvidia.exists():
        return found or [Check("devices", "info", "neither CUDA nor MPS: training runs on the CPU")]
    detail = f"there is an NVIDIA driver, but torch {torch.__version__} finds no GPU"
    fix = (
        "install a torch built for CUDA"
        if torch.version.cuda is None
        else "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    )
    return [Check("devices", "warning", detail, fix)]


def precision(device: str) -> Check:
    """Small products on `device` in each precision, plain and under autocast, against float64."""
    import torch

    a = torch.linspace(-1.0, 1.0, 32 * 32, dtype=torch.float64).reshape(32, 32)
    works = []
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        try:
            x = a.float().to(device)
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                products = x.to(dtype) @ x.to(dtype), x @ x
            if all(p.dtype == dtype and torch.allclose(p.cpu().double(), a @ a, 0.02, 0.1) for p in products):
                works.append(name)
        except RuntimeError:
            continue  # the device has no such kernels
    detail = f"{', '.join(works) or 'nothing'} on {device}"
    if "fp32" not in works:
        return Check("precision", "problem", detail, f"{device} does not compute: look at its driver and its memory")
    if "bf16" not in works:
        return Check("precision", "warning", detail, "use --train.mixed_precision no, or fp16 on a GPU")
    return Check("precision", "ok", detail + ("; Accelerate trains in fp16 on GPUs only" if device == "cpu" else ""))


def distributed() -> Check:
    """The backends that several processes can talk over."""
    import torch.distributed as dist

    names = ("nccl", "gloo", "mpi", "ucc", "xccl")
    found = [name for name in names if dist.is_available() and dist.is_backend_available(name)]
    return Check("distributed", "info", ", ".join(found) or "no backend: one process only")


def cache(cache_dir: str | None) -> list[Check]:
    """The folder where training keeps its caches."""
    from .data.config import DataConfig

    return [folder("cache", DataConfig(cache_dir=cache_dir).cache_folder(), "--data.cache_dir")]


def folder(name: str, path: Path, option: str) -> Check:
    """Does in `path` what checkpoints and caches do; a folder that was not there is gone again after."""
    missing: list[Path] = []
    try:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        with _doing("make"):
            path.mkdir(parents=True, exist_ok=True)
            inside = tempfile.TemporaryDirectory(dir=path, prefix=".doctor-")
        with inside:
            _exercise(Path(inside.name))
        free = shutil.disk_usage(path).free / GIB
    except OSError as error:
        return Check(
            name, "problem", f"{path}: {error}", f"give {option} a folder that you may write to, on a local disk"
        )
    finally:
        for made in missing:
            with contextlib.suppress(OSError):  # it could not be made, or somebody else uses it by now
                made.rmdir()
    detail = f"{path}: files can be made, synced, renamed, locked and deleted; {free:.0f} GiB free"
    if free < ENOUGH:
        return Check(name, "warning", detail, f"free some space, or give {option} a folder on another disk")
    return Check(name, "ok", detail)


def _exercise(inside: Path) -> None:
    with _doing("write"):
        (inside / "first").write_bytes(b"stepdistill")
    with _doing("fsync"), (inside / "first").open("rb+") as file:
        os.fsync(file.fileno())
    if sys.platform != "win32":
        import fcntl

        with _doing("lock"), (inside / "first").open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with _doing("rename"):
        (inside / "first").rename(inside / "second")
    with _doing("delete"):
        (inside / "second").unlink()


@contextlib.contextmanager
def _doing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"can't {what}: {error.strerror or error}") from error


def hub() -> Check:
    """Whether checkpoints can be downloaded. In a process of its own, since looking a name up may hang."""
    code = (
        "from huggingface_hub import constants\n"
        "from stepdistill.families.loading import hub_is_reachable\n"
        "print('off' if constants.HF_HUB_OFFLINE else hub_is_reachable())\n"
    )
    printed, _ = run_python(code, seconds=10.0)
    local = "checkpoints must be folders here or in the hub's cache"
    said = {"off": f"offline, as HF_HUB_OFFLINE says: {local}", "True": "reachable"}
    return Check("hub", "info", said.get(printed.strip(), f"not reachable: {local}"))
