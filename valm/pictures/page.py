"""The frame of reports: pages of one look that need no other file, so that they can be mailed."""

from __future__ import annotations

import os
import platform
import unicodedata
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from valm.explain.page import templates, thumbnail_uri
from valm.store.files import output_file
from valm.store.stages import duration

HERE = Path(__file__).parent


def write_page(path: Path, template: Path, *, filters: dict[str, Any] | None = None, **content: Any) -> None:
    """Writes the page of `template`, which extends frame.html.j2, all or nothing. Everything is escaped.

    filters: further filters of the template.
    """
    environment = templates(template.parent, HERE)
    environment.filters.update(
        filters or {}, percent=lambda share: f"{share:.1%}", duration=duration, uri=thumbnail_uri
    )
    style = Markup((HERE / "report.css").read_text(encoding="utf-8"))
    page = environment.get_template(template.name).render(style=style, **content)
    with output_file(path) as temporary:
        temporary.write_text(page.lstrip(), encoding="utf-8")


def versions(packages: Iterable[str] = ("torch", "transformers")) -> dict[str, str]:
    """Versions that numbers may depend on. The names of drawn objects come from Python's Unicode tables."""
    python = {"python": platform.python_version(), "unicode": unicodedata.unidata_version}
    return python | {package: version(package) for package in packages}


def hardware() -> str:
    """The processor and its number of cores."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"
