"""The documents' tables come from results files and go between their markers; what ships is what would be written."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from stepdistill.bench.rows import Results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tables"]


@pytest.fixture
def root(table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with the documents, their tables emptied, and the results that ship."""
    monkeypatch.setattr(table, "ROOT", tmp_path)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    for document in {block.document for block in table.BLOCKS}:
        path = tmp_path / document
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = [block for block in table.BLOCKS if block.document == document]
        path.write_text("a\n" + "".join(f"{b.begin}\nOUTDATED\n{b.end}\nafter {b.name}\n" for b in blocks))
    return tmp_path


def test_each_table_goes_between_its_markers(table: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second time changes nothing
        table.main([])
        for block in table.BLOCKS:
            text = (root / block.document).read_text()
            assert text.startswith("a\n") and "OUTDATED" not in text and f"{block.end}\nafter {block.name}\n" in text
            body = text.partition(block.begin)[2].partition(block.end)[0]
            assert body.startswith("\n\n| ") and body.endswith(
                f"\n\nFrom `{block.source}`.\n\n"
            )  # Markdown's blank lines
    assert capsys.readouterr().err == ""


def test_what_ships_is_what_would_be_written(table: ModuleType, root: Path) -> None:
    table.main([])
    for block in table.BLOCKS:
        parts = [
            (top / block.document).read_text().partition(block.begin)[2].partition(block.end)[0] for top in (root, ROOT)
        ]
        assert parts[0] == parts[1], f"{block.name} in {block.document}: run benchmarks/table.py"


def test_ratios_are_spelled_with_their_units(table: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"what": "a / b", "network": "demo", "quantity": "CPU time, N = 3", "ratio": 1.0234, "interval": [1.01, 1.04],
         "values": [0.2, 0.195], "n": 171},
        {"what": "one / two", "network": "demo", "quantity": "weights", "ratio": 0.5, "interval": None,
         "values": [2**20, 2**21], "n": 1},
    ]  # fmt: skip
    facts = {"rank": 4, "batch": 2, "torch": "T", "accelerator": "none", "seed": 7}
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"rows": rows, "protocol": {"threads": 1}, "environment": {"threads": 8, **facts}}))
    text = table.step_cost(path)
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:4])
    assert first[2:] == ["CPU time, N = 3", "1.023", "[1.010, 1.040]", "200.0 ms", "195.0 ms", "171"]
    assert second[2:] == ["weights", "0.500", "", "1.0 MiB", "2.0 MiB", "1"]
    assert "rank 4" in text and "1 CPU thread, seed 7" in text  # the protocol's threads, not the machine's


def test_a_sweep_is_taken_without_the_numbers_of_each_image(table: ModuleType, root: Path) -> None:
    found = Results.read(root / table.SWEEP)
    run = replace(found, samples={"a": {"accuracy": [1.0]}}, notes=["taken"])
    run.write(root / "run.json")
    table.main(["--take", str(root / "run.json")])
    assert Results.read(root / table.SWEEP) == replace(run, samples={})
    assert "- taken\n" in (root / "README.md").read_text()


def test_a_document_without_the_markers_or_a_result_that_is_missing_stays(
    table: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = table.BLOCKS[:2]
    assert first.document == second.document == "README.md"
    (root / "README.md").write_text(f"a\n{first.begin}\nOUTDATED\n")
    table.main([])
    assert (root / "README.md").read_text() == f"a\n{first.begin}\nOUTDATED\n"
    said = capsys.readouterr().err
    assert f"lacks {first.begin}" in said and f"lacks {second.begin}" in said
    (root / second.source).unlink()
    table.main([])
    assert f"{second.source} is not there" in capsys.readouterr().err
