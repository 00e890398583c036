"""Every module that writes files has its row in docs/reliability.md, which says what a reader may rely on."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Calls that write a file, by the last part of their name.
WRITERS = {
    "atomic_folder", "atomic_path", "imwrite", "open_memmap", "output_file", "replaced_files", "save", "save_file",
    "save_pretrained", "savefig", "temporary_file", "temporary_folder", "to_csv", "to_json", "to_parquet", "tofile",
    "write_array", "write_bytes", "write_json", "write_table", "write_text",
}  # fmt: skip
# They hold files for others, and write none of their own.
HELPERS = {"valm/files.py", "valm/whole_folder.py", "valm_kernels/atomic_files.py"}


def writes(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name == "open" and len(call.args) > 1 and isinstance(call.args[1], ast.Constant):
        return bool(set(str(call.args[1].value)) & set("wax+"))
    if name == "save" and "buffer" in ast.unparse(call):  # into memory
        return False
    return name in WRITERS and not (name == "to_json" and not call.args)  # without a path it returns a text


def writers():
    found = set()
    for package in ("valm", "valm_kernels"):
        for file in sorted((ROOT / package).rglob("*.py")):
            calls = (node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call))
            if any(map(writes, calls)):
                found.add(file.relative_to(ROOT).as_posix())
    return found - HELPERS


def test_every_writer_has_a_row():
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    rows = text.partition("| Written by |")[2].partition("\n\n")[0]
    named = {name for row in rows.splitlines()[2:] for name in re.findall(r"`([\w/]+\.py)`", row.split("|")[1])}
    assert len(named) >= 20
    assert writers() == named
