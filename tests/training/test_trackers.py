import io
import json
import logging
import math
from pathlib import Path

import pytest

from stepdistill.errors import InputError
from stepdistill.training import trackers
from stepdistill.training.trackers import MetricsLog, Progress, Trackers, flat_config


def rows(path: Path) -> list[dict]:
    def illegal(name: str):
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=illegal) for line in path.read_text().splitlines()]


# metrics.jsonl


def test_rows_are_legal_json_and_out_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = MetricsLog(path)
    metrics.write({"step": 1, "loss": 0.1 + 0.2, "note": "é\n"})
    assert rows(path) == [{"step": 1, "loss": 0.1 + 0.2, "note": "é\n"}]
    metrics.write({"step": 2, "loss": math.nan, "a": math.inf, "b": -math.inf})
    assert rows(path)[1] == {"step": 2, "loss": None, "a": "inf", "b": "-inf"}


def test_rewind_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsLog(path)
    for step in range(1, 13):
        metrics.write({"step": step, "loss": 1 / step})
    before = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as handle:
        handle.write(b'{"step": 13, "lo')
    MetricsLog(path).rewind(9)  # 9 < 10 as numbers
    assert path.read_bytes() == b"".join(before[:9])
    MetricsLog(path).write({"step": 10, "loss": 0.0})
    assert [row["step"] for row in rows(path)] == list(range(1, 11))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", [b'{"step": 2}', b"2", b"\xff\xfe", b'{"step"'])
