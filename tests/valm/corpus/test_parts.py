import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from valm.corpus.parts import file_parts, fingerprint, token_parts
from valm.errors import ValmError

LINES = st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=12), max_size=20)


@settings(max_examples=60, deadline=None)
@given(LINES, st.integers(1, 40), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_lines_of_a_text_file(tmp_path_factory, lines, part_bytes, ended, newline):
    """However the file is cut, every line is in one part, in order."""
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_bytes((newline.join(lines) + newline * ended).encode())
    found = [text for part in file_parts([file], part_bytes=part_bytes) for text in part.read()]
    assert found == [line.strip() for line in lines if line.strip()]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=8)), max_size=60), st.integers(1, 40), st.integers(1, 20))
def test_rows_of_a_parquet_file(tmp_path_factory, texts, part_bytes, rows):
    file = tmp_path_factory.mktemp("table") / "corpus.parquet"
    table = pa.table({"number": range(len(texts)), "text": pa.array(texts, pa.string())})
    pq.write_table(table, file, row_group_size=rows)
    found = [text for part in file_parts([file], part_bytes=part_bytes) for text in part.read()]
    assert found == [text for text in texts if text and text.strip()]


def test_a_row_group_larger_than_a_batch(tmp_path, monkeypatch):
    """A part reads up to its end and no further."""
    batches, iterate = [], pq.ParquetFile.iter_batches

    def counted(table, *arguments, **options):
        for batch in iterate(table, *arguments, **options):
            batches.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    monkeypatch.setattr("valm.corpus.parts.READ_ROWS", 7)
    texts = [f"text {row}" for row in range(100)]
    pq.write_table(pa.table({"story": texts}), tmp_path / "a.parquet")
    parts = file_parts([tmp_path / "a.parquet"], column="story", part_bytes=200)
    assert len(parts) > 3
    for part in parts:
        batches.clear()
        assert part.read() == texts[part.start : part.stop]
        assert len(batches) == -(-part.stop // 7)
    assert parts[-1].stop == len(texts)


def test_files_in_their_order(tmp_path):
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    (tmp_path / "a.txt").write_text("three")
    (tmp_path / "empty.txt").write_text("")
    parts = file_parts([tmp_path / "b.txt", tmp_path / "empty.txt", tmp_path / "a.txt"])
    assert [part.read() for part in parts] == [["one", "two"], ["three"]]


def test_token_documents_are_read_as_they_are_asked_for():
    asked = []

    def documents():
        for number in range(10):
            asked.append(number)
            yield [number] * 4

    parts = token_parts(documents(), part_tokens=10)
    assert next(parts).documents == [[0] * 4, [1] * 4, [2] * 4]
    assert asked == [0, 1, 2]
    assert [len(part.documents) for part in parts] == [3, 3, 1]
    with pytest.raises(ValmError, match="has an empty document"):
        list(token_parts([[1], []]))


def test_the_fingerprint_is_of_every_document_and_where_it_ends():
    made = [["ab", "c"], ["a", "bc"], ["abc"], ["ab", "c", ""], [[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]]]
    assert len({fingerprint(documents) for documents in made}) == len(made)
    assert fingerprint([[1, 2]]) == fingerprint([np.array([1, 2])])


def test_wrong_files_are_named(tmp_path):
    (tmp_path / "broken.parquet").write_text("no")
    pq.write_table(pa.table({"number": [1], "caption": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "latin.txt").write_bytes("fine\ncafé\n".encode("latin-1"))
    for name, column, message in (
        ("none.txt", "text", r"there is no corpus file .*none\.txt"),
        ("broken.parquet", "text", r"cannot read the corpus .*broken\.parquet"),
        ("a.parquet", "text", r"a\.parquet has no column 'text'; it has number, caption"),
        ("a.parquet", "number", r"the column 'number' of the corpus .*a\.parquet holds int64, expected text"),
    ):
        with pytest.raises(ValmError, match=message):
            file_parts([tmp_path / name], column=column)
    (part,) = file_parts([tmp_path / "latin.txt"])
    with pytest.raises(ValmError, match=r"latin\.txt is not UTF-8 text: .* at byte 8"):
        part.read()


def test_two_columns_of_one_name_are_refused(tmp_path):
    column = pa.array(["a", "b"])
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValmError, match="has 2 columns 'text'; give each its own name"):
        file_parts([tmp_path / "a.parquet"])


def test_damaged_pages_are_named(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{number} words" for number in range(1000)]}), file)
    content = bytearray(file.read_bytes())
    content[4:600] = bytes(596)
    file.write_bytes(content)
    (part,) = file_parts([file])
    with pytest.raises(ValmError, match=r"cannot read the corpus .*a\.parquet: "):
        part.read()
