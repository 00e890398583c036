import itertools
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.tolerance import assert_agree
from tests.valm.other_tokenizers import gpt2_like, qwen_like
from tests.valm.retrieval.indexed import make_kb_of_directions
from tests.valm.store.manifests import contents, edit_manifest
from tests.valm.tiny_clip import TEXTS
from valm.clip.tokenizer import tokenize_documents
from valm.corpus import retrieved
from valm.corpus.retrieved import CorpusRetrieval, corpus_schema, retrieve_corpus
from valm.corpus.texts import MAX_DOCUMENT, Caption, read_documents
from valm.errors import ValmError
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever
from valm.store.shards import read_shard, run_here
from valm_kernels import FlatIPIndex

LINES = [*TEXTS, "a dog.", "a red apple lies on", TEXTS[1] + TEXTS[0], "the sky", "blue grass", TEXTS[0][:30]] * 2
retrieve = partial(retrieve_corpus, progress=False)


@pytest.fixture(scope="module")
def kb(make_kb):
    return make_kb(20)


@pytest.fixture(scope="module")
def retriever(clip, kb):
    return Retriever(ContextEncoder(clip), kb, 4)


@pytest.fixture(scope="module")
def documents(tokenizer):
    return tokenize_documents(LINES, tokenizer)


@pytest.fixture(scope="module")
def corpus(documents, retriever, tmp_path_factory):
    """In several shards."""
    return retrieve(iter(documents), retriever, tmp_path_factory.mktemp("corpus"), part_bytes=200)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("\n".join(LINES))
    return file


def interrupted(documents):
    yield from documents
    raise KeyboardInterrupt


def test_scores_are_those_of_the_search(corpus, documents, retriever):
    """And the images are those that a document has alone."""
    assert corpus.has_scores and len(corpus.manifest["shards"]) > 3
    assert len(corpus) == len(documents) and corpus.lengths().tolist() == list(map(len, documents))
    for index, document in enumerate(documents):
        ids, scores = retriever.find(torch.tensor([document]))
        found = corpus[index]
        assert found["input_ids"].tolist() == document and found["image_ids"].tolist() == ids[0].tolist()
        assert (ids[0, 0] == -1).all() and (ids[0, 1:] >= 0).all() and found["image_scores"].dtype == np.float32
        assert_agree(found["image_scores"], scores[0].numpy())
    for wrong in (-1, len(documents)):
        with pytest.raises(IndexError, match=f"documents go from 0 to 15, got {wrong}"):
            corpus[wrong]
    some = corpus[-2:]
    assert isinstance(some, list) and len(some) == 2
    for found, index in zip(some, (len(corpus) - 2, len(corpus) - 1), strict=True):
        assert all(np.array_equal(found[name], values, equal_nan=True) for name, values in corpus[index].items())


def test_without_scores(documents, retriever, tmp_path):
    found = retrieve(documents[:2], retriever, tmp_path, scores=False)
    assert not found.has_scores and found[0].keys() == {"input_ids", "image_ids"}
    with pytest.raises(ValmError, match="its scores is "):
        retrieve(documents[:2], retriever, tmp_path)


def test_batching_changes_nothing(corpus, documents, retriever, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieved, "BATCH_TOKENS", 1)
    one_by_one = retrieve(documents, retriever, tmp_path / "out")
    assert len(one_by_one.manifest["shards"]) == 1
    for one, other in zip(one_by_one, corpus, strict=True):
        assert np.array_equal(one["image_ids"], other["image_ids"])


def test_texts_as_they_come(corpus, retriever, tmp_path):
    file = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"story": [*LINES, "", " "]}), file, row_group_size=5)
    for name, texts in (("out", iter(LINES)), ("table", read_documents([file], column="story"))):
        found = retrieve(texts, retriever, tmp_path / name, part_bytes=150)
        assert len(found.manifest["shards"]) > 3
        for one, other in zip(found, corpus, strict=True):
            assert np.array_equal(one["input_ids"], other["input_ids"])
            assert np.array_equal(one["image_ids"], other["image_ids"])
    with pytest.raises(ValmError, match="source of the corpus retrieval has changed since"):
        retrieve(iter(["new", *LINES]), retriever, tmp_path / "out", part_bytes=150)