def test_any_torn_last_line_goes(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    MetricsLog(path).rewind(5)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_torn_line_does_not_take_the_next_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"ste')
    metrics = MetricsLog(path)
    metrics.write({"step": 2})
    metrics.write({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"ste\n{"step": 2}\n{"step": 3}\n'
    metrics.rewind(2)
    assert rows(path) == [{"step": 1}, {"step": 2}]


def test_a_failed_rewind_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write({"step": 1})
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers.os, "fsync", full)
    with pytest.raises(OSError):
        MetricsLog(path).rewind(0)
    assert path.read_bytes() == before


def test_other_processes_write_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, enabled=False).write({"step": 1})
    assert not path.exists()
    path.write_bytes(b'{"step": 9}\n')
    MetricsLog(path, enabled=False).rewind(1)
    assert path.read_bytes() == b'{"step": 9}\n'
    MetricsLog(tmp_path / "none.jsonl").rewind(3)
    assert not (tmp_path / "none.jsonl").exists()


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_every_ten_seconds_and_at_the_end(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    progress = Progress(100, start=10, label="lcm", stream=out)
    for step in range(11, 101):
        now[0] += 1.0
        progress.update(step, 0.25, 1e-4, 2.0)
    progress.close()
    lines = out.getvalue().splitlines()
    assert [int(line.split("step ")[1].split("/")[0]) for line in lines] == [*range(11, 100, 10), 100]
    assert lines[0] == "lcm step 11/100: loss 0.25, lr 0.0001, 2 s/step, ETA 02:58"
    assert lines[-1].endswith("ETA 00:00") and "\r" not in out.getvalue()


def test_close_prints_what_was_held_back_once():
    out = io.StringIO()
    progress = Progress(10, stream=out)
    for step in (1, 2, 3):
        progress.update(step, 1.0, 0.1, 0.5)
    progress.close()
    progress.close()
    assert [line.split(":")[0] for line in out.getvalue().splitlines()] == ["step 1/10", "step 3/10"]


def test_the_eta_forgets_a_slow_first_step():
    out = io.StringIO()
    progress = Progress(1000, stream=out)
    progress.update(1, 1.0, 0.1, 60.0)
    for step in range(2, 201):
        progress.update(step, 1.0, 0.1, 1.0)
    progress.close()
    assert "1 s/step, ETA 13:2" in out.getvalue().splitlines()[-1]


def test_a_bar_on_a_terminal():
    out = Terminal()
    progress = Progress(10, start=4, label="lcm", stream=out)
    for step in range(5, 11):
        progress.update(step, 0.5, 1e-3, 0.25)
    progress.close()
    text = out.getvalue()
    assert "\r" in text and "4/10" in text and "10/10" in text
    assert "loss 0.5, lr 0.001, 0.25 s/step, ETA 00:00" in text


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_silence_when_disabled(kind):
    out = kind()
    progress = Progress(2, enabled=False, stream=out)
    progress.update(1, 1.0, 0.1, 1.0)
    progress.close()
    assert out.getvalue() == ""


def test_a_closed_pipe_does_not_end_the_run():
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    progress = Progress(2, stream=Broken())
    progress.update(1, 1.0, 0.1, 1.0)
    progress.update(2, 1.0, 0.1, 1.0)
    progress.close()


# Trackers

CONFIG = {"train": {"lr": 1e-4, "seed": None, "betas": [0.9, 0.999], "compile": False}, "out": Path("x"), "n": 3}


def test_a_nested_config_becomes_flat_and_plain():
    assert flat_config(CONFIG) == {
        "train.lr": 1e-4,
        "train.seed": "None",
        "train.betas": "[0.9, 0.999]",
        "train.compile": False,
        "out": "x",
        "n": 3,
    }


@pytest.mark.parametrize("report_to", [None, "", "none"])
def test_no_trackers(tmp_path, report_to):
    tracked = Trackers(report_to, tmp_path, CONFIG)
    tracked.log({"loss": 1.0}, step=1)
    tracked.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("enabled", [True, False])
def test_an_unknown_tracker_is_an_error_on_every_process(tmp_path, enabled):
    with pytest.raises(InputError, match="tensorbord"):
        Trackers("tensorbord", tmp_path, enabled=enabled)


def test_a_tracker_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(InputError, match="pip install tensorboard"):
        Trackers("tensorboard", tmp_path)


def scalars(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


def test_tensorboard_end_to_end_and_resumed(tmp_path, caplog):
    tracked = Trackers("tensorboard, tensorboard", tmp_path, CONFIG)
    for step in (1, 2, 3, 4):
        tracked.log({"loss": float(step), "note": "text", "bad": math.nan}, step=step)
    tracked.close()
    tracked.close()
    assert scalars(tmp_path / "logs") == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    resumed = Trackers("tensorboard", tmp_path, CONFIG, start=2)
    resumed.log({"loss": 30.0}, step=3)
    resumed.close()
    assert scalars(tmp_path / "logs") == {1: 1.0, 2: 2.0, 3: 30.0}
    assert not [record for record in caplog.records if record.name.startswith("stepdistill")]


def fake(monkeypatch, fails: str) -> list[str]:
    calls: list[str] = []

    def method(name):
        def call(self, *args, **kwargs):
            calls.append(name)
            if name == fails:
                raise RuntimeError("the service is down")

        return call

    names = ("__init__", "start", "store_init_configuration", "log", "finish")
    kind = type("Fake", (), {"requires_logging_directory": False} | {name: method(name) for name in names})
    monkeypatch.setitem(__import__("accelerate").tracking.LOGGER_TYPE_TO_CLASS, "fake", kind)
    return calls


@pytest.mark.parametrize("fails", ["__init__", "start", "store_init_configuration", "log", "finish"])
def test_a_failing_tracker_warns_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog, fails):
    calls = fake(monkeypatch, fails)
    with caplog.at_level(logging.WARNING):
        tracked = Trackers("fake", tmp_path, CONFIG)
        for step in range(3):
            tracked.log({"loss": 1.0}, step=step)
        tracked.close()
    assert len(caplog.records) == 1 and "the service is down" in caplog.text
    assert calls.count("log") == (0 if fails in ("__init__", "start") else 3)


def test_other_processes_start_no_tracker(tmp_path, monkeypatch):
    calls = fake(monkeypatch, "none")
    tracked = Trackers("fake", tmp_path, CONFIG, enabled=False)
    tracked.log({"loss": 1.0}, step=1)
    tracked.close()
    assert calls == []


def test_a_full_disk_is_an_input_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"write .*file/metrics.jsonl, got.*resume from the latest checkpoint"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl").write({"step": 1})
