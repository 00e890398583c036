"""Every command and Python example of README.md and docs/ is run, or at least understood, and no link leads nowhere."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import report
from valm.cli import build_parser, main

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TUTORIALS = ["attention", "search", "knowledge-base"]


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page: Path) -> list[str]:
    """The `valm` commands of a page, without comments; a line that ends in a backslash goes on in the next."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [line for line in map(str.strip, lines) if line.startswith("valm ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_every_command_is_one(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for config in blocks(page, "yaml"):
        Path("run.yaml").write_text(config, encoding="utf-8")
    parser = build_parser()
    for command in commands(page):
        words = [word for word in shlex.split(command, comments=True)[1:] if word not in ("…", "...")]
        try:
            parser.parse_args(words)
        except SystemExit:
            pytest.fail(f"{page.name}: {command}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_link_leads_nowhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.fixture
def workshop(world, tmp_path, monkeypatch):
    """A folder with what the pages name: PICTURES, CLIP, and later what their commands leave."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PICTURES").symlink_to(world / "pictures")
    (tmp_path / "CLIP").symlink_to(world / "clip")
    (tmp_path / "demo-output").symlink_to(world)
    return tmp_path


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorials_run(name, workshop, capsys):
    page = ROOT / "docs" / "tutorials" / f"{name}.md"
    for command in commands(page):
        assert main(shlex.split(command)[1:]) == 0, f"{command}: {capsys.readouterr().err}"
    code = "\n".join(blocks(page, "python"))
    assert code
    exec(compile(code, str(page), "exec"), {"__name__": name})


def test_the_examples_of_the_readme_run(workshop, capsys):
    examples = blocks(ROOT / "README.md", "python")
    assert examples
    exec(compile("\n".join(examples), "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.startswith("the color of the banana")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_measured_figures_are_those_of_the_results():
    assert report.PAGE.read_text(encoding="utf-8") == report.page(), "run python -m benchmarks.report"
    readme = report.README.read_text(encoding="utf-8")
    assert report.BEGIN in readme and report.readme(readme) == readme, "run python -m benchmarks.report"
