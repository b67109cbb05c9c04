"""What goes wrong in `stepdistill bench` once models are open: one paragraph that names the flag, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweeping import Corners, files_of
from tiny import tiny_images

from stepdistill import cli
from stepdistill.bench import command as module
from stepdistill.bench.real import DataImages
from stepdistill.bench.reference import Reference
from stepdistill.bench.rows import Results
from stepdistill.bench.sweep import Sweep
from stepdistill.errors import InputError

FEW = pytest.mark.filterwarnings("ignore:Frechet distance of")  # far fewer images than a real run has


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a cat", "", "a dog"], "in line 2 of"),
        (["a cat", "word " * 500], "tokens, which is all that"),
        (["a cat"], "expected 2 prompts for --num_images 2, got 1"),
        ([], "got none"),
    ],
)
def test_prompts_that_are_wrong(flags: Any, tmp_path: Path, lines: list[str], message: str, capsys: Any) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as stop:
        cli.main(flags(tmp_path / "out", "--num_images=2", prompts=str(file)))
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_steps_and_guidance_that_are_wrong(flags: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in ((["--steps=64"], "LCMScheduler"), (["--teacher_steps=2000"], "--teacher_steps")):
        with pytest.raises(SystemExit) as stop:
            cli.main(flags(tmp_path / "out", *words))
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out" / "cells").exists()


def test_the_judge_is_for_its_own_size(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        f"--{name}={place / value}"
        for name, value in (("teacher", "sd"), ("prompts", "prompts.txt"), ("data", "photos"))
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *words, f"--output_dir={tmp_path / 'out'}"])
    assert stop.value.code == 2
    assert "expected 64x64 images for --features demo, got 32x32" in " ".join(capsys.readouterr().err.split())


def test_an_error_of_the_sweep_is_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bench(options: Any) -> None:
        raise InputError("expected a, got b; fix c")

    monkeypatch.setattr(module, "bench", bench)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--teacher", "demo"])
    assert stop.value.code == 2 and capsys.readouterr().err == "error: expected a, got b; fix c\n"


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one paragraph of an error, on one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    paragraph = capsys.readouterr().err.rpartition("error: ")[2]
    assert "\n\n" not in paragraph.strip()
    return " ".join(paragraph.split())


def test_prompts_are_read_before_any_model(flags: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "open_contenders", lambda *_: pytest.fail("opened"))
    file = tmp_path / "one.txt"
    file.write_text("a cat\n\na dog")
    assert "a blank one" in said(flags(tmp_path / "out", prompts=str(file)), capsys)
    file.write_text("a cat")
    assert "raise the number of images: more --prompts" in said(flags(tmp_path / "out", prompts=str(file)), capsys)
    words = flags(tmp_path / "out", "--metrics=fd_infinity")
    assert "expected 20 --prompts or more for --metrics fd_infinity, got 12" in said(words, capsys)


def test_real_images_that_are_too_few(flags: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {count: tiny_images(tmp_path / str(count), count=count) for count in (1, 3)}
    found = said(flags(tmp_path / "out", data=str(few[1])), capsys)
    assert "2 real images or more in --data" in found and "got 1" in found
    found = said(flags(tmp_path / "out", "--metrics=coverage", data=str(few[3])), capsys)
    assert "6 real images or more for --metrics coverage, got 3; give more --data" in found


@FEW
def test_nothing_is_measured_for_a_sweep_that_is_refused(
    flags: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.main(flags(tmp_path / "out", "--skip_latency"))
    before = files_of(tmp_path / "out")
    monkeypatch.setattr(Reference, "remembered", lambda *_: pytest.fail("measured"))
    found = said(flags(tmp_path / "out", "--seed=1"), capsys)
    assert "seed differ; give another --output_dir, or --overwrite" in found
    assert files_of(tmp_path / "out") == before


@FEW
def test_cells_are_not_given_up_for_a_sweep_that_cant_be(
    flags: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--overwrite deletes what is there; before it does, all that flags name is there and can be read."""
    cli.main(flags(tmp_path / "out", "--skip_latency"))
    before = files_of(tmp_path / "out")
    other = tmp_path / "other.safetensors"
    Reference.measure(Corners(), DataImages(str(tiny_images(tmp_path / "photos", count=9))), 32).save(other)
    data = other.read_bytes().replace(b"0c", b"1c")  # the hash of what it was made by
    other.write_bytes(data)
    (tmp_path / "empty").mkdir()
    for name, message in ((other.name, "by corners (0c), got those by corners (1c)"), ("empty", "expected images")):
        found = said(flags(tmp_path / "out", "--seed=1", "--overwrite", data=str(tmp_path / name)), capsys)
        assert message in found
        assert files_of(tmp_path / "out") == before


