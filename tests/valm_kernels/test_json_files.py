"""JSON out of files is what its schema says, or an error says where it is not."""

import json
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import pytest

from valm_kernels import json_files
from valm_kernels.json_files import Matching, Range, check, own_file, read_json, regular_file


class Entry(TypedDict):
    name: Annotated[str, Matching("[a-z]+", "a word")]
    count: Annotated[int, Range(0, 9)]


class More(Entry, total=False):
    note: str


class Document(TypedDict):
    entries: list[More]
    by_name: dict[str, float]
    kind: Literal["one", "two"]
    source: str | None
    plan: Any


@dataclass
class Settings:
    share: Annotated[float, Range(0, 1)]
    limit: int | None = None


GOOD = {
    "entries": [{"name": "a", "count": 3, "note": "x"}, {"name": "b", "count": 0, "unknown": []}],
    "by_name": {"x": 1.5, "y": 2},
    "kind": "two",
    "source": None,
    "plan": [{}],
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"entries": {}}, "entries is an object of 0, expected a list"),
        ({"entries": [GOOD["entries"][0], 7]}, r"entries\[1\] is 7, expected an object"),
        ({"entries": [{"name": "a"}]}, r"entries\[0\] has no 'count'"),
        ({"entries": [{"name": "../a", "count": 1}]}, r"entries\[0\]\.name is '\.\./a', expected a word"),
        ({"entries": [{"name": "a\n", "count": 1}]}, r"entries\[0\]\.name is 'a\\n', expected a word"),
        ({"entries": [{"name": "a", "count": -1}]}, "count is -1, expected a number from 0 to 9"),
        ({"entries": [{"name": "a", "count": True}]}, "count is True, expected a whole number"),
        ({"entries": [{"name": "a", "count": 1.0}]}, r"count is 1\.0, expected a whole number"),
        ({"entries": [{"name": "a", "count": 10**5000}]}, "count is a number of more than 60 digits"),
        ({"entries": [{"name": "a", "count": 1, "note": None}]}, r"entries\[0\]\.note is None, expected a text"),
        ({"by_name": {"x": "1"}}, r"by_name\.x is '1', expected a number"),
        ({"by_name": {"x": float("nan")}}, r"by_name\.x is nan, expected a number"),
        ({"by_name": {"x": 10**400}}, r"by_name\.x is a number of more than 60 digits, expected a number"),
        ({"kind": "three"}, "kind is 'three', expected 'one' or 'two'"),
        ({"source": 3}, "source is 3, expected a text or null"),
    ],
)
def test_what_differs_is_named_with_its_place(change, message):
    check(GOOD, Document)
    with pytest.raises(ValueError, match=message):
        check(GOOD | change, Document)


def test_a_dataclass_is_a_schema():
    check({"share": 1}, Settings)  # a field with a default may be absent
    check({"share": 1, "limit": 3}, Settings)
    for wrong in ({"share": 1.5}, {"share": float("nan")}, {"limit": 3}, {"share": 1, "limit": "3"}):
        with pytest.raises(ValueError, match=r"share|limit"):
            check(wrong, Settings)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "it is not JSON"),
        (b"\xff\xfe{}", "it is not JSON: 'utf-8' codec"),
        (b"[" * 200_000, "nested too deeply"),
        (b"", "it is not JSON"),
        (b"9" * 5000, "it is not JSON"),
        (b"[]", "it is a list of 0, expected an object"),
    ],
)
def test_files_that_are_no_such_json(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json is damaged.*{message}"):
        read_json(tmp_path / "a.json", dict[str, Any])


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(json_files.MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"has 1,073,741,825 bytes, at most"):
        read_json(tmp_path / "a.json", Any)


def test_pipes_devices_and_links_out_are_refused_before_they_are_opened(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    (tmp_path / "outside").write_text("{}")
    (folder / "file").write_text("{}")
    os.mkfifo(folder / "pipe")
    (folder / "out").symlink_to("../outside")
    (folder / "absolute").symlink_to(tmp_path / "outside")
    (folder / "within").symlink_to("file")
    (folder / "to_pipe").symlink_to("pipe")
    for name in ("pipe", "to_pipe"):
        for read in (regular_file, own_file, lambda path: read_json(path, Any)):
            with pytest.raises(ValueError, match="is a pipe, not a file"):
                read(folder / name)
    with pytest.raises(ValueError, match="null is a device, not a file"):
        read_json(folder / "../../../../../../../../../dev/null", Any)
    with pytest.raises(ValueError, match="is a folder, not a file"):
        own_file(folder)
    for name in ("out", "absolute"):
        with pytest.raises(ValueError, match="is a link that leads out of its folder"):
            own_file(folder / name)
        assert json.loads((folder / name).read_text()) == read_json(folder / name, Any)  # a user's own link
    assert own_file(folder / "within").st_size == own_file(folder / "file").st_size == 2
    (tmp_path / "linked").symlink_to(folder)
    own_file(tmp_path / "linked" / "file")  # the store itself may be behind a link
