"""Functions and classes as Markdown: the signature and the docstring of each, as griffe reads them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import griffe

WIDTH = 80  # of a signature in one line


class Functions:
    """The functions and classes of the packages in the folder `root`."""

    def __init__(self, root: Path):
        options: Any = {
            "returns_multiple_items": False,
            "returns_named_value": False,
            # one entry may describe several parameters: "k, v: (B, Hkv, Tk, D)"
            "warn_unknown_params": False,
            "warn_missing_types": False,
        }
        loader = griffe.GriffeLoader(
            search_paths=[root], docstring_parser=griffe.Parser.google, docstring_options=options
        )
        self._package = functools.cache(loader.load)  # each call of `load` reads the whole package

    def section(self, path: str, members: Iterable[str] | None = None) -> str:
        """An object and its members, by default the public members that have a docstring."""
        found = self._object(path)
        parts = [_entry(found, f"### `{path}`")]
        if found.is_class:
            name = path.rpartition(".")[2]
            parts += [_entry(member, f"#### `{name}.{member.name}`") for member in _members(found, members)]
        return "\n\n".join(parts)

    def _object(self, path: str) -> Any:
        package, *names = path.split(".")
        found: Any = self._package(package)
        for name in names:
            found = found[name]
            found = found.final_target if found.is_alias else found
        return found


def _members(of: Any, names: Iterable[str] | None) -> list[Any]:
    if names is not None:
        return [of.all_members[name] for name in names]
    return [member for name, member in of.members.items() if not name.startswith("_") and member.docstring]


def _entry(found: Any, heading: str) -> str:
    signature = [] if found.is_attribute else [f"```python\n{_signature(found)}\n```"]
    return "\n\n".join([heading, *signature, *_docstring(found)])


def _signature(found: Any) -> str:
    arguments = list(_arguments(found))
    returned = f" -> {found.returns}" if found.is_function and found.returns is not None else ""
    line = f"{found.name}({', '.join(arguments)}){returned}"
    if len(line) <= WIDTH:
        return line
    return f"{found.name}(\n{textwrap.indent(''.join(f'{one},{chr(10)}' for one in arguments), '    ')}){returned}"


def _arguments(found: Any) -> Iterator[str]:
    """The parameters of a function or a constructor, as in its definition; an option of a plan with its default."""
    kinds, options = griffe.ParameterKind, _options(found)
    starred = False
    for one in found.parameters:
        if one.name in ("self", "cls"):
            continue
        if one.kind is kinds.keyword_only and not starred:
            yield "*"
        starred = starred or one.kind in (kinds.keyword_only, kinds.var_positional)
        stars = {kinds.var_positional: "*", kinds.var_keyword: "**"}.get(one.kind, "")
        annotation = "" if one.annotation is None else f": {one.annotation}"
        default = one.default
        if one.name in options:
            default = options[one.name].default
            default = None if default is dataclasses.MISSING else repr(default)
        equals = " = " if annotation else "="
        yield stars + one.name + annotation + ("" if stars or default is None else f"{equals}{default}")


def _options(found: Any) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass that are options of a command, including the fields of its base classes."""
    if not found.is_class or not any(str(one.value).startswith("option(") for one in found.attributes.values()):
        return {}
    kind = getattr(importlib.import_module(found.module.path), found.name)
    return {field.name: field for field in dataclasses.fields(kind) if "help" in field.metadata}


def _docstring(found: Any) -> Iterator[str]:
    """The paragraphs of a docstring, and its sections as lists."""
    helps = {name: field.metadata["help"].replace("%%", "%") for name, field in _options(found).items()}
    if found.docstring is not None:
        found.docstring.value = found.docstring.value.replace("\nExample:\n", "\nExamples:\n")  # griffe's name of it
        for section in found.docstring.parsed:
            kind, value = section.kind.value, section.value
            if kind == "text":
                yield value
            elif kind == "examples":
                yield "**Example**"
                yield from (text if part.value == "text" else f"```pycon\n{text}\n```" for part, text in value)
            elif kind in ("returns", "raises"):
                yield f"**{kind.capitalize()}**"
                yield "\n".join(
                    _item("" if kind == "returns" else str(one.annotation), one.description) for one in value
                )
            elif kind in ("parameters", "attributes"):
                yield f"**{kind.capitalize()}**"
                yield "\n".join(_item(one.name, one.description) for one in value)
                for one in value:
                    for name in one.name.split(", "):
                        helps.pop(name, None)
            else:
                raise ValueError(f"{found.path}: the pages show no section of the kind {kind!r}")
    if helps:
        yield "**Options**"
        yield "\n".join(_item(name, help) for name, help in helps.items())


def _item(name: str, description: str) -> str:
    """An item of a list. Its other lines are indented, so that they belong to it."""
    lines = textwrap.indent(description, "  ").strip()
    return f"- {lines}" if not name else f"- `{name}`: {lines}"
