import pytest

from valm.errors import ValmError
from valm.evaluation.files import read_csv, read_json_lines, read_lines, read_rows


def test_lines_columns_and_objects(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"a,b\r\n x ,\r\n\r\ny,z\r\n")
    assert read_lines(path) == ["a,b", " x ,", "y,z"]
    assert read_csv(path, ["a", "b"]) == [{"a": "x", "b": ""}, {"a": "y", "b": "z"}]
    path.write_bytes(b"\xef\xbb\xbfa,b\r\nx,y\r\n")
    assert read_csv(path, ["a", "b"]) == [{"a": "x", "b": "y"}]
    path.write_text('a,b\n"two\n\nlines",1\n')
    assert read_csv(path, ["a", "b"]) == [{"a": "two\n\nlines", "b": "1"}]
    assert read_rows(path)[1] == ["two\n\nlines", "1"]
    path.write_text('{"text": "a\u2028b\x85c"}\n')
    assert read_json_lines(path, {"text"}) == [{"text": "a\u2028b\x85c"}]
    path.write_text('{"text": "one", "more": 1}\n{"text": "two"}\n')
    assert [row["text"] for row in read_json_lines(path, {"text"})] == ["one", "two"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a,c\n1,2\n", r"has the columns \['a', 'c'\], expected \['a', 'b'\]"),
        (b"a,b\n1,2\n3\n", "row 3: expected 2 values"),
        (b"a,b\n1,2,3\n", "row 2: expected 2 values"),
        (b"a,b\n\xff,2\n", "is not UTF-8 text"),
        ("a,b\n1,2\n".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_a_wrong_csv_is_named(tmp_path, content, message):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValmError, match=message):
        read_csv(tmp_path / "data", ["a", "b"])


@pytest.mark.parametrize(
    "line, message", [("{", "line 2: not JSON"), ('{"text": 1}', "line 2: expected an object"), ("[]", "line 2")]
)
def test_wrong_json_lines_are_named(tmp_path, line, message):
    (tmp_path / "data").write_text('{"text": "one"}\n' + line)
    with pytest.raises(ValmError, match=message):
        read_json_lines(tmp_path / "data", {"text"})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_lines(tmp_path / "nothing")
