import csv
import gzip
import json
import os
import pickle
import random
import re
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.valm.knowledge_base.inputs import png
from valm.corpus import texts
from valm.corpus.texts import MAX_DOCUMENT, Caption, fingerprint, read_documents, row_documents
from valm.errors import ValmError

LINES = st.lists(
    st.text(st.characters(exclude_characters="\n\r\0\ufeff", exclude_categories=["Cs"]), max_size=12), max_size=20
)


@settings(max_examples=60, deadline=None)
@given(LINES, st.booleans(), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", ".gz"]))
def test_lines_of_a_text_file(tmp_path_factory, lines, ended, newline, ending):
    file = tmp_path_factory.mktemp("text") / f"corpus.txt{ending}"
    write(file, newline.join(lines) + newline * ended)
    assert list(read_documents([file])) == [line.strip() for line in lines if line.strip()]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=60), st.integers(1, 20))
def test_rows_of_a_parquet_file(tmp_path_factory, texts, rows):
    file = tmp_path_factory.mktemp("table") / "corpus.parquet"
    table = pa.table({"number": range(len(texts)), "text": pa.array(texts, pa.string())})
    pq.write_table(table, file, row_group_size=rows)
    assert list(read_documents([file])) == [text for text in texts if text.strip()]


FIELDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FIELDS, FIELDS), max_size=20), st.sampled_from(["csv", "tsv", "tab"]), st.booleans())
def test_rows_of_a_csv_file(tmp_path_factory, rows, kind, marked):
    """Also those of several lines."""
    file = tmp_path_factory.mktemp("table") / f"corpus.{kind}"
    with open(file, "w", newline="", encoding="utf-8-sig" if marked else "utf-8") as opened:
        writer = csv.writer(opened, delimiter="," if kind == "csv" else "\t", quoting=csv.QUOTE_ALL)
        writer.writerows([("story", "label"), *rows])
    assert list(read_documents([file], column="story")) == [text for text, _ in rows if text.strip()]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_how_much_has_been_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(texts, "READ_ROWS", 50)
    # gzip reads ahead (128 KB in Python 3.12 and newer): random digits, which it cannot make much smaller
    digits = random.Random(0)
    lines = [json.dumps({"text": f"{number} {digits.randbytes(200).hex()}"}) for number in range(4000)]
    for file in (tmp_path / name, tmp_path / f"b{name}"):
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": lines}), file, row_group_size=500)
        elif name.endswith(".csv"):
            write(file, "text,n\n" + "\n".join(f"{number} some more words than one,1" for number in range(len(lines))))
        else:
            write(file, "\n".join(lines))
    documents = read_documents([tmp_path / name, tmp_path / f"b{name}"])
    shares = [documents.share for _ in documents]
    assert shares == sorted(shares) and len(shares) == 2 * len(lines)
    for number in (2000, 4000, 6000):
        assert shares[number] == pytest.approx(number / 8000, abs=0.15)
    assert documents.share == 1


def test_a_wrong_file_is_refused_before_those_ahead_of_it_are_read(tmp_path):
    write(tmp_path / "a.txt", "text")
    for name, content in (("b.csv", "story\none\n"), ("b.jsonl", "{}"), ("b.txt.gz", None)):
        file = tmp_path / name
        file.write_bytes(b"no gzip") if content is None else write(file, content)
        with pytest.raises(ValmError, match=re.escape(name)):
            read_documents([tmp_path / "a.txt", file])


def test_the_fingerprint_is_of_every_document_and_where_it_ends():
    made = [["ab", "c"], ["a", "bc"], ["abc"], ["ab", "c", ""], [[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]]]
    assert len({fingerprint(documents) for documents in made}) == len(made)
    assert fingerprint([[1, 2]]) == fingerprint([np.array([1, 2])])


