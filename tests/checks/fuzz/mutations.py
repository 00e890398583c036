"""Damages files: their bytes, their JSON, or the object at their name; and checks how a reader reacts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from tests.checks.counts import COUNTS
from valm.errors import ValmError, sentence

SEED = int(os.environ.get("VALM_FUZZ_SEED", "0"))
REFUSED = "refused"
# valm's own errors.
OURS = (ValmError, OSError)

# Files that PyTorch writes.
PICKLES = (".pt", ".pth", ".bin")
ODD_VALUES = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1.5, float("nan"), "", "x", "../x", "/etc/passwd", "a\0b", "\ud800",
    "\x1b[2J", "hf-hub:a/b", [], {}, [[]], [{}],
]  # fmt: skip


ODD_YAML = [
    "&a [1]", "*a", "[[" * 1000, "{" * 500, "2026-99-99", "!!python/name:os.system", "0x" + "f" * 9999, "9" * 5000,
    '"a\\0b"', '"\\ud800"', "!!binary x", "!!float x", "!!int x", "!!timestamp x", "? [a]", ".nan", "-.inf", "[]", "{}",
]  # fmt: skip


def fuzzed(examples: int) -> Callable[..., Any]:
    """A test of a number of mutants, equal for a seed."""

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        return seed(SEED)(
            settings(
                max_examples=examples,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(given(st.data())(test))
        )

    return decorate


def result_of(read: Callable[[], Any], errors: tuple[type[Exception], ...] = OURS) -> Any:
    """The result of `read`, or REFUSED. Its error must not quote files outside; an error of OURS must be a sentence."""
    try:
        found = read()
    except errors as error:
        assert not isinstance(error, OURS) or sentence(error)
        assert "not to be read" not in str(error)
        found = REFUSED
    COUNTS["mutants"] += 1
    COUNTS["refused"] += found is REFUSED
    return found


def check_mutants(
    data: st.DataObject,
    files: list[Path],
    outside: Path,
    read: Callable[[], Any],
    expected: Any,
    errors: tuple[type[Exception], ...] = OURS,
) -> None:
    """Damages one of `files`: `read` must raise one of `errors`, or return `expected` (... allows anything)."""
    before, executed = outside.read_bytes(), Path(f"{outside}.executed")
    file = data.draw(st.sampled_from(files))
    with damaged(data.draw, file, outside) as how:
        found = result_of(read, errors)
    note(f"{file.name}: {how}")
    same = found is not REFUSED and expected is not ... and found == expected
    assert found is REFUSED or expected is ... or same, f"{file.name}, {how}: another result, not refused"
    assert outside.read_bytes() == before
    assert not executed.exists(), f"{file.name}, {how}: its code was run"
    COUNTS["as before"] += same


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix != ".tmp")


class Executes:
    """An object that makes the file `path` when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (os.fspath(self.path), "w")


def mutated_bytes(draw: Callable[..., Any], content: bytes) -> bytes:
    """`content` with some bytes changed, cut out, doubled, or cut off."""
    content_now = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content_now)))
        length = draw(st.sampled_from([1, 1, 2, 8, 100]))
        how = draw(st.sampled_from(["change", "remove", "insert", "cut", "zero"]))
        if how == "change":
            content_now[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif how == "zero":
            content_now[place : place + length] = bytes(min(length, len(content_now) - place))
        elif how == "remove":
            del content_now[place : place + length]
        elif how == "insert":
            content_now[place:place] = draw(st.binary(min_size=1, max_size=length))
        else:
            del content_now[place:]
    return bytes(content_now)


def mutated_json(draw: Callable[..., Any], content: bytes) -> bytes:
    """`content` with one of its values removed, doubled, or replaced by an odd value."""
    value = json.loads(content)
    places = list(_places(value))
    if not places:
        return json.dumps(draw(st.sampled_from(ODD_VALUES))).encode()
    holder, key = draw(st.sampled_from(places))
    how = draw(st.sampled_from(["replace", "remove", "nest", "swap"]))
    if how == "remove":
        del holder[key]
    elif how == "nest":
        return json.dumps(value).replace("1", "[" * 100_000, 1).encode()
    elif how == "swap":
        other, other_key = draw(st.sampled_from(places))
        holder[key], other[other_key] = other[other_key], holder[key]
    else:
        holder[key] = draw(st.sampled_from(ODD_VALUES))
    try:
        return json.dumps(value).encode()
    except ValueError:  # swapped with a part of itself
        return b"{}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


@contextmanager
def damaged(draw: Callable[..., Any], file: Path, outside: Path) -> Iterator[str]:
    """Replaces `file` while the block runs, as the name says. `outside` contains the content of a file elsewhere."""
    ways = ["bytes", "bytes", "missing", "empty", "folder", "link out"]
    ways += ["code"] * (file.suffix in PICKLES)
    how = draw(st.sampled_from([*ways, *["json"] * 6] if file.suffix == ".json" else ways))
    content, aside = file.read_bytes(), file.with_name(file.name + ".aside")
    os.rename(file, aside)
    try:
        if how == "folder":
            file.mkdir()
        elif how == "link out":
            file.symlink_to(outside)
        elif how == "code":
            torch.save({"state": Executes(Path(f"{outside}.executed"))}, file)
        elif how != "missing":
            made = {"bytes": mutated_bytes, "json": mutated_json, "empty": lambda *_: b""}[how](draw, content)
            file.write_bytes(made)
        yield how
    finally:
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
        os.rename(aside, file)
