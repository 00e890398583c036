"""An extension of griffe: a field of a dataclass that is an option of a command is shown with its help and default."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import griffe

TITLE = "\nAttributes:\n"


class OptionHelp(griffe.Extension):
    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        names = [name for name, found in cls.attributes.items() if str(found.value).startswith("option(")]
        if not names or cls.docstring is None:
            return
        kind = getattr(importlib.import_module(cls.module.path), cls.name)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        lines = []
        for name in names:
            default, help = fields[name].default, fields[name].metadata["help"].replace("%%", "%")
            cls.attributes[name].value = None if default is dataclasses.MISSING else repr(default)
            lines.append(f"    {name}: {help}\n")
        before, _, others = cls.docstring.value.partition(TITLE)
        cls.docstring.value = before + ("\n" if not others else "") + TITLE + "".join(lines) + others