@FEW
def test_real_images_are_measured_while_other_processes_are_at_work(
    flags: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last time that they wait for the main one."""
    order: list[str] = []
    for owner, name in ((Sweep, "claim"), (Reference, "remembered"), (Sweep, "run")):
        original = getattr(owner, name)

        def watched(*args: Any, name: str = name, original: Any = original) -> Any:
            order.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, watched)
    cli.main(flags(tmp_path, "--skip_latency"))
    assert order == ["claim", "remembered", "run"]


@FEW
def test_what_a_student_was_not_made_for_is_said_first(flags: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="lcm, 16 steps, guidance 1: beyond the steps that this student is made for"):
        cli.main([*flags(tmp_path, "--skip_latency"), "--steps=16"])
    notes = Results.read(tmp_path / "results.json").notes
    assert sum("lcm, 16 steps" in note for note in notes) == 1 and not any("lcm, 2" in note for note in notes)


@FEW
def test_a_disk_that_is_full_at_the_end(flags: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "picture_grid", full)
        found = said(flags(tmp_path, "--skip_latency"), capsys)
    assert "No space left on device; make room" in found and "another --output_dir" in found
    cells = files_of(tmp_path / "cells")
    cli.main(flags(tmp_path, "--skip_latency"))
    assert files_of(tmp_path / "cells") == cells and (tmp_path / "grid.png").is_file()


@FEW
def test_images_that_are_gone_can_be_made_again_as_it_is_said(flags: Any, tmp_path: Path, capsys: Any) -> None:
    cli.main(flags(tmp_path, "--skip_latency"))
    before, cell = files_of(tmp_path / "cells"), tmp_path / "cells" / "lcm-2-1"
    (cell / "images" / "3.png").unlink()
    found = said(flags(tmp_path, "--skip_latency"), capsys)
    assert f"delete '{cell}' to make that cell again" in found
    for path in sorted(cell.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    cli.main(flags(tmp_path, "--skip_latency"))
    assert files_of(tmp_path / "cells") == before


def test_statistics_are_made_by_one_process(place: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "open_features", lambda spec, device: Corners())
    words = ["bench", "--data", str(place / "photos"), "--resolution", "32", "--make_reference"]
    (tmp_path / "file").write_text("")
    assert "another --make_reference" in said([*words, str(tmp_path / "file" / "x.safetensors")], capsys)
    assert "nothing at --data" in said([*words, str(tmp_path / "x.safetensors"), "--data", "./none"], capsys)

    class Two:
        num_processes, device = 2, "cpu"

    monkeypatch.setattr(module, "_processes", Two)
    assert "one process for --make_reference, got 2" in said([*words, str(tmp_path / "x.safetensors")], capsys)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_student_of_another_resolution(flags: Any, place: Path, tmp_path: Path, capsys: Any) -> None:
    from tiny import tiny_pipeline

    other = tiny_pipeline(tmp_path / "large", seed=1)
    file = other / "unet" / "config.json"
    file.write_text(file.read_text().replace('"sample_size": 4', '"sample_size": 8'))
    found = said(flags(tmp_path / "out", "--guidance=1", student=str(other)), capsys)
    assert "teacher 4x4x4, large 4x8x8" in found and not (tmp_path / "out").exists()


def test_results_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert "got nothing at" in said(words, capsys) and "a.json" in said(words, capsys)
