"""Shared by several commands: declaring a command, and common options."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from valm.clip.execution import CLIP_HELP
from valm.errors import ValmError
from valm.model.opening import Opening
from valm.options import MAX_SEED, add_fields, given_fields
from valm.text import nearest

if TYPE_CHECKING:
    import torch


class CommandParser(argparse.ArgumentParser):
    """A parser that suggests a name for a misspelt command or option. Without a command it prints its help.

    A flag of a parser with commands may also follow the command. A hook, `prepare`, may change the arguments first: it
    returns the arguments to parse, and attributes of the result.

    Attributes:
        example: a command line that shows the command, also at the end of its help.
    """

    prepare: Callable[[list[str]], tuple[list[str], dict[str, Any]]] | None = None
    commands: Commands | None = None
    example: str | None = None
    _given: Sequence[str] = ()

    def add_subparsers(self, **options: Any) -> Any:
        self.commands = super().add_subparsers(**options)
        return self.commands

    def option_names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def unknown_options(self, given: Sequence[str]) -> list[str]:
        """The options in `given`, such as --name, that the parser does not have."""
        before_end = given[: list(given).index("--")] if "--" in given else given
        names = [text.partition("=")[0] for text in before_end if text.startswith("--")]
        known = self.option_names()
        return [name for name in names if " " not in name and name not in known]

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        attributes: dict[str, Any] = {}
        if self.commands is not None:
            given = self._flags_first(given)
            self._check_command(given)
        if self.prepare is not None and not {"-h", "--help"} & {*given}:
            given, attributes = self.prepare(given)
        self._given = given
        result, more = super().parse_known_args(given, namespace)
        for text in more:
            if text.startswith("-"):
                self._fail(text.partition("=")[0])
        for name, value in attributes.items():
            setattr(result, name, value)
        return result, more

    def error(self, message: str) -> NoReturn:
        """Exits with one sentence, which names a misspelt option rather than a missing one."""
        for name in self.unknown_options(self._given):
            if nearest(name, self.option_names()):
                self._fail(name)
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")

    def _flags_first(self, given: list[str]) -> list[str]:
        end = given.index("--") if "--" in given else len(given)
        flags = {name for action in self._actions if action.const is True for name in action.option_strings}
        return sorted(given[:end], key=lambda text: text not in flags) + given[end:]

    def _check_command(self, given: list[str]) -> None:
        if not given:
            self.print_help()
            self.exit()
        known = list(self.commands.choices) if self.commands is not None else []
        name = next((text for text in given if not text.startswith("-")), None)
        if name is not None and name not in known:
            remedy = nearest(name, known) or f": give one of {', '.join(known)}"
            raise ValmError(f"{self.prog} has no command {name}{remedy}")

    def _fail(self, option: str) -> NoReturn:
        raise ValmError(f"{self.prog} has no option {option}{nearest(option, self.option_names())}")


# The first line of an epilog.
EXAMPLE = "example:"

Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"


def program(prog: str, description: str, **options: Any) -> CommandParser:
    """A parser with the flags of every command line."""
    parser = CommandParser(prog=prog, description=description, **options)
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    return parser


def command(
    group: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    help: str,
    example: str | None = None,
    *,
    description: str | None = None,
) -> CommandParser:
    """Declares the command `name` of `group`, which calls `run`.

    Args:
        help: what the command does, in the list of commands.
        example: a command line, at the end of the command's own help.
        description: what the command does, in its own help; by default `help`.
    """
    shown: Any = {"help": help, "description": description or help, "formatter_class": HelpFormatter}
    if example is not None:
        shown["epilog"] = f"{EXAMPLE}\n  {example}"
    parser = group.add_parser(name, allow_abbrev=False, **shown)
    parser.example = example
    parser.set_defaults(run=run)
    return parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of each option that does not name it itself, and does not wrap the example."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLE) else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, got {text}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < MAX_SEED:
        raise argparse.ArgumentTypeError(f"must be from 0 to {MAX_SEED - 1}, got {text}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value


def add_clip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clip", help=CLIP_HELP)


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Declares the options of a command that opens models."""
    add_fields(parser, Opening)


def opening(arguments: argparse.Namespace) -> Opening:
    """The value of the options of `add_opening`."""
    return Opening(**given_fields(Opening, arguments))


def add_device(parser: argparse.ArgumentParser, what: str = "the models run") -> None:
    parser.add_argument(
        "--device", default="auto", help=f"where {what}: cpu, cuda, cuda:1, ...; auto uses a GPU if torch finds one"
    )


def chosen_device(arguments: argparse.Namespace) -> torch.device:
    """The value of the option of `add_device`.

    Raises:
        ValmError: the device does not exist.
    """
    from valm.clip.device import open_device

    return open_device(arguments.device)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def print_json(value: Any) -> None:
    """Prints `value` as JSON, with escapes if standard output is not UTF-8."""
    print(json.dumps(value, ensure_ascii="utf" not in str(sys.stdout.encoding).lower(), indent=2))
