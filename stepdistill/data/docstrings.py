"""The English of the Python standard library's own docstrings: a text of some 1.5 MB that every machine has.

Sources are parsed, never imported, so nothing runs; modules come in the order of their names. What the text is depends on the
version of Python alone.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__")
)
SHORTEST = 8  # words; below it a docstring is a label
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(root: str | Path | None = None) -> list[tuple[str, str]]:
    """(module, text) of each different docstring of eight words or more under `root`, in the order of modules and lines.

    Examples of the interactive prompt are taken out, since they are no English.

    Args:
        root: a folder of Python sources; the standard library's by default.
    """
    return list(_standard() if root is None else _found(Path(root)))


@cache  # seconds of parsing, which a recipe with two data sets would pay twice
def _standard() -> list[tuple[str, str]]:
    return _found(Path(sysconfig.get_path("stdlib")))


def _found(folder: Path) -> list[tuple[str, str]]:
    found: dict[str, str] = {}  # text -> the first module that has it
    for file in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).parts):
        parts = file.relative_to(folder).with_suffix("").parts
        if not LEFT_OUT & set(parts[:-1]):
            for text in _texts(file):
                found.setdefault(text, ".".join(parts).removesuffix(".__init__"))
    return [(module, text) for text, module in found.items()]


def _texts(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates, files of other versions
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, DEFINITIONS)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):  # a module has no line
        if (docstring := ast.get_docstring(node, clean=False)) and len(
            (text := english(docstring)).split()
        ) >= SHORTEST:
            yield text


def english(docstring: str) -> str:
    """A docstring without its indentation, examples and trailing blanks."""
    text = inspect.cleandoc(docstring)
    try:
        pieces = doctest.DocTestParser().parse(text)
    except ValueError:  # what looks like an example is none
        pieces = [text]
    kept = "".join(piece for piece in pieces if isinstance(piece, str))
    lines = [line.rstrip() for line in kept.strip().splitlines()]
    return "\n".join(line for i, line in enumerate(lines) if line or (i and lines[i - 1]))  # one blank line at most
