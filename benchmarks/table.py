"""Writes the README's tables from benchmarks/results, so that no figure there was typed.

python benchmarks/table.py                               # from the results files that are there
python benchmarks/table.py --take out/demo/results.json  # keep a run's results as the demo's first
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from stepdistill.bench.rows import Results
from stepdistill.bench.table import aligned, markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo_lcm_lora.json"
STEP_COST = RESULTS.with_name("step_cost.json")
BEGIN, END = "<!-- results: written by benchmarks/table.py -->", "<!-- end of results -->"
COST_BEGIN, COST_END = "<!-- step cost: written by benchmarks/table.py -->", "<!-- end of step cost -->"


def section(results: Results) -> str:
    """The table with what is needed to read it: the machine and where the numbers lie."""
    about = results.environment
    machine = ", ".join(f"{name} {about[name]}" for name in ("torch", "diffusers") if name in about)
    where = f"From `{RESULTS.relative_to(ROOT)}` ({machine}; CPU threads: {about.get('threads', '?')})."
    return f"{markdown(results).strip()}\n\n{where}"


def step_cost(results: dict[str, Any]) -> str:
    """The table of what benchmarks/step_cost.py measured, and how to read it."""
    head = ["ours / theirs", "network", "quantity", "ratio", "95 % interval", "ours", "theirs", "pairs"]
    lines = aligned(head, [_cost_cells(row) for row in results["rows"]])
    about, protocol = results["environment"], results["protocol"]
    how = (
        f"LCM-LoRA of rank {protocol['rank']}, batch {protocol['batch']}; tiny, demo and wide are UNets in the demo's "
        "pipeline. Steps of both sides take turns in one process; ratios are medians over pairs. Peak memory is what comes on "
        f"top of imports, in processes of its own. From `{STEP_COST.relative_to(ROOT)}` (torch {about['torch']}, accelerator "
        f"{about['accelerator']}, {about['threads']} CPU thread, seed {protocol['seed']})."
    )
    return "\n".join([*lines, "", how])


def _cost_cells(row: dict[str, Any]) -> list[str]:
    timed = row["quantity"].endswith("time")
    ours, theirs = (f"{v * 1e3:.1f} ms" if timed else f"{v / 2**20:.1f} MiB" for v in row["values"])
    interval = "" if row["interval"] is None else "[{:.3f}, {:.3f}]".format(*row["interval"])
    return [row["what"], row["network"], row["quantity"], f"{row['ratio']:.3f}", interval, ours, theirs, str(row["n"])]


def replaced(text: str, begin: str, end: str, body: str) -> str:
    """`text` with `body` between two markers; without the markers as it was, and a line on stderr that says so."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        print(f"README.md lacks {begin} ... {end}: this part is not written", file=sys.stderr)
        return text
    return f"{before}{begin}\n\n{body}\n\n{end}{after}"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, help="a run's results.json to keep as the demo's results file first")
    take = parser.parse_args(args).take
    if take is not None:
        Results.read(take)  # what can't be read is not kept
        shutil.copyfile(take, RESULTS)
    readme = ROOT / "README.md"
    text = replaced(readme.read_text(encoding="utf-8"), BEGIN, END, section(Results.read(RESULTS)))
    text = replaced(text, COST_BEGIN, COST_END, step_cost(json.loads(STEP_COST.read_text(encoding="utf-8"))))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
