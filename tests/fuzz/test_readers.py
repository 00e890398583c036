"""Whatever is in the files of a store or a source, reading it is refused in a sentence or has the same result.

`make fuzz MINUTES=10` goes on with other seeds. What fails once is replayed with its seed: VALM_FUZZ_SEED=N pytest ...
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.mutations import damaged, mutated_bytes
from valm import ImageKnowledgeBase, load_checkpoint
from valm.clip import Clip
from valm.corpus.parts import file_parts
from valm.corpus.retrieved import CorpusRetrieval
from valm.errors import ValmError
from valm.knowledge_base.captions import read_captions
from valm.knowledge_base.sources.webdataset import tar_records
from valm.retrieval.index_parameters import index_parameters
from valm.shards.build import ShardedBuild
from valm_kernels import FlatIPIndex

STORES = Path(__file__).parents[1] / "fixtures" / "0.1.0"
SEED = int(os.environ.get("VALM_FUZZ_SEED", "0"))
REFUSED = "refused"

pytestmark = pytest.mark.slow


def fuzzed(examples: int) -> Callable[..., Any]:
    """A test of so many mutants, the same ones for a seed."""

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


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    return Path(shutil.copytree(STORES, tmp_path_factory.mktemp("fuzz") / "stores"))


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """A file that no reader may open."""
    file = tmp_path_factory.mktemp("outside") / "secret"
    file.write_text('{"secret": "this is not to be read"}')
    return file


def result_of(read: Callable[[], Any], errors: tuple[type[Exception], ...] = (ValmError,)) -> Any:
    """What `read` returns, or REFUSED with one sentence that does not quote what is outside."""
    try:
        return read()
    except errors as error:
        assert str(error).strip() and "not to be read" not in str(error)
        return REFUSED


def check_mutants(
    data: st.DataObject,
    files: list[Path],
    outside: Path,
    read: Callable[[], Any],
    expected: Any,
    errors: tuple[type[Exception], ...] = (ValmError,),
) -> None:
    """One of `files` is damaged: `read` is refused or returns what is `expected` (... stands for anything)."""
    before = outside.read_bytes()
    file = data.draw(st.sampled_from(files))
    with damaged(data.draw, file, outside) as how:
        found = result_of(read, errors)
    note(f"{file.name}: {how}")
    assert found in (REFUSED, expected) or expected is ..., f"{file.name}, {how}: another result, not refused"
    assert outside.read_bytes() == before


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix != ".tmp")


@fuzzed(300)
def test_knowledge_base(stores, outside, data):
    def read(verified: bool) -> Any:
        kb = ImageKnowledgeBase.open(stores / "kb")
        if verified and kb.verify(progress=False):
            return REFUSED
        items = [kb.item(id) for id in range(len(kb))]
        thumbnails = [kb.thumbnail(id).tobytes() for id in range(len(kb))]
        return items, thumbnails, list(kb.skipped()), kb.vectors().tobytes()

    files = [file for file in files_of(stores / "kb") if not file.name.startswith("index")]
    # the plan, and what is said of the CLIP, nothing else can be held against
    verified = data.draw(st.booleans())
    check_mutants(data, files, outside, lambda: read(verified), read(True) if verified else ...)


@fuzzed(300)
def test_index_parameters(stores, outside, data):
    kb = ImageKnowledgeBase.open(stores / "kb")
    check_mutants(data, [stores / "kb" / "index.json"], outside, lambda: index_parameters(kb), ...)


@fuzzed(300)
def test_corpus_retrieval(stores, outside, data):
    def read(verified: bool) -> Any:
        corpus = CorpusRetrieval.open(stores / "corpus")
        if verified and corpus.verify(progress=False):
            return REFUSED
        corpus.lengths()
        return [(document["input_ids"].tolist(), document["image_ids"].tolist()) for document in corpus]

    verified = data.draw(st.booleans())
    check_mutants(data, files_of(stores / "corpus"), outside, lambda: read(verified), read(True) if verified else ...)


@fuzzed(100)
def test_tokenizer_of_a_corpus(stores, outside, data):
    files = [stores / "corpus" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    vocabulary = CorpusRetrieval.open(stores / "corpus").tokenizer.get_vocab()
    check_mutants(
        data, files, outside, lambda: CorpusRetrieval.open(stores / "corpus").tokenizer.get_vocab() and ..., ...
    )
    assert CorpusRetrieval.open(stores / "corpus").tokenizer.get_vocab() == vocabulary


@fuzzed(300)
def test_unfinished_builds(stores, outside, data):
    folder = stores / data.draw(st.sampled_from(["kb-unfinished", "corpus-unfinished"]))
    what = "knowledge base" if folder.name.startswith("kb") else "corpus retrieval"
    files = [file for file in files_of(folder) if file.suffix == ".json" or file.name.endswith("00000.npy")]

    def read() -> Any:
        plan = json.loads((STORES / folder.name / "build.json").read_text())["plan"]
        return ShardedBuild(folder, what, plan).done()

    check_mutants(data, files, outside, read, ...)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@fuzzed(300)
def test_flat_index(stores, outside, dtype, data):
    queries = np.load(STORES / "flat" / "queries.npy", allow_pickle=False)

    def read() -> Any:
        scores, ids = FlatIPIndex.load(stores / "flat" / dtype, verify=True).search(queries, 5)
        return scores.tolist(), ids.tolist()

    errors = (ValueError, FileNotFoundError)
    check_mutants(data, files_of(stores / "flat" / dtype), outside, read, read(), errors)


@fuzzed(60)
def test_checkpoint(stores, outside, data):
    ids = torch.arange(5)[None]

    def read() -> Any:
        return load_checkpoint(stores / "gpt2")[0](ids).logits.shape[:2]

    files = [file for file in files_of(stores / "gpt2") if file.suffix == ".json"]
    check_mutants(data, files, outside, read, ...)


@fuzzed(60)
def test_clip(stores, outside, data):
    check_mutants(data, files_of(stores / "clip"), outside, lambda: Clip.load(stores / "clip").weights_hash, ...)


@fuzzed(200)
def test_captions_tables(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("captions")
    theirs = folder / "linked.csv"  # a user's own table may be a link
    theirs.write_text("image,caption\n")
    (folder / "captions.csv").write_text('image,caption\na.png,"a ""red"" dog"\nb.png,two\nb.png,three\n')
    (folder / "captions.json").write_text('{"a.png": "one", "b.png": ["two", "three"]}')
    file = folder / data.draw(st.sampled_from(["captions.csv", "captions.json"]))
    check_mutants(data, [file], theirs, lambda: read_captions(folder, ["a.png", "b.png"], file), ...)


@fuzzed(300)
def test_archives(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("archive") / "a.tar"
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(file, "w") as tar:
        for name, content in (("a.png", picture.getvalue()), ("a.txt", b"red"), ("b.json", b'{"caption": "x"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    def read() -> Any:
        for record in tar_records(file):
            with suppress(Exception):  # then it is listed as skipped
                record.read()

    # pipes are refused where archives are looked for (test_build.py)
    original = file.read_bytes()
    file.write_bytes(mutated_bytes(data.draw, original))
    result_of(read)


@fuzzed(300)
def test_corpus_files(tmp_path_factory, outside, data):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("a red dog\nein Hund läuft\n\nthree\n", encoding="utf-8")
    pq.write_table(pa.table({"text": [f"document {number}" for number in range(50)]}), folder / "a.parquet")
    rows = [json.dumps({"text": f"document {number}"}) for number in range(5)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    (folder / "a.json").write_text(f"[{', '.join(rows)}]")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    file = folder / data.draw(st.sampled_from(["a.txt", "a.parquet", "a.jsonl", "a.json", "a.jsonl.gz"]))
    check_mutants(data, [file], outside, lambda: [part.read() for part in file_parts([file])], ...)
