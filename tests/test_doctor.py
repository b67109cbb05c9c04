"""Every failing case of the doctor ends in a check that names its fix, and looking leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from stepdistill import doctor
from stepdistill.doctor import Check

GIB = 2**30


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that other processes import packages from before any other place."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def fake_torchvision(site: Path, body: str) -> None:
    (site / "torchvision").mkdir()
    (site / "torchvision" / "__init__.py").write_text(body)


BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')\n"


# -- installation -----------------------------------------------------------------------------------------------------


def test_python() -> None:
    old = doctor.python((3, 10, 14))
    assert (old.status, old.fix) == ("problem", "make a venv with Python 3.11 or newer")
    assert "3.10.14, 3.11 is needed" in old.detail
    assert doctor.python((3, 11, 0)).status == "ok"
    assert doctor.python().status == "ok"


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ("0.41.9", "problem"),
        ("0.42.0", "ok"),
        ("0.42.0+cpu", "ok"),
        ("1.0", "problem"),
        ("0.50.dev1", "ok"),
        (None, "problem"),
    ],
)
def test_a_version_against_its_range(found: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    check = doctor.package(Requirement("diffusers[torch]>=0.42,<1"))
    assert check.status == status
    assert check.name == "diffusers"
    assert check.fix == ("" if status == "ok" else "pip install 'diffusers<1,>=0.42'")
    assert (found or "not installed") in check.detail


def test_all_packages_of_our_metadata_but_those_of_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.6", "peft>=0.18", "scipy>=1.14; extra == 'dev'", "tqdm; python_version < '3.9'", "numpy"]
    versions = {"torch": "2.13.0+cpu", "peft": "0.17.1", "numpy": "2.4"}
    monkeypatch.setattr(metadata, "requires", lambda name: lines if name == "stepdistill" else None)
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    assert doctor.packages() == [
        Check("packages", "ok", "torch 2.13.0+cpu, numpy 2.4"),
        Check("peft", "problem", "0.17.1, >=0.18 is needed", "pip install 'peft>=0.18'"),
    ]


def test_packages_as_they_are_here() -> None:
    (check,) = doctor.packages()
    assert check.status == "ok"
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "torchmetrics", "datasets"):
        assert f"{name} {metadata.version(name)}" in check.detail
    assert "scipy" not in check.detail


def test_a_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    (check,) = doctor.packages()
    assert (check.status, check.fix) == ("warning", doctor.INSTALL)


def test_a_torchvision_of_another_build(site: Path) -> None:
    fake_torchvision(site, BROKEN)
    check = doctor.torchvision()
    assert check.status == "problem"
    assert check.detail == "does not import: RuntimeError: operator torchvision::nms does not exist"
    assert "pip uninstall torchvision" in check.fix
    assert "build that matches torch" in check.fix


def test_a_torchvision_that_crashes_is_contained(site: Path) -> None:
    fake_torchvision(site, "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    check = doctor.torchvision()
    assert (check.status, check.detail) == ("problem", "does not import: killed by SIGSEGV")


def test_a_torchvision_that_works(site: Path) -> None:
    fake_torchvision(site, "__version__ = '0.28.0'\n")
    assert doctor.torchvision() == Check("torchvision", "ok", "0.28.0")


@pytest.mark.parametrize(
    ("statement", "detail", "fix"),
    [
        (
            "import no_such_package",
            "peft does not import: ModuleNotFoundError: No module named 'no_such",
            "reinstall peft",
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "peft does not import: killed by SIGILL",
            "reinstall",
        ),
        ("raise RuntimeError('operator torchvision::nms is not here')", "torchvision::nms", "mend torchvision first"),
    ],
)
def test_a_library_that_does_not_import_is_named(
    statement: str, detail: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "IMPORTS", {"torch": "import json", "peft": statement, "diffusers": "import json"})
    check = doctor.imports()
    assert check.status == "problem"
    assert detail in check.detail
    assert fix in check.fix


def test_libraries_that_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "IMPORTS", {"torch": "import json", "peft": "import this"})
    check = doctor.imports()
    assert (check.status, check.fix) == ("ok", "")
    assert check.detail.startswith("torch, peft")


def test_processes_apart_end_in_time_and_see_no_package_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.run_python("import time; time.sleep(60)", seconds=0.2) == ("", "no end after 0.2 s")
    (tmp_path / "packaging.py").write_text("raise RuntimeError('not the one that is meant')")
    monkeypatch.chdir(tmp_path)
    assert doctor.run_python("import packaging; print('fine')") == ("fine\n", "")


def test_what_cannot_be_looked_at_is_a_problem() -> None:
    def look() -> list[Check]:
        raise ImportError("libtorch.so: cannot open")

    (check,) = doctor.contained("compute", look)
    assert (check.name, check.status, check.fix) == ("compute", "problem", doctor.INSTALL)
    assert "ImportError: libtorch.so: cannot open" in check.detail


# -- what computes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu.max": "9900000 100000\n"}, 64),
    ],
)
def test_cores_by_affinity_and_quota(
    files: dict[str, str], cores: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert doctor.usable_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("usable", "threads", "fix"),
    [(4.0, 4, ""), (4.0, 8, "export OMP_NUM_THREADS=4"), (1.5, 2, "export OMP_NUM_THREADS=1"), (0.5, 1, "")],
)
def test_more_threads_than_cores(usable: float, threads: int, fix: str) -> None:
    check = doctor.cores(usable, threads)
    assert check.fix == fix
    assert check.status == ("warning" if fix else "ok")


def test_gpus_by_name_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    about = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: about)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert doctor.devices(tmp_path) == [
        Check(f"cuda:{i}", "ok", "NVIDIA H100, 80 GiB, capability 9.0") for i in range(2)
    ]


@pytest.mark.parametrize(
    ("cuda", "driver", "status", "fix"),
    [
        (None, False, "info", ""),
        (None, True, "warning", "install a torch built for CUDA"),
        ("12.8", True, "warning", "look at nvidia-smi and CUDA_VISIBLE_DEVICES"),
    ],
)
def test_no_gpu(
    cuda: str | None, driver: bool, status: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (check,) = doctor.devices(tmp_path if driver else tmp_path / "nothing")
    assert (check.status, check.fix) == (status, fix)


def test_precisions_of_the_cpu() -> None:
    check = doctor.precision("cpu")
    assert check.status == "ok"
    assert check.detail.startswith("fp32, bf16")


@pytest.mark.parametrize(
    ("missing", "status", "detail", "fix"),
    [
        ((torch.bfloat16,), "warning", "fp32, fp16 on cpu", "mixed_precision no"),
        ((torch.float32, torch.bfloat16, torch.float16), "problem", "nothing on cpu", "driver"),
        ((torch.float16,), "ok", "fp32, bf16 on cpu", ""),
    ],
)
@pytest.mark.parametrize("raises", [True, False])
def test_precisions_that_a_device_has_not(
    missing: tuple[Any, ...], status: str, detail: str, fix: str, raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product is refused, or comes out wrong."""
    product = torch.Tensor.__matmul__

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype not in missing:
            return product(a, b)
        if raises:
            raise RuntimeError("no kernel")
        return 0 * product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    check = doctor.precision("cpu")
    assert check.status == status
    assert check.detail.split(";")[0] == detail
    assert fix in check.fix