def test_wrong_files_are_named(tmp_path):
    for name, table in (
        ("a.parquet", pa.table({"number": [1], "label": ["x"]})),
        ("null.parquet", pa.table({"text": ["x", None]})),
        ("late.parquet", pa.table({"text": ["x"] * 5000 + [None]})),
    ):
        pq.write_table(table, tmp_path / name, row_group_size=100)
    for name, column, message in (
        ("a.parquet", "text", r"a\.parquet, row 1: there is no column 'text'"),
        ("a.parquet", "number", r"a\.parquet, row 1: 'number' is 1, expected a text"),
        ("null.parquet", "text", r"null\.parquet, row 2: 'text' is null, expected a text"),
        ("late.parquet", "text", r"late\.parquet, row 5001: 'text' is null, expected a text"),
    ):
        with pytest.raises(ValmError, match=message):
            list(read_documents([tmp_path / name], column=column))
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        read_documents([tmp_path / "none.txt"])
    os.mkfifo(tmp_path / "pipe")  # what is read of it is gone
    with pytest.raises(PermissionError, match="not a regular file"):
        read_documents([tmp_path / "pipe"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "fine\ncafé\n"),
        ("a.csv", "text\ncafé\n"),
        ("a.tsv", "tex\r\ncafé\r\n"),
        ("a.jsonl", '\n{"café'),
        ("a.json", '[{"text":\n"café"}]'),
    ],
)
def test_the_byte_that_is_not_utf8_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValmError, match=rf"{re.escape(name)}, row \d: 'utf-8' codec can't decode byte 0xe9"):
        list(read_documents([tmp_path / name], column="tex" if name == "a.tsv" else "text"))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.txt", "a.md.gz", "a.jsonl", "a.json"])
def test_what_ends_in_a_carriage_return_alone_is_read(tmp_path, name):
    content = '{"text": "one"}\r{"text": "two"}\r'
    if name in ("a.csv", "a.tsv.gz"):
        content = "text\rone\rtwo\r"
    if name.startswith("a.txt") or name == "a.md.gz":
        content = "one\rtwo\r"
    assert list(read_documents([write(tmp_path / name, content)])) == ["one", "two"]


COLUMN = ["one two", "", " ", "three\nlines\u2028of", " x "]
TEXTS = ["one two", "three\nlines\u2028of", " x "]


def write(file, content):
    """`content`, compressed where the name says so."""
    data = content.encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def test_a_json_array_and_another_column(tmp_path):
    rows = [{"story": text, "text": 1} for text in COLUMN]
    assert list(read_documents([write(tmp_path / "a.json", json.dumps(rows, indent=1))], column="story")) == TEXTS
    assert list(read_documents([write(tmp_path / "b.json.gz", json.dumps(rows))], column="story")) == TEXTS
    assert list(read_documents([write(tmp_path / "c.json", "[]")])) == []


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    write(tmp_path / "b" / "1.txt.gz", "three")
    write(tmp_path / "c.jsonl", json.dumps({"text": "four"}))
    write(tmp_path / "a.txt", "one\ntwo")
    for name in ("README.md", "b/.2.txt", ".hidden/a.txt"):
        write(tmp_path / name, "no document")
    pq.write_table(pa.table({"text": ["five"]}), tmp_path / "d.parquet")
    assert list(read_documents([tmp_path])) == ["one", "two", "three", "four", "five"]
    assert list(read_documents([tmp_path / "d.parquet", tmp_path / "b"])) == ["five", "three"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValmError, match=r"the folder .*empty has no file that ends in \.txt, .*\.parquet"):
        read_documents([tmp_path / "empty"])


def test_linked_folders_are_read_and_folders_that_cannot_be_read_refused(tmp_path, monkeypatch):
    for name in ("more", "corpus"):
        write(tmp_path / name / "a.txt", name)
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "more")
    assert list(read_documents([tmp_path / "corpus"])) == ["corpus", "more"]

    def denied(folder, onerror):
        onerror(PermissionError(13, "Permission denied", str(folder)))
        return iter(())

    monkeypatch.setattr("valm.store.files.os.walk", denied)
    with pytest.raises(PermissionError, match="corpus"):
        list(read_documents([tmp_path / "corpus"]))


