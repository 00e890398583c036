import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from valm.errors import ValmError
from valm.store.files import (
    Count,
    output_file,
    read_json,
    read_text,
    read_yaml,
    short_names,
    writable_folder,
    write_json,
)


class Entry(TypedDict):
    name: Annotated[str, Field(pattern="^[a-z]+$")]
    count: Count


class Document(TypedDict):
    entries: list[Entry]
    kind: Literal["one", "two"]
    share: NotRequired[Annotated[float, Field(ge=0, le=1)]]


GOOD = {"entries": [{"name": "a", "count": 3, "unknown": []}], "kind": "two", "more": 1.0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"entries": {}}, r"entries: .*valid (list|array), got an object of 0"),
        ({"entries": [{"name": "a"}]}, r"entries\[0\]\.count: Field required"),
        ({"entries": [{"name": "a", "count": "1"}]}, r"entries\[0\]\.count: .*valid integer, got '1'"),
        ({"entries": [{"name": "a", "count": -1}]}, r"entries\[0\]\.count: .*got -1"),
        ({"entries": [{"name": "a", "count": 10**400}]}, r"entries\[0\]\.count: .*got a number of more than 60"),
        ({"share": float("nan")}, r"share: .*got nan"),
    ],
)
def test_what_differs_from_a_schema_is_named(tmp_path, change, message):
    file = tmp_path / "a.json"
    write_json(file, GOOD)
    assert read_json(file, "the notes", Document) == GOOD, "keys that the schema does not have stay"
    write_json(file, GOOD | change)
    with pytest.raises(ValmError, match=rf"^the notes .*a\.json is damaged: {message}.*; make it again$"):
        read_json(file, "the notes", Document)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[" * 200_000])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValmError, match=r"^the notes .*a\.json is damaged: Invalid JSON: .*; make it again$"):
        read_json(tmp_path / "a.json", "the notes", Any)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json", "the notes", Any)


def test_yaml(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: &x [1]\nb: *x\n")
    assert read_yaml(file, "the config") == {"a": [1], "b": [1]}
    for content, reason in (("a: [", ""), ("a: 2026-99-99", ""), ("a: 1\nb: {c: 1, c: 2}\n", "it contains 'c' twice")):
        file.write_text(content)
        with pytest.raises(ValmError, match=rf"the config .*a\.yaml cannot be read: {reason}"):
            read_yaml(file, "the config")


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo")
    assert read_text(tmp_path / "a.txt") == "one\ntwo"  # without its byte order mark
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValmError, match=r"a\.txt is not UTF-8 text: invalid start byte at byte 0"):
        read_text(tmp_path / "a.txt")


def test_writable_folder(tmp_path):
    assert writable_folder(tmp_path / "x" / "y").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        writable_folder(tmp_path / "file" / "under")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(PermissionError, match="locked"):
            writable_folder(tmp_path / "locked")


def write_output(path: Path, text: str) -> None:
    with output_file(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("exists", [False, True])
def test_an_output_goes_to_what_a_link_leads_to(tmp_path, exists):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "page.html", tmp_path / "page.html"
    link.symlink_to(Path("there") / "page.html")
    if exists:
        target.write_text("old")
    write_output(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    with pytest.raises(RuntimeError), output_file(link) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "new" and os.listdir(target.parent) == ["page.html"]


def test_an_output_replaces_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PermissionError, match=r"not a regular file: .*pipe"):
        write_output(tmp_path / "pipe", "new")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_short_names_tell_paths_apart():
    assert short_names(["a/x", "b/x/", Path("c/y"), "b/x/z"]) == ["a/x", "b/x", "y", "z"]
    assert short_names(["a/x/m", "b/x/m"]) == ["a/x/m", "b/x/m"]
    assert short_names(["a/x", "a/x/"]) == ["a/x", "a/x/"]  # the same path