def test_a_tokenizer_without_bos(clip, kb, tmp_path):
    tokenizer = qwen_like()
    retriever = Retriever(ContextEncoder(clip, tokenizer=tokenizer), kb, 2)
    found = retrieve(TEXTS, retriever, tmp_path)
    assert found.tokenizer.get_vocab() == tokenizer.get_vocab() and found.tokenizer.bos_token is None
    document = found[0]
    assert document["input_ids"][0] == document["input_ids"][-1] == tokenizer.eos_token_id
    live = retriever(torch.tensor([document["input_ids"].tolist()]))
    here = document["image_ids"] >= 0
    assert not here[0].any() and here[1:-1].all()
    assert np.array_equal(live.image_index[0].numpy() >= 0, here)
    assert live.image_ids[live.image_index[0, here]].tolist() == document["image_ids"][here].tolist()


def test_the_files(corpus, documents, tokenizer):
    names = {f"shard-{number:05d}.arrow" for number in range(len(corpus.manifest["shards"]))}
    assert set(contents(corpus.path)) >= names and not (corpus.path / "build.json").exists()
    opened = CorpusRetrieval.open(corpus.path)
    document = opened[3]
    assert not document["input_ids"].flags.owndata  # memory-mapped
    assert all((document["image_ids"][1:] >= 0).all() for document in opened)
    assert opened.manifest["tokens"] == sum(map(len, documents))
    assert (opened.k, opened.query) == (4, "eot")
    assert opened.tokenizer.get_vocab() == tokenizer.get_vocab()
    copied = pickle.loads(pickle.dumps(opened))
    assert np.array_equal(copied[3]["image_ids"], document["image_ids"])


def test_documents_of_one_image_are_known(retriever, tmp_path):
    """Whatever the shard, and where a text has no token."""
    texts = [Caption("red", "a"), "blue", Caption("\u200b", "b"), Caption("green", "b"), Caption("a red", "a")]
    tokens = tokenize_documents(texts, retriever.encoder.tokenizer)
    found = retrieve(texts, retriever, tmp_path / "out", part_bytes=8)
    first, none, *other, last = found.groups().tolist()
    assert len(found) == len(tokens) and len(found.manifest["shards"]) > 1
    assert first == last > 0 == none and {*other} == {other[0]} and other[0] not in (0, first)


def test_no_image_is_minus_one_and_all_ones_in_the_file(documents, retriever, tmp_path):
    def finds_one(queries, k):
        scores, ids = retriever.index.search(queries, k)
        return scores.index_fill(-1, torch.arange(1, k), -torch.inf), ids.index_fill(-1, torch.arange(1, k), -1)

    few = Retriever(retriever.encoder, retriever.kb, 2, SimpleNamespace(search=finds_one))
    found = retrieve(documents[:1], few, tmp_path / "corpus")
    assert (found[0]["image_ids"][1:, 0] >= 0).all() and (found[0]["image_ids"][:, 1] == -1).all()
    stored = read_shard(found.path / "shard-00000.arrow", corpus_schema(2, True), 1)["image_ids"].to_pylist()[0]
    assert all(ids[1] == 2**32 - 1 for ids in stored)


def test_a_part_does_not_depend_on_what_came_before_it(clip, tokenizer, tmp_path):
    """A query in bfloat16 depends on the lengths it is encoded with, and among 3,000 vectors that shows."""
    kb = make_kb_of_directions(clip, tmp_path / "kb")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(" ".join(TEXTS).split(), random.integers(1, 40))) for _ in range(100)]
    documents = tokenize_documents(random.choice(texts, 400).tolist(), tokenizer)

    def retrieve_to(out, documents):
        retriever = Retriever(ContextEncoder(clip, dtype=torch.bfloat16), kb, 4)
        return retrieve(documents, retriever, tmp_path / out, part_bytes=4000)

    whole = retrieve_to("whole", documents)
    with pytest.raises(KeyboardInterrupt):
        retrieve_to("resumed", interrupted(documents[:200]))
    assert 2 < len(list((tmp_path / "resumed").glob("shard-*.json"))) < len(whole.manifest["shards"]) - 2
    assert contents(retrieve_to("resumed", documents).path) == contents(whole.path)


