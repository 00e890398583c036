"""Random mutants of the code, and for each a test that kills it.

    python -m tests.checks.mutants draw --seed 1    # writes tests/checks/mutants.json, without the tests
    python -m tests.checks.mutants run              # plants each mutant and looks for a test that fails; resumes
    python -m tests.checks.mutants check --only valm/model  # plants killed mutants again; fails if one lives now

A mutant is one changed line. Its tests come from the file that mirrors the source, then from that folder, then from
files that name the module; slow tests are left out. `killed_by` is the first test that fails, "the compiler", the
status of a process that died, or null. A line that has moved is searched in the rest of its package. A line that is
nowhere, or in several places, is gone. The run changes the checkout, so use a separate one.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_suffix(".json")
COUNT = 200
SOURCES = ("valm", "valm_kernels", "studies", "csrc")
SECONDS = 600  # for the tests of one step; longer counts as a hang
NAMING = 6  # files that name the module, at most

SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "in": "not in", "not in": "in", "is": "is not",
    "is not": "is", "+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "+", "and": "or", "or": "and",
}  # fmt: skip
CPP = re.compile(r" (<|<=|>|>=|==|!=|\+|-|\*|/|&&|\|\||\+=|-=) ")
CPP_SWAPS = SWAPS | {"&&": "||", "||": "&&", "+=": "-=", "-=": "+="}


def python_sites(file: Path) -> Iterator[tuple[int, str]]:
    """Pairs (number of a line, what the line becomes)."""
    text = file.read_text(encoding="utf-8")
    lines = [line.encode() for line in text.splitlines()]

    def change(line: int, start: int, end: int, new: str) -> tuple[int, str]:
        raw = lines[line - 1]
        return line, (raw[:start] + new.encode() + raw[end:]).decode()

    def between(left: ast.expr, right: ast.expr) -> Iterator[tuple[int, str]]:
        if left.end_lineno == right.lineno:
            raw = lines[right.lineno - 1][left.end_col_offset : right.col_offset].decode()
            operator = raw.strip("() ")
            if operator in SWAPS:
                yield change(
                    right.lineno, left.end_col_offset, right.col_offset, raw.replace(operator, SWAPS[operator])
                )

    def visit(node: ast.AST) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from between(node.left, node.comparators[0])
        elif isinstance(node, ast.BinOp):
            yield from between(node.left, node.right)
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield change(node.lineno, node.col_offset, node.operand.col_offset, "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int) and node.lineno == node.end_lineno:
            new = not node.value if isinstance(node.value, bool) else node.value + 1
            yield change(node.lineno, node.col_offset, node.end_col_offset, repr(new))
        elif isinstance(node, ast.If | ast.While | ast.IfExp) and node.test.lineno == node.test.end_lineno:
            start, end = node.test.col_offset, node.test.end_col_offset
            test = lines[node.test.lineno - 1][start:end].decode()
            yield change(node.test.lineno, start, end, f"(not ({test}))")
        elif isinstance(node, ast.Return) and node.value is not None and node.lineno == node.end_lineno:
            yield change(node.lineno, node.col_offset, node.end_col_offset, "return None")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node.lineno == node.end_lineno:
            yield change(node.lineno, node.col_offset, node.end_col_offset, "pass")
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns") or isinstance(node, ast.JoinedStr):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child)

    yield from visit(ast.parse(text))


def cpp_sites(file: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        code = line.partition("//")[0]
        if not code.lstrip().startswith(("#", "template", "*", "/*")):
            for found in CPP.finditer(code):
                yield number, line[: found.start(1)] + CPP_SWAPS[found[1]] + line[found.end(1) :]


def draw(seed: int) -> list[dict[str, Any]]:
    """COUNT random lines, each with one random change."""
    sites: dict[tuple[str, int], list[str]] = {}
    for source in SOURCES:
        for file in sorted((ROOT / source).rglob("*")):
            find = {".py": python_sites, ".cpp": cpp_sites, ".hpp": cpp_sites, ".cuh": cpp_sites}.get(file.suffix)
            for number, line in find(file) if find else ():
                sites.setdefault((str(file.relative_to(ROOT)), number), []).append(line)
    random_ = random.Random(seed)
    mutants = []
    for file, number in sorted(random_.sample(sorted(sites), COUNT)):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        line = lines[number - 1]
        mutants.append(
            {
                "file": file,
                "line": line,
                "occurrence": lines[: number - 1].count(line),
                "becomes": random_.choice(sites[file, number]),
            }
        )
    return mutants


def place(mutant: dict[str, Any]) -> tuple[Path, int] | None:
    """The mutant's file and the number of its line, from 1: the recorded place, or the only place in the package with
    this line now. None if there is none."""
    own = ROOT / mutant["file"]
    found = numbers(own, mutant["line"])
    if mutant["occurrence"] < len(found):
        return own, found[mutant["occurrence"]]
    package = ROOT / Path(mutant["file"]).parts[0]
    places = [
        (file, number) for file in sorted(package.rglob(f"*{own.suffix}")) for number in numbers(file, mutant["line"])
    ]
    return places[0] if len(places) == 1 else None


def numbers(file: Path, line: str) -> list[int]:
    """The numbers of the lines of `file` that are `line`."""
    if not file.exists():
        return []
    return [number for number, other in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if other == line]


def plant(path: Path, number: int, line: str) -> str:
    """Changes a line of the file, and returns what the file was."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    lines[number - 1] = line + "\n"
    path.write_text("".join(lines), encoding="utf-8")
    return text


