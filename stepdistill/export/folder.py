"""A finished export goes into its folder as a whole: after a kill or a full disk the old one is there, or the new one.

The files are several, and no system renames several at once. So what is replaced is set aside first, stepdistill.json before
all else; the new one is put in place last. Whoever finds files set aside and no stepdistill.json puts them back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

FACTS = "stepdistill.json"
RUNGS = "rungs"
TEMP, ASIDE = ".exporting", ".replaced"


def read_facts(folder: Path) -> dict[str, Any]:
    """stepdistill.json of an export; {} where there is none that can be read."""
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def rung_folder(folder: str | Path, steps: int) -> Path:
    """Where the student of so many steps is exported in the run folder of a ladder."""
    return Path(folder) / RUNGS / str(steps)


def rungs_in(folder: Path) -> list[Path]:
    """The rungs that have been exported into a run folder, most steps first."""
    rungs = [path.parent for path in (folder / RUNGS).glob(f"*/{FACTS}") if path.parent.name.isdecimal()]
    return sorted(rungs, key=lambda path: -int(path.name))


def rung_folders(folder: Path) -> list[Path]:
    """The exported rungs of a ladder's run folder, most steps first; [] in other folders."""
    return [] if (folder / FACTS).is_file() else rungs_in(folder)


def same_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the `base_model` of two exports are one, which may have moved: by its weights, else by where it was."""
    weights, others = one.get("hash", {}), other.get("hash", {})
    if known := weights.keys() & others.keys():
        return all(weights[dtype] == others[dtype] for dtype in known)
    return all(one.get(key) == other.get(key) for key in ("name", "path", "revision", "variant"))


def check_one_base(exports: Sequence[Path], flag: str) -> None:
    """InputError for exports of several base models, whose run folder was given with `flag`."""
    bases = [read_facts(export).get("base_model", {}) for export in exports]
    for export, base in zip(exports, bases, strict=True):
        if not same_base(base, bases[0]):
            found = f"{exports[0].name} of {bases[0].get('path')} and {export.name} of {base.get('path')}"
            raise InputError(f"expected the rungs of one teacher in {flag}, got {found}; give one alone, e.g. {export}")


def commit(source: Path, folder: Path) -> None:
    """Moves all that is in `source` to its place in `folder`; OSError where that can't be, and `folder` is as it was.

    Files of the older export that the new one does not have, such as the adapter of a student that is now a full one, go:
    beside the new card they would mislead. All else stays.
    """
    new, aside, placed = [p.name for p in source.iterdir()], folder / ASIDE, []
    gone = {Path(file).parts[0] for file in read_facts(folder).get("files", [])} - {"..", "/"}
    aside.mkdir()
    try:
        for name in _facts_first({*new, *gone}):
            if (folder / name).exists():
                (folder / name).rename(aside / name)
        for name in reversed(_facts_first(new)):
            (source / name).rename(folder / name)
            placed.append(name)
    except OSError:
        for name in placed:
            (folder / name).rename(source / name)
        put_back(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Ends what a kill left half done: the older export comes back, unless the new one is all in place."""
    aside = folder / ASIDE
    if not aside.is_dir():
        return
    if not (folder / FACTS).exists():
        for name in reversed(_facts_first(p.name for p in aside.iterdir())):
            _remove(folder / name)
            (aside / name).rename(folder / name)
    shutil.rmtree(aside)


def _facts_first(names: Iterable[str]) -> list[str]:
    return sorted(set(names), key=lambda name: (name != FACTS, name))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
