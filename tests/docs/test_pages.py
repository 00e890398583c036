"""Where a page stands, and where its links lead; tests/valm/cli/test_documents.py runs its commands."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from docs.commands import every_command
from docs.functions import Functions
from docs.generate import TEMPLATES
from docs.generate import pages as generated
from valm.cli import build_parser
from valm.corpus.plan import RetrievalPlan
from valm.retrieval.index_parameters import IndexPlan
from valm.training.clip_plan import ClipPlan
from valm.training.plan import TrainingPlan

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
pages = functools.cache(generated)  # reads the code once
PAGES = [
    page
    for place in (".", "docs/**", "studies/**", "tests/**")
    for page in sorted(ROOT.glob(f"{place}/*.md"))
    if page.parent != TEMPLATES
]
# The folder of each section of the site: what a reader wants of its pages.
KINDS = {"Tutorials": "tutorials", "How-to guides": "how-to", "Reference": "reference", "Results": "results"}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^]]*)\]\(([^)\s]*)\)")
HERE = re.compile(r"https://github\.com/valm-kernels/valm/(blob|tree)/main/")
SUFFIX = r"\.(md|py|hpp|cpp|cuh?|csv|json|ya?ml|toml|css|txt)"


def links(text: str) -> Iterator[tuple[str, str]]:
    """Text and target of every link, of what is no code."""
    return ((" ".join(link[1].split()), link[2]) for link in LINK.finditer(FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """What a link to a page may have behind its #: its headings as the site and GitHub name them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def file_names(text: str) -> list[str]:
    """The links of a text that a reader sees as the name of a file."""
    return [title for title, _ in links(text) if re.fullmatch(rf"`?[\w./-]+{SUFFIX}`?", title)]


def wrong_links(page: Path, text: str) -> list[str]:
    """The targets in this repository that are no file, or no heading of one."""
    wrong = []
    for _, target in links(text):
        here = HERE.match(target)
        if "://" in target and not here:
            continue
        path, _, anchor = HERE.sub("", target).partition("#")
        file = (ROOT if here else page.parent) / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_leads_nowhere(page):
    assert wrong_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_shows_a_title(page):
    assert file_names(page.read_text(encoding="utf-8")) == []


def test_wrong_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n## It's `here`, 2\n")
    text = "[a](page.md) [b](#its-here-2) [c](page.md#its-here-2) [d](gone.md) [e](#gone) [f](https://x.y/z)\n"
    assert wrong_links(page, text + "```\n[g](code.md)\n```\n") == ["gone.md", "#gone"]
    site = "https://github.com/valm-kernels/valm/blob/main/"
    assert wrong_links(page, f"[a]({site}README.md#valm) [b]({site}gone.py)") == [f"{site}gone.py"]
    named = "[docs/page.md](page.md) [`a.py`](a.py) [a page](page.md) [valm](page.md)"
    assert file_names(named) == ["docs/page.md", "`a.py`"]


def test_every_page_is_of_one_kind():
    """Its folder is the section of the site that lists it."""
    (nav,) = re.findall(r"^nav:\n.*", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    listed = {}
    for entry in yaml.safe_load(nav)["nav"]:
        ((section, pages),) = entry.items()
        if pages != "index.md":
            listed |= {page: KINDS[section] for one in pages for page in one.values()}
    assert {page: page.split("/")[0] for page in listed} == listed
    assert {*listed, "index.md"} == {
        str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.parent != TEMPLATES
    }


def test_the_title_of_a_page_is_that_of_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for title, page in re.findall(r"^ +- (.+): (\S+\.md)$", nav, re.MULTILINE):
        assert (DOCS / page).read_text(encoding="utf-8").startswith(f"# {title}\n"), page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_pages_that_show_the_code_are_of_this_code():
    for page, text in pages().items():
        assert page.read_text(encoding="utf-8") == text, "run python -m docs.generate"


def test_the_page_of_commands_has_every_command_and_option():
    page = pages()[DOCS / "reference" / "cli.md"]
    for command, _ in every_command(build_parser()):
        (section,) = re.findall(rf"^## {command.prog}\n.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert f"```\n{command.example}\n```" in section
        for action in command._actions:
            assert all(f"`{name}`" in section for name in action.option_strings if action.dest != "help")


@pytest.mark.parametrize("plan", [IndexPlan, RetrievalPlan, TrainingPlan, ClipPlan], ids=lambda plan: plan.__name__)
def test_the_page_of_functions_has_every_option_of_a_plan_once(plan):
    page = pages()[DOCS / "reference" / "valm.md"]
    (section,) = re.findall(rf"^### `{plan.__module__}.{plan.__name__}`\n.*?(?=^###)", page, re.MULTILINE | re.DOTALL)
    items = [name for names in re.findall(r"^- `([\w, ]+)`:", section, re.MULTILINE) for name in names.split(", ")]
    assert len(items) == len({*items})
    assert {field.name for field in dataclasses.fields(plan) if "help" in field.metadata} <= {*items}


def test_a_docstring_is_shown_with_its_sections(tmp_path):
    package = tmp_path / "shapes"
    package.mkdir()
    (package / "__init__.py").write_text(CODE)
    functions = Functions(tmp_path)
    assert functions.section("shapes.area") == AREA
    assert re.findall("^#+ .*", functions.section("shapes.Square"), re.MULTILINE) == [
        "### `shapes.Square`",
        "#### `Square.grow`",
    ]
    assert functions.section("shapes.Square", []).startswith("### `shapes.Square`\n\n```python\nSquare(side)\n```")


CODE = '''
def area(a: float, *others: float, b: float = 1.0, **named) -> float:
    """The area.

    Args:
        a: one side,
            in metres.
        b: another.

    Returns:
        The product.

    Raises:
        ValueError: a side is below 0.

    Example:
        >>> area(2)
        2.0
    """


class Square:
    """A square."""

    def __init__(self, side):
        self.side = side

    def grow(self):
        """Grows."""

    def hidden(self):
        pass
'''
AREA = """### `shapes.area`

```python
area(a: float, *others: float, b: float = 1.0, **named) -> float
```

The area.

**Parameters**

- `a`: one side,
  in metres.
- `b`: another.

**Returns**

- The product.

**Raises**

- `ValueError`: a side is below 0.

**Example**

```pycon
>>> area(2)
2.0
```"""
