"""An extension of griffe, which reads the docstrings for the site: options of dataclasses, and examples."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

import griffe

TITLE = "\nAttributes:\n"


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Names the section Example as griffe knows it: otherwise Markdown reads `>>>` as a quotation."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Gives a field that is an option its default, and its help unless the docstring describes it."""
        own = [name for name, found in cls.attributes.items() if str(found.value).startswith("option(")]
        if not own or cls.docstring is None:
            return
        kind = getattr(importlib.import_module(cls.module.path), cls.name)
        fields = {field.name: field for field in dataclasses.fields(kind) if "help" in field.metadata}
        for name in own:
            default = fields[name].default
            cls.attributes[name].value = None if default is dataclasses.MISSING else repr(default)
        before, _, written = cls.docstring.value.partition(TITLE)
        missing = [
            f"    {name}: {field.metadata['help'].replace('%%', '%')}\n"
            for name, field in fields.items()  # those of a base class too
            if not re.search(rf"^    (\w+, )*{name}\b", written, re.MULTILINE)
        ]
        if missing:
            cls.docstring.value = before + ("" if written else "\n") + TITLE + "".join(missing) + written