def test_autocast_that_does_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    assert doctor.precision("cpu").status == "warning"


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name in ("gloo", "nccl"))
    assert doctor.distributed() == Check("distributed", "info", "nccl, gloo")
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert "one process only" in doctor.distributed().detail


def test_all_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "devices", lambda: [Check("cuda:0", "ok", ""), Check("cuda:1", "ok", "")])
    monkeypatch.setattr(doctor, "precision", lambda name: Check("precision", "ok", name))
    assert [c.detail for c in doctor.compute() if c.name == "precision"] == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(doctor, "devices", lambda: [Check("devices", "info", "none")])
    assert [c.detail for c in doctor.compute() if c.name == "precision"] == ["cpu"]


# -- folders and network ----------------------------------------------------------------------------------------------


def test_a_new_folder_is_gone_again(tmp_path: Path) -> None:
    check = doctor.folder("output", tmp_path / "runs" / "lcm", "--output_dir")
    assert check.status in ("ok", "warning")  # a full disk is a warning
    assert "GiB free" in check.detail
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1")
    doctor.folder("output", tmp_path, "--output_dir")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    empty = tmp_path / "empty"
    empty.mkdir()
    doctor.folder("output", empty, "--output_dir")
    assert empty.is_dir()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for path, reason in ((tmp_path / "out", "File exists"), (tmp_path / "out" / "lcm", "Not a directory")):
        check = doctor.folder("output", path, "--output_dir")
        assert check.status == "problem"
        assert check.detail == f"{path}: can't make: {reason}"
        assert "--output_dir" in check.fix
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_that_may_not_be_written(mode: int, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=mode)
    try:
        for path in (closed, closed / "new"):
            check = doctor.folder("cache", path, "--data.cache_dir")
            assert check.status == "problem"
            assert "Permission denied" in check.detail
            assert "--data.cache_dir" in check.fix
    finally:
        closed.chmod(0o700)
    assert list(closed.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "function", "what"),
    [(os, "fsync", "fsync"), (fcntl, "flock", "lock"), (Path, "rename", "rename"), (Path, "write_bytes", "write")],
)
def test_a_file_system_that_lacks_something(
    module: Any, function: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(module, function, fails)
    check = doctor.folder("output", tmp_path / "out", "--output_dir")
    assert check.status == "problem"
    assert f"can't {what}: Function not implemented" in check.detail
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "status"), [(9.9, "warning"), (10.1, "ok")])
def test_little_space(free: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=free * GIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    check = doctor.folder("cache", tmp_path, "--data.cache_dir")
    assert check.status == status
    assert f"{free:.0f} GiB free" in check.detail
    assert ("--data.cache_dir" in check.fix) == (status == "warning")


def test_the_cache_is_where_training_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "own"))
    assert doctor.cache(None)[0].detail.startswith(f"{tmp_path / 'own'}:")
    assert doctor.cache(str(tmp_path / "given"))[0].detail.startswith(f"{tmp_path / 'given'}:")


