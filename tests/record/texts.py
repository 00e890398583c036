"""Documents of small files of every format, which must stay equal unless a change intends otherwise.

    python -m tests.record.texts    # writes tests/record/texts.json with the current code

They were recorded at commit b3dfd16. A long document is recorded as its length and SHA-256.
"""

import csv
import gzip
import hashlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.valm.stores import CORPUS
from valm.corpus.texts import read_documents

DOCUMENTS = Path(__file__).with_suffix(".json")
PROSE = Path(__file__).parents[1] / "fixtures" / "prose.txt"
LONG = "a long document, " * 300_000  # 5 MB
# Values that a reader of tables could take for something other than text.
TEXTS = [
    *("NA", "null", "007", "2024-01-31", "2024-01-31T10:00:00Z", "None", "nan", "#N/A", "1e5", "true", "-0", "'", " "),
    *("", "  padded  ", 'a "quoted", word', "two\nlines", "two\r\nlines", "\ttab", "naïve ☕", "a\u2028b\x0cc\x85d"),
    *("\ufeffmarked", "a\\b", "half\ufffd", '"', "last"),
]
# The second column of these tables, which mixes types in each.
OTHERS = [1, "x", 2.5, None, True, "", "NA", "2024-01-31", -7]
ROWS = [(text, OTHERS[number % len(OTHERS)]) for number, text in enumerate(TEXTS)]


def table(delimiter: str, **options: object) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, **options)
    writer.writerows([("text", "other"), *ROWS])
    return file.getvalue()


def contents() -> dict[str, str]:
    """The content of files by name; each is also written compressed."""
    rows = [json.dumps({"other": other, "text": text}) for text, other in ROWS]
    lines = "\n".join(text.replace("\n", " ") for text in TEXTS)
    long = json.dumps({"text": LONG})
    return {
        "prose.txt": PROSE.read_text(encoding="utf-8"),
        "corpus.md": CORPUS,
        "lines.txt": lines,
        "crlf.text": "\ufeff" + lines.replace("\n", "\r\n") + "\r\n",
        "return.txt": "one\n two\rthree \n\n \x1f \n\ufeff\ufefffour",
        "quoted.csv": table(",", quoting=csv.QUOTE_ALL),
        "plain.csv": table(",", lineterminator="\n"),
        "marked.csv": "\ufeff" + table(","),
        "header.csv": 'other,text\r\n1,one\n\n2,a"b\r\n3,"c ""d"""\n4,\ufefffive\n,',
        "plain.tsv": table("\t"),
        "plain.tab": table("\t", lineterminator="\n"),
        "empty.csv": "",
        "rows.jsonl": "\n\n".join(rows),
        "crlf.ndjson": "\ufeff" + "\r\n".join(rows) + "\r\n",
        "rows.json": "\n".join(rows),
        "array.json": "\ufeff \n[" + ",\n".join(rows) + "]",
        "long.txt": f"first\n{LONG}\nlast",
        "long.csv": f'text\nfirst\n"{LONG}\n"\nlast',
        "long.jsonl": f"{long}\n{rows[0]}",
        "long.json": f"[{long}, {rows[0]}]",
        "half.jsonlines": '{"text": "a\\ud800b"}\n \n{"text": "\\u0000 \\ud83d\\ude00", "text": "twice"}',
    }


def write(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    for number, (name, content) in enumerate(contents().items()):
        data = content.encode()
        (folder / name).write_bytes(data)
        below = folder.joinpath(*["deep", "er"][: number % 3])
        (below / f"{name}.gz").write_bytes(gzip.compress(data, 1))
    for name, kind, rows in (("small.parquet", pa.string(), 4), ("large.parquet", pa.large_string(), 100)):
        others = [str(other) for _, other in [*ROWS, ("", "")]]
        columns = pa.table({"other": others, "text": pa.array([*TEXTS, LONG], kind), "text2": others})
        pq.write_table(columns, folder / name, row_group_size=rows)
    (folder / ".hidden.txt").write_text("hidden")


def outputs(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, documents) for each file and for the folder; works in the empty `folder`."""
    write(folder)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield file.relative_to(folder).as_posix(), list(map(short, read_documents([file])))
    yield "all", list(map(short, read_documents([folder])))


def short(text: str) -> str:
    return text if len(text) < 100 else f"{len(text)} {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = dict(outputs(Path(folder)))
    DOCUMENTS.write_text(json.dumps(found, indent=0) + "\n")
    print(f"{DOCUMENTS}: {sum(map(len, found.values()))} documents, {DOCUMENTS.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
