"""Options from a YAML file, and every field of transformers' TrainingArguments as an option."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from valm.cli.options import CommandParser
from valm.errors import ValmError
from valm.store.files import read_yaml
from valm.text import nearest
from valm_kernels.json_files import short


class TrainingOptions:
    """Extra options of a command that trains: `--config FILE`, and every field of TrainingArguments.

    transformers, whose import takes seconds, is imported only if a field of TrainingArguments is given.
    """

    def __init__(self, parser: CommandParser):
        self.parser = parser

    def __call__(self, given: list[str]) -> tuple[list[str], dict[str, Any]]:
        """The parser's own options in `given` and its config file, and `fields`: the fields of TrainingArguments.

        Raises:
            ValmError: an option or a name in the file is unknown, or the file is not YAML.
        """
        only_config = argparse.ArgumentParser(add_help=False)
        only_config.add_argument("--config", type=Path)
        file = only_config.parse_known_args(given)[0].config
        fields: dict[str, Any] = {}
        if file is not None:
            options, fields = self._read(file)
            given = options + given
            vars(self.parser)["error"] = self._fail
        if self.parser.unknown_options(given):
            from transformers import HfArgumentParser, TrainingArguments

            known_fields: Any = TrainingArguments
            parser = HfArgumentParser(known_fields, add_help=False, allow_abbrev=False)
            vars(parser)["error"] = self._fail  # without a usage message of 130 options
            unset = argparse.Namespace(**dict.fromkeys(_fields()))
            found, given = parser.parse_known_args(given, unset)
            fields |= {name: value for name, value in vars(found).items() if value is not None}
            for name in self.parser.unknown_options(given):
                known = [*self.parser.option_names(), *(f"--{field}" for field in _fields())]
                raise ValmError(f"{self.parser.prog} has no option {name}{nearest(name, known)}")
        return given, {"fields": fields}

    def _fail(self, message: str) -> NoReturn:
        raise ValmError(f"{self.parser.prog}: {message}")

    def _read(self, file: Path) -> tuple[list[str], dict[str, Any]]:
        """The file as options, and the fields whose values cannot be options: lists and mappings."""
        content = read_yaml(file, "the config")
        if not isinstance(content, dict):
            raise ValmError(f"the config {file} must be a list of options, each a line NAME: VALUE")
        own = {action.dest: action for action in self.parser._actions if action.dest not in ("help", "config")}
        options: list[str] = []
        fields = {}
        names = set()
        for key, value in content.items():
            name = _as_text(file, key, key).replace("-", "_")
            action = own.get(name)
            if action is None and name not in _fields():
                raise ValmError(f"the config {file} has an unknown field {key!r}{nearest(name, [*own, *_fields()])}")
            if name in names:
                raise ValmError(f"the config {file} has {name!r} twice: remove one")
            names.add(name)
            if value is None:
                continue
            if action is None and isinstance(value, list | dict) and _holds(name, type(value)):
                fields[name] = value
            elif action is None:
                options.append(f"--{name}={_as_text(file, key, value)}")
            elif not action.option_strings:  # the corpus, which may be on the command line too
                convert: Any = action.type
                values = value if isinstance(value, list) else [value]
                self.parser.set_defaults(**{name: [convert(_as_text(file, key, one)) for one in values]})
            elif action.nargs == 0:
                if not isinstance(value, bool):
                    raise ValmError(f"the config {file} has {key}: {short(value)}, expected true or false")
                options += [action.option_strings[-1]] if value else []
            else:
                options.append(f"{action.option_strings[-1]}={_as_text(file, key, value)}")
        return options, fields


def _as_text(file: Path, key: Any, value: Any) -> str:
    """The value of `key` as text for the command line, which cannot contain NUL or half of a character."""
    if not isinstance(value, str | int | float | datetime.date):
        raise ValmError(f"the config {file} has {key}: {short(value)}, expected one value")
    try:
        text = str(value)
        if not re.search("[\0\ud800-\udfff]", text):
            return text
    except ValueError:  # a number of thousands of digits
        pass
    raise ValmError(f"the config {file} contains a value that no option accepts: {short(value)}")


def _holds(field: str, kind: type) -> bool:
    """Whether the value of a field of TrainingArguments may be of `kind`, list or dict."""
    from transformers import TrainingArguments

    hint = get_type_hints(TrainingArguments)[field]
    return any((get_origin(one) or one) is kind for one in (hint, *get_args(hint)))


def _fields() -> list[str]:
    from transformers import TrainingArguments

    return [field.name for field in dataclasses.fields(TrainingArguments)]
