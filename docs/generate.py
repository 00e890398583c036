"""Writes the pages of docs/reference that show the code, from docs/templates: `python -m docs.generate`."""

from __future__ import annotations

import re
from pathlib import Path

from docs.commands import commands
from docs.functions import Functions

DOCS = Path(__file__).parent
TEMPLATES, PAGES = DOCS / "templates", DOCS / "reference"
COMMANDS = "<!-- commands -->"
# `::: NAME` is a function or class with all its public members, `::: NAME: A, B` with these, `::: NAME:` with none.
FUNCTION = re.compile(r"^::: ([\w.]+)(:.*)?$", re.MULTILINE)


def pages() -> dict[Path, str]:
    """The text of each page."""
    functions = Functions(DOCS.parent)

    def section(found: re.Match) -> str:
        path, members = found.groups()
        return functions.section(path, members and re.findall(r"\w+", members)) + "\n"

    texts = {}
    for template in sorted(TEMPLATES.glob("*.md")):
        title, text = template.read_text(encoding="utf-8").split("\n", 1)
        if COMMANDS in text:
            text = text.replace(COMMANDS, commands())
        note = f"<!-- docs/generate.py wrote this page from docs/templates/{template.name} and the code. -->"
        texts[PAGES / template.name] = f"{title}\n\n{note}\n{FUNCTION.sub(section, text)}"
    return texts


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