@pytest.mark.parametrize(
    ("printed", "detail"),
    [("off\n", "offline"), ("True\n", "reachable"), ("False\n", "not reachable"), ("", "not reach")],
)
def test_the_hub_is_no_problem(printed: str, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_python", lambda code, seconds: (printed, ""))
    check = doctor.hub()
    assert (check.status, check.fix) == ("info", "")
    assert check.detail.startswith(detail)


# -- the whole --------------------------------------------------------------------------------------------------------


def test_lines_are_aligned_and_the_exit_code_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [
        Check("python", "ok", "3.12.1"),
        Check("packages", "ok", "torch 2.13.0, " * 20),
        Check("hub", "info", "off"),
    ]
    warning = Check("cpu", "warning", "8 threads on 2 cores", "export OMP_NUM_THREADS=2")
    problem = Check("torchvision", "problem", "does not import", "pip uninstall torchvision")
    monkeypatch.setattr(doctor, "examine", lambda *_: iter([*checks, warning]))
    assert doctor.diagnose("out", None) == 0
    printed = capsys.readouterr().out
    assert "all that is needed works" in printed
    assert "warning  cpu           8 threads on 2 cores\n" + " " * 23 + "fix: export OMP_NUM_THREADS=2\n" in printed
    body = printed.split("\n\n")[0].splitlines()
    assert {line[22] for line in body} == {" "}
    assert all(line[23] != " " for line in body)
    assert max(map(len, body)) <= 110
    monkeypatch.setattr(doctor, "examine", lambda *_: iter([*checks, problem, problem]))
    assert doctor.diagnose("out", None) == 1
    assert "2 problems to fix" in capsys.readouterr().out


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepdistill.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_this_machine(tmp_path: Path) -> None:
    start = time.perf_counter()
    done = run("--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.perf_counter() - start < 60  # 6 s on two free cores
    names = [line[9:22].strip() for line in done.stdout.splitlines() if line[:1].strip() and line[9:10].strip()]
    for name in ("python", "packages", "imports", "torchvision", "cpu", "precision", "distributed", "output", "cache"):
        assert name in names
    assert "hub           offline, as HF_HUB_OFFLINE says" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_broken_machine(site: Path, tmp_path: Path) -> None:
    fake_torchvision(site, BROKEN)
    (tmp_path / "out").write_text("a file")
    done = run("--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"))
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "problem  torchvision" in done.stdout
    assert "pip uninstall torchvision" in done.stdout
    assert "problem  imports" in done.stdout
    assert "problem  output" in done.stdout
    assert "problems to fix" in done.stdout
    assert "hub" in done.stdout  # it went on to the end