TABLE = 'image,caption\n00.png,a red apple\n00.png,"an apple, on a table"\n01.png,a leaf\n'
CAPTIONS = [("a red apple", "00.png"), ("an apple, on a table", "00.png"), ("a leaf", "01.png")]


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("captions.txt", TABLE, "text"),
        ("captions.csv", TABLE, "caption"),
        ("captions.tsv", TABLE.replace('"', "").replace("png,", "png\t").replace("e,c", "e\tc"), "text"),
        ("captions.txt", TABLE.replace("caption", "text"), "text"),
        ("rows.jsonl", "\n".join(json.dumps({"text": text, "file_name": image}) for text, image in CAPTIONS), "text"),
    ],
)
def test_rows_that_name_an_image_are_its_captions(tmp_path, name, content, column):
    write(tmp_path / name, content)
    found = list(read_documents([tmp_path], column=column))
    assert [(text, text.image) for text in found] == CAPTIONS
    again = pickle.loads(pickle.dumps(found[0]))
    assert again == found[0] and again.image == found[0].image


def test_other_tables_and_texts_have_no_images(tmp_path):
    for name, content, count in (
        ("captions.txt", "a red apple\na green one\n", 2),
        ("captions.txt", "one,two\rthree\n second\n", 3),
        ("rows.csv", "path,text\nbooks/1,a red apple\n", 1),
    ):
        write(tmp_path / name, content)
        found = list(read_documents([tmp_path / name]))
        assert len(found) == count and not any(isinstance(text, Caption) for text in found)
    images = [{"bytes": b"x", "path": "a.png"}]
    pq.write_table(pa.table({"text": ["a red apple"], "image": images}), tmp_path / "rows.parquet")
    assert not isinstance(next(read_documents([tmp_path / "rows.parquet"])), Caption)


def pictures(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(0))