def test_what_is_there_is_not_retrieved_again(documents, retriever, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        retrieve(interrupted(documents[:9]), retriever, tmp_path, part_bytes=200)
    there = len(list(tmp_path.glob("shard-*.json")))
    assert there > 1
    counted = []
    nearest = Retriever.nearest
    monkeypatch.setattr(Retriever, "nearest", lambda self, queries: counted.append(1) or nearest(self, queries))
    finished = retrieve(iter(documents), retriever, tmp_path, part_bytes=200)
    assert len(counted) == len(finished.manifest["shards"]) - there  # each of these is one batch
    counted.clear()
    before = contents(finished.path)
    assert len(retrieve(iter(documents), retriever, tmp_path, part_bytes=200)) == len(documents)  # only opened
    assert not counted and contents(finished.path) == before


def test_other_processes_get_the_texts(text_file, retriever, tmp_path):
    """As those of a Ray cluster do, in any order: they need not see the files."""
    file = shutil.copy(text_file, tmp_path / "corpus.txt")

    def elsewhere(task, shards, progress):
        sent = [pickle.dumps((task, *shard)) for shard in shards]
        file.unlink()
        for one in reversed(sent):
            task, number, part = pickle.loads(one)
            task(number, part, progress)

    found = [
        retrieve(read_documents([file]), retriever, tmp_path / name, part_bytes=150, run=run)
        for name, run in (("here", run_here), ("there", elsewhere))
    ]
    assert len(found[0].manifest["shards"]) > 3 and contents(found[0].path) == contents(found[1].path)


def test_another_corpus_is_refused(documents, retriever, tmp_path):
    def retrieve_to(name, documents, part_bytes=200):
        return retrieve(documents, retriever, tmp_path / name, part_bytes=part_bytes)

    def fails(part, *arguments):
        with pytest.raises(
            ValmError, match=rf"source of the corpus retrieval has changed since .* was begun \(its part {part}\)"
        ):
            retrieve_to(*arguments)

    with pytest.raises(KeyboardInterrupt):
        retrieve_to("out", interrupted(documents[:9]))
    changed = [documents[0][::-1], *documents[1:]]
    fails(0, "out", changed)
    finished = retrieve_to("out", documents)
    fails(0, "out", changed)
    fails(1, "out", documents[: finished.manifest["shards"][0]["documents"]])
    # also where the last part was full, so that all parts are as they were
    before = contents(retrieve_to("full", documents[:3], 1).path)
    fails(3, "full", documents[:4], 1)
    assert contents(tmp_path / "full") == before and len(retrieve_to("full", documents[:3], 1)) == 3


def test_another_file_knowledge_base_or_setting_is_refused(text_file, clip, retriever, make_kb, tmp_path):
    file = shutil.copy(text_file, tmp_path / "corpus.txt")
    retrieve(read_documents([file]), retriever, tmp_path / "out")
    for name, encoder, kb, k, options in (
        ("query", ContextEncoder(clip, query="state"), retriever.kb, 4, {}),
        ("knowledge_base", ContextEncoder(clip), make_kb(21), 4, {}),
        ("k", ContextEncoder(clip), retriever.kb, 3, {}),
        ("part_bytes", ContextEncoder(clip), retriever.kb, 4, {"part_bytes": 100}),
    ):
        with pytest.raises(ValmError, match=f"holds another corpus retrieval: its {name} is "):
            retrieve(read_documents([file]), Retriever(encoder, kb, k), tmp_path / "out", **options)
    for lines in ("\n".join(LINES).replace("sky", "sea"), "\n".join(LINES[1:])):  # the first is as long as before
        file.write_text(lines)
        with pytest.raises(ValmError, match="has changed"):
            retrieve(read_documents([file]), retriever, tmp_path / "out")


def test_another_end_of_documents_is_refused(clip, kb, tmp_path):
    """As those of Llama 3 and of its Instruct, whose tokenizer.json is one."""
    first, other = gpt2_like(), gpt2_like()
    other.add_special_tokens({"eos_token": "the"})
    first.add_tokens([], special_tokens=True)
    first.backend_tokenizer.add_special_tokens(["the"])
    assert first.eos_token_id != other.eos_token_id
    retrievers = [Retriever(ContextEncoder(clip, tokenizer=tokenizer), kb, 2) for tokenizer in (first, other)]
    corpus = retrieve(LINES[:3], retrievers[0], tmp_path)
    corpus.check_tokenizer(first)
    with pytest.raises(ValmError, match="its eos is "):
        retrieve(LINES[:3], retrievers[1], tmp_path)
    with pytest.raises(ValmError, match=r"end in token \d+, the model's in \d+ \('the'\): retrieve it again"):
        corpus.check_tokenizer(other)


def test_the_plan_says_what_searched(documents, clip, kb, tmp_path):
    class Own:
        def search(self, queries, k):
            return FlatIPIndex(kb.vectors()).search(queries, k)

    def entry(index, name):
        retriever = Retriever(ContextEncoder(clip), kb, 2, index)
        return retrieve(documents[:2], retriever, tmp_path / name).manifest["plan"]["index"]

    assert entry(None, "exact") == entry(FlatIPIndex(kb.vectors()), "exact") == "exact"
    assert entry(FlatIPIndex(kb.vectors(), dtype="int8"), "int8") == "exact, int8"
    assert entry(Own(), "own").endswith(".Own")
    with pytest.raises(ValmError, match="its index is "):
        entry(Own(), "exact")


def test_another_process_searches_with_the_same_index(documents, retriever, tmp_path):
    """It opens the index of the knowledge base itself, and one may have been made meanwhile."""

    def elsewhere(task, parts, progress):
        work = pickle.loads(pickle.dumps(task.args[1]))
        work.keywords["retriever"].index = type("Faiss", (), {})()
        for _, part in parts:
            work(part.source, progress)

    with pytest.raises(ValmError, match=r"the index of .* was made or removed after the retrieval began"):
        retrieve(documents[:2], retriever, tmp_path / "out", run=elsewhere)


def test_a_corpus_stays_open_wherever_the_process_works_later(corpus, monkeypatch):
    monkeypatch.chdir(corpus.path.parent)
    opened = CorpusRetrieval.open(corpus.path.name)
    monkeypatch.chdir("/")
    assert opened[0]["input_ids"].tolist() == corpus[0]["input_ids"].tolist()


def test_halves_of_characters_in_texts_of_python(retriever, tmp_path):
    found = retrieve(["a \ud800 b"], retriever, tmp_path / "out")
    assert "\ufffd" in found.tokenizer.decode(found[0]["input_ids"])


def test_another_knowledge_base_is_refused_when_it_is_used(corpus, retriever, make_kb):
    corpus.check_knowledge_base(retriever.kb)
    with pytest.raises(ValmError, match="was retrieved from another knowledge base"):
        corpus.check_knowledge_base(make_kb(21))


def test_parts_are_read_as_they_are_asked_for():
    asked = []

    def documents():
        for number in range(10):
            asked.append(number)
            yield [number] * 4

    def parts(documents, part_bytes):
        return (part.source for part in retrieved._parts(documents, part_bytes, Mock()))

    found = parts(documents(), 40)
    assert next(found) == [[0] * 4, [1] * 4, [2] * 4]
    assert asked == [0, 1, 2]
    assert [len(part) for part in found] == [3, 3, 1]
    assert list(parts(iter(["ab", "cd", "\u20ac", "e"]), 3)) == [["ab", "cd"], ["\u20ac"], ["e"]]
    with pytest.raises(ValmError, match="a document or line of more than 16 MiB"):
        list(parts(["short", "a" * (MAX_DOCUMENT + 1)], 1 << 20))


@pytest.mark.parametrize("finished", [0, 3])
def test_the_bar_knows_how_many_parts_the_files_have(text_file, retriever, tmp_path, monkeypatch, finished):
    """From how much of their bytes was read."""
    (tmp_path / "corpus.txt").write_text((text_file.read_text() + "\n") * 100)
    estimates = []

    def some(work, shards, bar):
        run_here(work, itertools.islice(shards, finished), bar)
        raise KeyboardInterrupt

    def watched(work, shards, bar):
        for shard in shards:
            estimates.append(bar.shards)
            work(*shard, bar)

    def retrieve_by(run):
        documents = read_documents([tmp_path / "corpus.txt"])
        return retrieve(documents, retriever, tmp_path / "out", part_bytes=16000, run=run)

    with pytest.raises(KeyboardInterrupt):
        retrieve_by(some)
    count = len(retrieve_by(watched).manifest["shards"])
    assert count > 4 and len(estimates) == count - finished
    assert estimates == pytest.approx([count] * len(estimates), abs=2) and estimates[-1] == count


def test_wrong_input(documents, retriever, tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    for wrong, name, message in (
        ([], "none", "the corpus has no documents"),
        ([[1], []], "out", "the corpus has an empty document"),
        (read_documents([tmp_path / "blank.txt"]), "blank", "the corpus has no documents"),
        (documents, "", "is not empty"),
    ):
        with pytest.raises(ValmError, match=message):
            retrieve(wrong, retriever, tmp_path / name)
    assert contents(tmp_path / "none") == {}


def test_damage_is_named(corpus, tmp_path):
    copied = Path(shutil.copytree(corpus.path, tmp_path / "copy"))
    name = "shard-00001.arrow"
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(bytes(len(content)))
    with pytest.raises(ValmError, match=rf"{name} is damaged"):
        list(CorpusRetrieval.open(copied))
    (copied / name).write_bytes(content)
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(ValmError, match=r"the tokenizer in .* cannot be read"):
        _ = CorpusRetrieval.open(copied).tokenizer
    manifest = json.loads((copied / "manifest.json").read_text())
    edit_manifest(copied, plan={**manifest["plan"], "k": 5})
    with pytest.raises(ValmError, match=r"\[4\].*, expected .*\[5\].*; make it again"):
        CorpusRetrieval.open(copied)[0]


@pytest.mark.parametrize("name", ["image_ids", "image_scores"])
def test_images_that_begin_elsewhere_than_their_documents_are_named(corpus, tmp_path, name):
    copied = Path(shutil.copytree(corpus.path, tmp_path / "copy"))
    file = copied / "shard-00000.arrow"
    table = pa.ipc.open_file(file.read_bytes()).read_all()
    column = table[name].chunk(0)
    offsets = column.offsets.to_numpy().copy()
    offsets[1] += 1
    moved = pa.ListArray.from_arrays(pa.array(offsets), column.values).cast(column.type)
    table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), moved)
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)
    first, *others = json.loads((copied / "manifest.json").read_text())["shards"]
    edit_manifest(copied, shards=[first | {"bytes": file.stat().st_size}, *others])
    with pytest.raises(ValmError, match=rf"shard-00000\.arrow is damaged: its {name} do not fit its documents"):
        CorpusRetrieval.open(copied)[0]


def test_damage_is_found_before_each_training(corpus, tmp_path, monkeypatch):
    damaged = CorpusRetrieval.open(shutil.copytree(corpus.path, tmp_path / "damaged"))
    before = contents(damaged.path)
    damaged.verify_once()
    assert contents(damaged.path) == before  # the folder is read only
    file = damaged.path / "shard-00001.arrow"
    times = os.stat(file)
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    opened = CorpusRetrieval.open(damaged.path)
    assert opened.verify(progress=False) == ["shard-00001.arrow"]
    with pytest.raises(ValmError, match=r"is damaged, retrieve it again: shard-00001\.arrow"):
        opened.verify_once()
    monkeypatch.setattr(CorpusRetrieval, "verify", lambda self: pytest.fail("verified again"))
    damaged.verify_once()  # as the same trainer asks for its other parts
