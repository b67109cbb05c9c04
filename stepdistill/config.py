"""Recipes' command line: one dataclass a recipe, YAML and dotted flags through jsonargparse, errors in one paragraph."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from .errors import ExportError, InputError

R = TypeVar("R")


class CommaList(tuple[str, ...]):
    """Words given as `a,b,c` on the command line, or as a list in YAML (jsonargparse alone rejects `a,b,c`)."""

    @classmethod
    def parse(cls, value: str | Iterable[Any]) -> CommaList:
        """From "a,b,c" or any iterable; blanks around the commas are dropped."""
        words = value.split(",") if isinstance(value, str) else [str(v) for v in value]
        return cls(w.strip() for w in words if w.strip())

    def ints(self) -> tuple[int, ...]:
        """The words as integers."""
        try:
            return tuple(int(w) for w in self)
        except ValueError as error:
            raise InputError(f"expected integers separated by commas, got {','.join(self)!r}") from error

    def floats(self) -> tuple[float, ...]:
        """The words as finite numbers."""
        try:
            numbers = tuple(float(w) for w in self)
        except ValueError as error:
            raise InputError(f"expected numbers separated by commas, got {','.join(self)!r}") from error
        if not all(math.isfinite(number) for number in numbers):
            raise InputError(f"expected finite numbers separated by commas, got {','.join(self)!r}")
        return numbers


class PromptList(tuple[str, ...]):
    """Prompts given as `one|two`, as a text file with one a line, or as a list in YAML (prompts contain commas)."""

    @classmethod
    def parse(cls, value: str | Iterable[Any]) -> PromptList:
        """From "one|two", the path of a .txt file, or any iterable; blank prompts are dropped."""
        if isinstance(value, str):
            if value.endswith(".txt"):
                if not Path(value).is_file():
                    raise InputError(f"expected a text file of prompts, got {value!r}, which does not exist")
                value = Path(value).read_text().splitlines()
            else:
                value = value.split("|")
        return cls(text for text in (str(v).strip() for v in value) if text)


@dataclass
class Parsed(Generic[R]):
    """A recipe's resolved config and its YAML text, which `--config` takes back verbatim."""

    recipe: R
    yaml: str


def parse(
    recipe_class: type[R],
    args: list[str] | None = None,
    description: str | None = None,
    defaults: str | Path | None = None,
) -> Parsed[R]:
    """The recipe's dataclass from flags and `--config FILE`. Unknown keys and wrong types raise InputError.

    Args:
        args: instead of the command line's.
        description: shown by --help.
        defaults: a YAML file whose values replace the dataclass's own defaults.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
    from jsonargparse.typing import register_type

    for kind, serializer in ((CommaList, ",".join), (PromptList, "|".join)):
        register_type(
            kind,
            serializer=serializer,
            deserializer=kind.parse,
            deserializer_exceptions=(),
            fail_already_registered=False,
        )
    files = [] if defaults is None else [str(defaults)]
    parser = ArgumentParser(
        description=description, exit_on_error=False, allow_abbrev=False, default_config_files=files
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options.")
    parser.add_class_arguments(recipe_class, sub_configs=False)
    try:
        namespace = parser.parse_args(args)
        text = parser.dump(namespace, skip_unset=False)
        values = parser.instantiate(namespace)
    except ArgumentError as error:
        cause = error.__cause__
        if isinstance(cause, InputError):
            raise cause from error
        raise InputError(f"{_one_paragraph(str(error))}; --help lists the options") from error
    options = {key: value for key, value in vars(values).items() if key not in ("config",)}
    return Parsed(recipe_class(**options), text)


def _one_paragraph(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return " ".join(lines)


def run(
    recipe_class: type[R],
    main: Callable[[Parsed[R]], None],
    description: str | None = None,
    demo: str | Path | None = None,
) -> None:
    """A recipe's entry point: parses, runs, and turns what a user can read into one paragraph and an exit code.

    Args:
        demo: defaults that hold while `teacher.path` is "demo", the small teacher that ships.
    """
    try:
        parsed = parse(recipe_class, description=description)
        if demo is not None and "teacher:\n  path: demo\n" in parsed.yaml:
            parsed = parse(recipe_class, description=description, defaults=demo)
        main(parsed)
    except (InputError, ExportError) as error:
        fail(error)


def fail(error: InputError | ExportError) -> NoReturn:
    """Prints the message, wrapped, on stderr and exits: with 2 for bad input, with 1 for an export that is wrong."""
    print(textwrap.fill(f"error: {error}", width=120, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    raise SystemExit(2 if isinstance(error, InputError) else 1) from None


def write_config(parsed: Parsed[Any], folder: str | Path) -> None:
    """Writes the resolved config as `<folder>/config.yaml`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "config.yaml").write_text(parsed.yaml)