def test_the_corpus_of_pictures_is_their_captions(tmp_path, caplog):
    """No other text in the folder, and no caption of a picture that is missing or broken."""
    folder = tmp_path / "pictures"
    pictures(folder, "a.JPG", "deep/b.png", "c.png", "d.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "empty.png").touch()
    write(folder / "a.txt", "a red apple\nan apple")
    write(folder / "broken.txt", "of a broken picture")
    write(folder / "deep" / "b.png.json", json.dumps({"description": "a leaf"}, indent=2))
    write(folder / "README.txt", "no caption")
    write(folder / "rows.jsonl", "no JSON")
    write(folder / "captions.csv", "image,caption\nc.png,a boat\nempty.png,empty\nmissing.png,missing\n")
    expected = [("a red apple", "0/a"), ("an apple", "0/a"), ("a boat", "0/c"), ("a leaf", "0/deep/b")]
    documents = read_documents([folder])
    assert documents.share == 0
    found = list(documents)
    assert [(text, text.image) for text in found] == expected and documents.share == 1
    again = pickle.loads(pickle.dumps(found[0]))
    assert again == found[0] and again.image == found[0].image
    for remark in (
        "files ignored: 1 .jsonl, 1 .txt",
        "1 of 6 images have no caption",
        "1 rows of captions.csv name no image, such as 'missing.png'",
    ):
        assert f"{folder}: {remark}" in caplog.text
    shutil.make_archive(str(tmp_path / "pictures"), "zip", tmp_path, "pictures")
    assert [(text, text.image) for text in read_documents([tmp_path / "pictures.zip"])] == expected


def test_a_table_of_captions_of_pictures(tmp_path):
    """As `valm kb build` takes it, with text files beside the folder."""
    pictures(tmp_path / "one", "a.png", "b.png")
    write(tmp_path / "captions.json", json.dumps({"a.png": ["a red apple", "an apple"]}))
    write(tmp_path / "more.txt", "a text")
    found = list(read_documents([tmp_path / "more.txt", tmp_path / "one"], captions=tmp_path / "captions.json"))
    assert found == ["a text", "a red apple", "an apple"]
    assert [getattr(text, "image", None) for text in found] == [None, "1/a", "1/a"]
    with pytest.raises(ValmError, match="--captions is for folders and zip files of pictures"):
        read_documents([tmp_path / "more.txt"], captions=tmp_path / "captions.json")


def test_pictures_without_captions_are_no_corpus(tmp_path):
    pictures(tmp_path, "cover.png", "d.png")
    write(tmp_path / "chapter.txt", "a text")
    with pytest.raises(ValmError, match=r"no picture in .* has a caption, .*: name each other text file by itself"):
        read_documents([tmp_path])
    assert list(read_documents([tmp_path / "chapter.txt"])) == ["a text"]


def test_the_image_of_a_text_does_not_depend_on_how_its_path_is_typed(tmp_path, monkeypatch):
    """Or a resumed retrieval would divide the captions of one image; but those of two folders are of two images."""
    for name in ("p/deep", "q/deep"):
        pictures(tmp_path / name, "a.b.jpg")
        write(tmp_path / name / "a.b.txt", "a red apple")
    monkeypatch.chdir(tmp_path / "p")

    def images(*paths):
        return [text.image for text in read_documents(paths)]

    assert images(".", "../q") == images(tmp_path / "p", tmp_path / "q") == ["0/deep/a.b", "1/deep/a.b"]
    assert images("deep/a.b.txt") == images(tmp_path / "p" / "deep" / "a.b.txt") == ["0/a.b"]


@pytest.mark.parametrize("column", ["text", "caption"])
def test_metadata_beside_images_is_no_document(tmp_path, column):
    """As img2dataset writes it: NAME.jpg, NAME.txt and NAME.json, which has the caption again."""
    captions = [f"a picture of {number}" for number in range(4)]
    for number, caption in enumerate(captions):
        shard = tmp_path / f"0000{number % 2}"
        image, text, metadata = ("JPG", "TXT", "JSON") if number == 3 else ("jpg", "txt", "json")
        pictures(shard, f"{number}.{image}")
        write(shard / f"{number}.{text}", caption)
        write(shard / f"{number}.{metadata}", json.dumps({"caption": caption, "status": "success"}))
    assert sorted(read_documents([tmp_path], column=column)) == captions
    # a file that is named is read
    assert list(read_documents([tmp_path / "00000" / "0.json"], column="caption")) == captions[:1]


def test_a_mistyped_column_of_captions_is_named(tmp_path):
    """Never the captions instead."""
    for name in ("captions.csv", "captions.txt"):
        file = write(tmp_path / name, "image,caption,story\na.png,short,long\n")
        with pytest.raises(ValmError, match=rf"{re.escape(name)}.*stroy"):
            list(read_documents([file], column="stroy"))
        assert list(read_documents([file], column="story")) == ["long"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": 1}\n', r"a\.jsonl, row 3: 'text' is 1, expected a text"),
        ("a.jsonl", '{"text": "x"}\n{"body": "x"}\n', r"a\.jsonl, row 2: there is no column 'text'"),
        ("a.jsonl", '{"text": "x"}\nplain text\n', r"a\.jsonl, row 2: Expecting value"),
        ("a.jsonl", '{"text": "x"}\n["text"]\n', r"a\.jsonl, row 2: expected an object with a text in 'text'"),
        ("a.jsonl", "[" * 100000, r"a\.jsonl, row 1: "),
        ("a.jsonl.gz", '{"text": "x"}\n{"text": null}\n', r"a\.jsonl\.gz, row 2: 'text' is null, expected"),
        ("a.json", '[{"text": "x"}, {"text": 2}]', r"a\.json, row 2: 'text' is 2, expected a text"),
        ("a.json", '[{"text": "x"}', r"a\.json, row 1: Expecting"),
        ("a.json", '{\n"text": "x"\n}', r"a\.json, row 1: Expecting"),
        ("a.csv", "text,n\none,1\n\ntwo\n", r"a\.csv, row 2: it has another number of fields .*: quote fields as"),
        ("a.csv", 'text,n\n"one,1\ntwo,2\n', r"a\.csv, row 1: unexpected end of data"),
        (
            "a.csv",
            "text;n\none;1\n",
            r"a\.csv, row 1: there is no column 'text', only .*: name one by --column",
        ),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, name, content, message):
    file = write(tmp_path / name, content)
    with pytest.raises(ValmError, match=message):
        list(read_documents([file]))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "rows"])
