"""The command line: quick help, one-paragraph errors, exit codes."""

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from invented import invented

from stepdistill import cli, doctor
from stepdistill.bench.rows import Value
from stepdistill.config import run as run_recipe
from stepdistill.errors import ExportError, InputError
from stepdistill.export import config, rerun


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stepdistill.cli", *arguments], capture_output=True, text=True, timeout=60
    )


def test_help_is_quick_and_lists_the_commands_that_exist() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help")
        times.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert "export" in done.stdout
    assert "doctor" in done.stdout
    assert "bench" in done.stdout
    assert "cache-logits" in done.stdout
    assert min(times) < 1.0


@pytest.mark.parametrize("arguments", [[], ["export"], ["doctor"], ["bench"], ["cache-logits"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from stepdistill import cli\n"
        f"try: cli.main({[*arguments, '--help']!r})\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'diffusers', 'jsonargparse', 'yaml', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_options_of_export() -> None:
    text = run("export", "--help").stdout
    for option in ("RUN", "--output_dir", "--checkpoint", "--teacher.path", "--student.path"):
        assert option in text
    for option in ("dtype", "verify", "formats", "push_to_hub", "hub_model_id", "hub_private_repo"):
        assert f"--export.{option}" in text
    assert "token" not in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["exprot"],
        ["export"],
        ["export", "x", "--export.verify", "maybe"],
        ["doctor", "out"],
        ["doctor", "--output", "x"],
        ["bench", "--step", "4"],
        ["bench", "--dtype", "int8"],
        ["bench", "--compare", "a.json"],
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: stepdistill" in capsys.readouterr().err


def test_options_go_where_they_belong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def export_run(*arguments: object) -> str:
        calls.append(arguments)
        return "out/x"

    monkeypatch.setattr(rerun, "export_run", export_run)
    monkeypatch.setattr(config, "read_config", lambda run: {})
    cli.main(["export", "out/x"])
    options = ["--output_dir", "b", "--checkpoint", "7", "--teacher.path", "p", "--student.path", "s"]
    cli.main(["export", "a", *options, "--export.dtype", "fp16", "--export.verify", "full"])
    hub = ["--export.push_to_hub", "--export.hub_model_id", "x/y", "--export.hub_private_repo"]
    cli.main(["export", "a", "--export.formats", "diffusers,kohya", *hub])
    assert calls == [
        ("out/x", None, "latest", {}, {}, {}),
        ("a", "b", "7", {"path": "p"}, {"dtype": "fp16", "verify": "full"}, {"path": "s"}),
        (
            "a",
            None,
            "latest",
            {},
            {"formats": "diffusers,kohya", "push_to_hub": True, "hub_model_id": "x/y", "hub_private_repo": True},
            {},
        ),
    ]
    assert "exported to out/x" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(InputError("expected a, got b; fix c"), 2), (ExportError("off by 3"), 1)])
def test_errors_are_one_paragraph(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def export_run(*_: object) -> None:
        raise error

    monkeypatch.setattr(rerun, "export_run", export_run)
    monkeypatch.setattr(config, "read_config", lambda run: {})
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "out/x"])
    assert stop.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_two_results_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worse = invented()
    worse.quality = [
        replace(row, values={**row.values, "fd": Value(10 * row.values["fd"].value)}) for row in worse.quality
    ]
    invented().write(tmp_path / "a.json")
    worse.write(tmp_path / "b.json")
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    cli.main(["bench", "--compare", a, b])
    assert "Frechet distance" in capsys.readouterr().out
    cli.main(["bench", "--compare", a, a, "--fail_if", "fd>+5%", "--fail_if", "recall<-0.1,seconds>+50%"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--compare", a, b, "--fail_if", "recall<-0.1", "--fail_if", "fd>+5%"])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "failed: fd>+5%: Frechet distance of lcm, 4 steps" in error and "recall" not in error
    for words in ([b, str(tmp_path / "none.json")], [a, b, "--fail_if", "fd"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "--compare", *words])
        assert stop.value.code == 2


@pytest.mark.parametrize("code", [0, 1])
def test_doctor_exits_with_what_it_found(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def diagnose(*arguments: object) -> int:
        calls.append(arguments)
        return code

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    for arguments in ([], ["--output_dir", "a", "--cache_dir", "b"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["doctor", *arguments])
        assert stop.value.code == code
    assert calls == [("out", None), ("a", "b")]


@pytest.mark.parametrize(("error", "code"), [(InputError("expected a, got b; fix c"), 2), (ExportError("off by 3"), 1)])
def test_recipes_end_in_one_paragraph_too(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass
    class Recipe:
        """Nothing."""

    def main(parsed: object) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(SystemExit) as stop:
        run_recipe(Recipe, main)
    assert stop.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_missing_run_folder_from_the_shell(tmp_path) -> None:
    done = run("export", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a run folder with config.yaml")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