def steps(file: str) -> Iterator[list[str]]:
    """Test files for a source file, nearest first."""
    path = Path(file)
    if path.parts[0] == "csrc":
        near = {
            "topk": ["tests/valm_kernels/topk/test_cpu.py"],
            "image_attn": ["tests/valm_kernels/visual_fusion/test_cpu.py"],
        }
        if "cuda" in path.parts:
            yield ["tests/csrc/topk/cuda/test_kernels.py"]
            yield ["tests/csrc/topk/cuda"]
            return
        of_text_towers = ["tests/valm_kernels/test_int8_rows.py", "tests/valm_kernels/test_text_blocks.py"]
        yield near.get(path.parts[1], of_text_towers)
        yield ["tests/valm_kernels/topk", "tests/valm_kernels/test_native.py", "tests/csrc/test_sanitizers.py"]
        return
    folder = Path("tests") / path.parent
    done = []
    mirror = folder / f"test_{path.stem}.py"
    if (ROOT / mirror).exists():
        done = [str(mirror)]
        yield done
    rest = [str(f.relative_to(ROOT)) for f in sorted((ROOT / folder).glob("test_*.py"))]
    if folder != Path("tests/valm"):
        yield [f for f in rest if f not in done]
        done += rest
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    names = re.compile(rf"{re.escape(module)}\b")
    users = [f for f in sorted((ROOT / "tests").rglob("test_*.py")) if names.search(f.read_text(encoding="utf-8"))]
    command = ROOT / "tests" / "valm" / "cli" / f"test_{path.stem}.py"
    named = dict.fromkeys(str(f.relative_to(ROOT)) for f in [*([command] if command.exists() else []), *users])
    yield [name for name in named if name not in done][:NAMING]


def failing(tests: list[str], log: Path) -> str | None:
    """The first test that fails, "timeout", or None. The tests run in a fork of this process, which has imported the
    large packages."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        import pytest

        status = pytest.main(
            ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark", *tests]
        )
        sys.stdout.flush()
        os._exit(int(status))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "timeout"
    code = os.waitstatus_to_exitcode(status)
    found = re.search(r"^(?:FAILED|ERROR) (\S+\.py(?:::[^\s\[]+)?)", log.read_text(errors="replace"), re.MULTILINE)
    if found:
        return found[1]
    return None if code in (0, 5) else f"status {code}"


def kill(mutant: dict[str, Any], path: Path, number: int, log: Path) -> str | None:
    """A test that fails with the mutant in this line, or None; tries the recorded test first."""
    file = str(path.relative_to(ROOT))
    candidates = [*recorded(mutant), *steps(file)]
    before = plant(path, number, mutant["becomes"])
    native = file.startswith("csrc") and "cuda" not in file
    try:
        if native and not build():
            return "the compiler"
        for tests in candidates:
            if tests and (found := failing(tests, log)):
                return found
        return None
    finally:
        path.write_text(before, encoding="utf-8")


def recorded(mutant: dict[str, Any]) -> list[list[str]]:
    """The recorded test, if it still exists."""
    file, _, name = (mutant.get("killed_by") or "").partition("::")
    path = ROOT / file
    there = path.suffix == ".py" and path.exists() and f"def {name}(" in path.read_text(encoding="utf-8")
    return [[f"{file}::{name}"]] if there else []


def build() -> bool:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"VALM_KERNELS_CUDA": "off"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode == 0


def import_heavy() -> None:
    import faiss  # noqa: F401
    import hypothesis  # noqa: F401
    import open_clip  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["draw", "run", "check"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[""], help="folders or files whose mutants are planted")
    parser.add_argument("--out", type=Path, default=LIST, help="where `run` writes the list with its tests")
    arguments = parser.parse_args()
    if arguments.what == "draw":
        LIST.write_text(json.dumps(draw(arguments.seed), indent=1) + "\n", encoding="utf-8")
        return
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    import_heavy()
    mutants = json.loads(LIST.read_text(encoding="utf-8"))
    chosen = [mutant for mutant in mutants if mutant["file"].startswith(tuple(arguments.only))]
    log = Path(tempfile.gettempdir()) / f"mutant-{os.getpid()}.log"
    if arguments.what == "run":
        run(mutants, chosen, log, arguments.out)
    living = check(chosen, log) if arguments.what == "check" else []
    if any(mutant["file"].startswith("csrc") for mutant in chosen):
        build()
    if living:
        raise SystemExit("these died, and live now:\n" + "\n".join(living))


def run(mutants: list[dict[str, Any]], chosen: list[dict[str, Any]], log: Path, out: Path) -> None:
    """Records what kills each of `chosen`; skips mutants with a result."""
    for mutant in chosen:
        found = place(mutant)
        if "killed_by" not in mutant and found is not None:
            mutant["killed_by"] = kill(mutant, *found, log)
            print(mutant["file"], mutant["becomes"].strip(), "->", mutant["killed_by"], flush=True)
            out.write_text(json.dumps(mutants, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(bool(mutant.get('killed_by')) for mutant in mutants)} of {len(mutants)} die")


def check(chosen: list[dict[str, Any]], log: Path) -> list[str]:
    """Plants killed mutants again and returns those that live. Prints how many lines are gone, by folder."""
    living = []
    gone: Counter[str] = Counter()
    for mutant in chosen:
        found = place(mutant)
        if found is None:
            gone[str(Path(mutant["file"]).parent)] += 1
        elif mutant.get("killed_by"):
            killed_by = kill(mutant, *found, log)
            name = f"{found[0].relative_to(ROOT)}:{found[1]}: {mutant['becomes'].strip()}"
            print(name, "->", killed_by, flush=True)
            living += [] if killed_by else [name]
    print(f"{gone.total()} of {len(chosen)} lines are gone: {dict(gone)}")
    return living


if __name__ == "__main__":
    main()