def test_documents_have_a_limit(tmp_path, name):
    """Tokenizing one of 300 MB aborts a process that lacks 40 GB."""
    long = "a " * (8 << 20) + "b"
    row = json.dumps({"text": long})
    contents = {
        ".jsonl": f'{{"text": "short"}}\n{row}',
        ".json": f"[{row}]",
        ".csv": f"text\nshort\n{long}\n",
        ".tsv": f'text\nshort\n"{long[: 9 << 20]}\n{long[: 9 << 20]}"\n',
    }
    file, place = tmp_path / name, r"a\..*"
    if name == "a.parquet":
        pq.write_table(pa.table({"text": ["short"] * 3 + [long]}), file, row_group_size=2)
        place = r"a\.parquet, row 4"
    elif name == "rows":
        place = "row 2"
    else:
        write(file, contents.get(file.suffix, f"short\n{long}\n"))
    with pytest.raises(
        ValmError, match=rf"{place}: (a document or line of more than 16 MiB|field larger than field limit)"
    ):
        list(row_documents([{"text": "short"}, {"text": long}]) if name == "rows" else read_documents([file]))


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_a_line_above_the_limit_is_not_divided(tmp_path, name):
    file = write(tmp_path / name, f"text\n{'a' * MAX_DOCUMENT} {'b' * 10}\n")
    with pytest.raises(ValmError, match=r"a\..*: a document or line of more than 16 MiB"):
        list(read_documents([file]))


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_a_line_may_be_as_long_as_the_limit(tmp_path, name, end):
    file = write(tmp_path / name, f"text\n{'a' * MAX_DOCUMENT}{end}")
    assert [len(text) for text in read_documents([file])] == [len("text"), MAX_DOCUMENT][name == "a.csv" :]


def test_an_array_in_one_line_may_exceed_the_limit_of_a_document(tmp_path):
    texts = ["a" * (MAX_DOCUMENT // 2)] * 3
    file = write(tmp_path / "a.json", json.dumps([{"text": text} for text in texts]))
    assert list(read_documents([file])) == texts


def test_damaged_and_doubly_compressed_files_are_named(tmp_path):
    packed = gzip.compress(b"some text " * 1000)
    pq.write_table(pa.table({"text": [f"{number} words" for number in range(1000)]}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for name, content, message in (
        ("cut.txt.gz", packed[:-20], r"the corpus .*cut\.txt\.gz, row 1: Compressed file ended"),
        ("text.txt.gz", b"no gzip", r"the corpus .*text\.txt\.gz, row 1: Not a gzipped file"),
        ("zeros.parquet", whole[:4] + bytes(596) + whole[600:], r"the corpus .*zeros\.parquet, row 1: "),
        ("broken.parquet", b"no", r"the corpus .*broken\.parquet"),
        ("twice.parquet.gz", packed, r"twice\.parquet\.gz, row 1: "),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValmError, match=message):
            read_documents([tmp_path / name])


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_of_a_dataset(streamed):
    dataset = datasets.Dataset.from_dict({"text": COLUMN, "n": range(5)})
    rows = dataset.to_iterable_dataset() if streamed else dataset
    assert list(row_documents(rows)) == TEXTS
    with pytest.raises(ValmError, match="the dataset, row 1: there is no column 'story'"):
        list(row_documents(rows, "story"))
    with pytest.raises(ValmError, match="the dataset, row 2: 'text' is null, expected a text"):
        list(row_documents([{"text": "x"}, {"text": None}]))
    with pytest.raises(ValmError, match="the dataset, row 1: 'n' is 0, expected a text"):
        list(row_documents(rows, "n"))
