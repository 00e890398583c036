"""Options as fields of a dataclass, which states the name, type, default, bounds and help of each option once.

The command line is made from the fields. The dataclass checks values from the command line and from Python.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from valm.errors import ValmError

# Converts the text of an option to the value of a field, by the field's annotation.
PARSED: Mapping[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "str | os.PathLike": Path}
REQUIRED = dataclasses.MISSING
# NumPy's generators reject seeds below 0, and its older generator rejects seeds from here on.
MAX_SEED = 1 << 32


def option(
    help: str,
    default: Any = None,
    *,
    least: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
    short: str | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field that is also an option: --NAME, or --no-NAME if its default is True.

    Args:
        default: REQUIRED if the option must be given.
        least, below: bounds of a number.
        short: another name, such as -k.
        parse: converts text to the value; by default, PARSED does for the annotation. For a Sequence it returns several
            items, and a repeated option collects all of them.
    """
    said = {"help": help, "least": least, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata=said | {"short": short, "metavar": metavar, "parse": parse})


def listed(text: str) -> tuple[str, ...]:
    """The parts of a text between commas: a `parse` of `option`."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def add_fields(parser: argparse.ArgumentParser, kind: Any, without: str | None = None) -> None:
    """Adds an option to `parser` for each field of the dataclass `kind`, except the field `without`."""
    for field in dataclasses.fields(kind):
        said = field.metadata
        if "help" not in said or field.name == without:
            continue
        name = field.name.replace("_", "-")
        shown: dict[str, Any] = {"dest": field.name, "help": said["help"]}
        if field.type == "bool":
            action = "store_false" if field.default else "store_true"
            parser.add_argument(f"--no-{name}" if field.default else f"--{name}", action=action, default=None, **shown)
            continue
        required = field.default is REQUIRED
        if not required and field.default is not None and "(default: " not in said["help"]:
            shown["help"] += f" (default: {field.default})"
        parse = said["parse"] or PARSED[str(field.type).removesuffix(" | None")]
        names = [f"--{name}"] if said["short"] is None else [said["short"], f"--{name}"]
        shown |= {"choices": said["choices"], "metavar": said["metavar"], "required": required}
        action = "extend" if str(field.type).startswith("Sequence") else "store"
        parser.add_argument(*names, type=parse, action=action, **shown)


def given_fields(kind: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of the dataclass `kind` that are set in `arguments`."""
    values = ((field.name, getattr(arguments, field.name, None)) for field in dataclasses.fields(kind))
    return {name: value for name, value in values if value is not None}


def as_options(values: Any) -> list[str]:
    """The options of a command line that give the dataclass `values`; fields with their default value are left out."""
    words: list[str] = []
    for field in dataclasses.fields(values):
        value, name = getattr(values, field.name), field.name.replace("_", "-")
        if "help" not in field.metadata or value is None or value == field.default:
            continue
        if field.type == "bool":
            words.append(f"--no-{name}" if field.default else f"--{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def check_fields(values: Any) -> None:
    """Checks the fields of a dataclass against the bounds and choices of its options. Raises ValmError if a value is
    out of bounds or not among the choices."""
    for field in dataclasses.fields(values):
        value, said = getattr(values, field.name), field.metadata
        if value is None or "help" not in said:
            continue
        name = f"--{field.name.replace('_', '-')}"
        least, below, choices = said["least"], said["below"], said["choices"]
        if choices is not None and value not in choices:
            raise ValmError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        # negated to reject NaN
        if (least is not None and not value >= least) or (below is not None and not value < below):
            bounds = [f"at least {least}"] * (least is not None) + [f"below {below}"] * (below is not None)
            raise ValmError(f"{name} is {value}, expected {' and '.join(bounds)}")
