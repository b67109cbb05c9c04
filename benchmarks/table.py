"""Writes the README's results table from benchmarks/results, so that no figure there was typed.

python benchmarks/table.py                               # from the results file that is there
python benchmarks/table.py --take out/demo/results.json  # keep a run's results as that file first
"""

import argparse
import shutil
from pathlib import Path

from stepdistill.bench.table import Results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo_lcm_lora.json"
BEGIN, END = "<!-- results: written by benchmarks/table.py -->", "<!-- end of results -->"


def section(results: Results) -> str:
    """The table with what is needed to read it: the machine and where the numbers lie."""
    about = results.environment
    machine = ", ".join(f"{name} {about[name]}" for name in ("torch", "diffusers") if name in about)
    where = (
        f"From `{RESULTS.relative_to(ROOT)}` ({machine}; {about.get('threads', '?')} CPU threads, one training seed)."
    )
    return f"{results.markdown().strip()}\n\n{where}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, help="a run's results.json to keep as the results file first")
    args = parser.parse_args()
    if args.take is not None:
        Results.read(args.take)  # what can't be read is not kept
        shutil.copyfile(args.take, RESULTS)
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = section(Results.read(RESULTS))
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
