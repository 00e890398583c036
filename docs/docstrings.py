"""An extension of griffe, which reads the docstrings for the site: options of dataclasses, and examples."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import griffe

TITLE = "\nAttributes:\n"


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Names the section Example as griffe knows it: otherwise Markdown reads `>>>` as a quotation."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Gives a field that is an option its help and its default."""
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
