"""The commands of `valm` as Markdown, from their parsers."""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Iterable, Iterator

from valm.cli import build_parser
from valm.cli.options import CommandParser


def commands() -> str:
    """A list of the commands, the options that all of them have, and a section for each command."""
    parser = build_parser()
    every = list(every_command(parser))
    listed = [f"| [`{found.prog}`](#{_anchor(found)}) | {_sentence(help)} |" for found, help in every]
    own = [action for action in parser._actions if action.option_strings]
    parts = [_table("Command", listed), "## Options of every command", _table("Option", _rows(parser, own))]
    return "\n\n".join([*parts, *(_section(found) for found, _ in every)])


def every_command(parser: CommandParser) -> Iterator[tuple[CommandParser, str]]:
    """Each command below `parser`, with its help in the list of commands."""
    assert parser.commands is not None
    for choice in parser.commands._choices_actions:
        command = parser.commands.choices[choice.dest]
        if command.commands is None:
            yield command, choice.help or ""
        else:
            yield from every_command(command)


def _anchor(command: CommandParser) -> str:
    return command.prog.replace(" ", "-")


def _section(command: CommandParser) -> str:
    about, options = (
        _sentence(command.description or ""),
        _table("Argument or option", _rows(command, command._actions)),
    )
    return f"## {command.prog}\n\n{about}\n\n```\n{command.example}\n```\n\n{options}"


def _table(first: str, rows: Iterable[str]) -> str:
    return "\n".join([f"| {first} | What it does |", "| --- | --- |", *rows])


def _rows(parser: CommandParser, actions: Iterable[argparse.Action]) -> Iterator[str]:
    formatter = parser._get_formatter()
    for action in actions:
        if action.dest == "help":
            continue
        required = " (required)" if action.option_strings and action.required else ""
        yield f"| {_names(action)} | {_markdown(formatter._expand_help(action))}{required} |"


def _names(action: argparse.Action) -> str:
    """An argument as `NAME`, an option as `--name` VALUE with all its names."""
    value = action.metavar or " or ".join(map(str, action.choices or [])) or action.dest.upper()
    if not action.option_strings:
        return f"`{value}`"
    more = "" if action.nargs == 0 else f" {_plain(value)}"
    return ", ".join(f"`{name}`{more}" for name in action.option_strings)


def _plain(text: str) -> str:
    return re.sub(r"([*_|\[\]])", r"\\\1", html.escape(text, quote=False))


def _sentence(text: str) -> str:
    return _markdown(text[:1].upper() + text[1:]) + ("" if text.endswith(".") else ".")


def _markdown(text: str) -> str:
    """Help, in which only what stands in backticks is code, in a cell of a table."""
    parts = re.split("(`[^`]*`)", text)  # every second one is code
    parts[::2] = map(_plain, parts[::2])
    return "".join(parts)
