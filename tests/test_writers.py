"""Every module that writes files has its row in docs/reference/reliability.md, which says what a reader may rely on."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Calls that write a file, by the last part of their name.
WRITERS = {
    "atomic_folder", "atomic_path", "copy2", "copyfile", "copyfileobj", "copytree", "imwrite", "link", "open_memmap",
    "output_file", "replaced_files", "save", "save_file",
    "save_pretrained", "savefig", "temporary_file", "to_csv", "to_json", "to_parquet", "tofile",
    "write_array", "write_bytes", "write_json", "write_table", "write_text",
}  # fmt: skip
# They hold files for others, and write none of their own.
HELPERS = {"valm/store/files.py", "valm/store/folders.py", "valm_kernels/atomic_files.py"}


def writes(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name == "open":  # open(FILE, MODE), FILE.open(MODE) or mode=MODE
        given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        modes = (str(value.value) for value in given if isinstance(value, ast.Constant))
        return any(re.fullmatch("[rwaxbt+]*[wax+][rwaxbt+]*", mode) for mode in modes)
    if name == "save" and "buffer" in ast.unparse(call):  # into memory
        return False
    if name == "put":  # of Triton's cache; those of queues and Ray write no file
        return any(keyword.arg == "binary" for keyword in call.keywords)
    return name in WRITERS and not (name == "to_json" and not call.args)  # without a path it returns a text


def writers():
    found = set()
    for package in ("valm", "valm_kernels", "studies", "examples", "hub"):
        for file in sorted((ROOT / package).rglob("*.py")):
            calls = (node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call))
            if any(map(writes, calls)):
                found.add(file.relative_to(ROOT).as_posix())
    return found - HELPERS


@pytest.mark.parametrize(
    "code, expected",
    [
        ("open(file, 'wb')", True),
        ("file.open('wb')", True),
        ("open(file, mode='a')", True),
        ("shutil.copyfile(old, new)", True),
        ("folder.put(text, name, binary=False)", True),
        ("open(file)", False),
        ("file.open('rb')", False),
        ("queue.put(row)", False),
    ],
)
def test_writers_are_seen(code, expected):
    assert writes(ast.parse(code, mode="eval").body) == expected


def test_every_writer_has_a_row():
    text = (ROOT / "docs" / "reference" / "reliability.md").read_text("utf-8")
    rows = text.partition("| Written by |")[2].partition("\n\n")[0]
    named = {name for row in rows.splitlines()[2:] for name in re.findall(r"`([\w/]+\.py)`", row.split("|")[1])}
    assert len(named) >= 20
    assert writers() == named
