"""What earlier versions wrote opens in this one and means the same; what they left unfinished is finished by it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from valm import Clip, ContextEncoder, ImageKnowledgeBase, Retriever, load
from valm.corpus.retrieved import CorpusRetrieval, retrieve_files
from valm.knowledge_base.build import build
from valm.knowledge_base.encode import Encoding
from valm.knowledge_base.sources.folder import FolderSource
from valm.retrieval.faiss_index import FaissIndex, verify_index
from valm_kernels import FlatIPIndex

pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")

VERSIONS = sorted(folder for folder in (Path(__file__).parent / "fixtures").iterdir() if folder.is_dir())


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def stores(request, tmp_path) -> Path:
    """A copy, so that no test changes what is committed."""
    return shutil.copytree(request.param, tmp_path / request.param.name)


def expected(stores: Path, name: str) -> list[dict]:
    return json.loads((stores / "expected" / f"{name}.json").read_text(encoding="utf-8"))


def assert_close(found, expected):
    """To 1e-5 of the largest: other processors round differently."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def last_writes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def file_names(shard: dict) -> list[str]:
    return [entry["name"] for entry in shard["files"]]


@pytest.mark.parametrize("name", ["valm", "gpt2", "blind"])
def test_a_checkpoint_predicts_the_same(stores, name):
    (record,) = (record for record in expected(stores, "models") if record["name"] == name)
    model, tokenizer = load(stores / name)
    ids = tokenizer(record["text"], return_tensors="pt").input_ids
    assert ids[0].tolist() == record["input_ids"]
    if name == "gpt2":
        assert model.retriever is None
    images = {}  # with those of the first token, which it had then
    if name == "valm":
        assert model.retriever.find(ids)[0][0, 1:].tolist() == record["image_ids"][1:]
        index = torch.arange(ids.numel() * 2).view(1, -1, 2)
        vectors = model.retriever.kb.gather(np.ravel(record["image_ids"]))
        images = {"image_pool": torch.from_numpy(vectors).float(), "image_index": index}
    if name == "blind":
        assert model.retriever.encoder.query == "state"
        found = model.retriever(ids)
        bos = torch.tensor([[tokenizer.bos_token_id]])
        first = model.retriever.encoder(torch.cat([bos, ids[:, :1]], 1))[0, 1:]  # the same text behind bos
        images = {"image_pool": torch.cat([first, found.image_pool]), "image_index": found.image_index + 1}
    logits = np.load(stores / "expected" / f"{name}-logits.npy", allow_pickle=False)
    with torch.no_grad():
        assert_close(model(ids, logits_to_keep=len(logits), **images).logits[0].numpy(), logits)


def test_a_knowledge_base_opens_with_its_index(stores):
    kb = ImageKnowledgeBase.open(stores / "kb")
    assert kb.verify(progress=False) == [] and verify_index(kb) == []
    assert [vars(kb.item(id)) for id in range(len(kb))] == expected(stores, "items")
    assert list(kb.skipped()) == expected(stores, "skipped")
    assert [kb.thumbnail(id).size for id in range(len(kb))] == [(8, 6)] * len(kb)

    through_faiss, exact = expected(stores, "search")
    clip = kb.load_clip()
    retriever = Retriever(ContextEncoder(clip), kb, 2)
    assert isinstance(retriever.index, FaissIndex)
    scores, items = zip(*retriever.search(through_faiss["text"], 5), strict=True)
    assert [item.id for item in items] == through_faiss["ids"]
    assert_close(scores, through_faiss["scores"])
    scores, ids = FlatIPIndex(kb.vectors()).search(clip.encode_texts([exact["text"]]), 5)
    assert ids[0].tolist() == exact["ids"]
    assert_close(scores[0], exact["scores"])


def test_an_unfinished_knowledge_base_is_finished(stores):
    whole, out = ImageKnowledgeBase.open(stores / "kb"), stores / "kb-unfinished"
    written = last_writes(out)
    plan = whole.manifest["plan"]
    source = FolderSource(stores / "pictures", shard_size=plan["shard_size"])
    encoding = Encoding(batch_size=plan["batch_size"], thumbnails=plan["thumbnails"])
    kb = build(source, out, Clip.load(stores / "clip"), encoding, progress=False)

    assert kb.verify(progress=False) == []
    assert last_writes(out).keys() == last_writes(whole.path).keys() - {"index.faiss", "index.json"}
    shards, whole_shards = kb.manifest["shards"], whole.manifest["shards"]
    assert shards[0] == whole_shards[0]
    assert all(last_writes(out)[entry["name"]] == written[entry["name"]] for entry in shards[0]["files"])
    # of the others the bytes may differ: another Pillow or Arrow writes them differently
    assert [file_names(shard) for shard in shards] == [file_names(shard) for shard in whole_shards]
    # which the earlier version did not write
    assert kb.manifest["clip"].pop("weight_files").keys() == {"open_clip_model.safetensors"}
    assert kb.manifest | {"shards": whole_shards} == whole.manifest
    assert [vars(kb.item(id)) for id in range(len(kb))] == expected(stores, "items")
    assert [bad["uri"] for bad in kb.skipped()] == [bad["uri"] for bad in expected(stores, "skipped")]
    np.testing.assert_allclose(kb.vectors(), whole.vectors(), rtol=0, atol=np.finfo(np.float16).eps)


def test_a_corpus_retrieval_opens(stores):
    corpus = CorpusRetrieval.open(stores / "corpus")
    corpus.check_knowledge_base(ImageKnowledgeBase.open(stores / "kb"))
    assert (corpus.k, corpus.query) == (2, "eot")
    documents = expected(stores, "corpus")
    for document in documents:
        document["image_ids"][0] = [-1, -1]  # the first token had images then
    assert [{name: array.tolist() for name, array in document.items()} for document in corpus] == documents
    assert corpus.lengths().tolist() == [len(document["input_ids"]) for document in documents]
    assert corpus.tokenizer.bos_token_id == documents[0]["input_ids"][0]


def test_an_unfinished_corpus_retrieval_is_finished_to_the_same_documents(stores):
    kb = ImageKnowledgeBase.open(stores / "kb")
    whole = CorpusRetrieval.open(stores / "corpus")
    retriever = Retriever(ContextEncoder(kb.load_clip(), tokenizer=whole.tokenizer), kb, whole.k)
    part_bytes = whole.manifest["plan"]["corpus"]["part_bytes"]
    out = stores / "corpus-unfinished"
    written = last_writes(out)
    corpus = stores / "corpus.txt"
    found = retrieve_files([corpus], retriever, out, part_bytes=part_bytes, scores=False, progress=False)

    assert last_writes(out).keys() == last_writes(whole.path).keys()
    assert all(last_writes(out)[name] == written[name] for name in file_names(whole.manifest["shards"][0]))
    for name in (name for shard in whole.manifest["shards"] for name in file_names(shard)):
        # the first token of a document had images then
        same = (out / name).read_bytes() == (whole.path / name).read_bytes()
        assert same or (name.startswith("image_ids") and not name.endswith("-00000.npy")), name
    for document, before in zip(found, whole, strict=True):
        assert np.array_equal(document["input_ids"], before["input_ids"])
        # the last token is bos too, and begins the next document
        assert np.array_equal(document["image_ids"][:-1], before["image_ids"][:-1])
    # the files of the tokenizer are the other ones: another transformers may write them differently
    assert CorpusRetrieval.open(out).tokenizer.get_vocab() == whole.tokenizer.get_vocab()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_flat_index_finds_the_same(stores, dtype, mmap):
    (record,) = (record for record in expected(stores, "flat") if record["dtype"] == dtype)
    index = FlatIPIndex.load(stores / "flat" / dtype, mmap=mmap, verify=True)
    assert index.dtype == dtype
    scores, indices = index.search(np.load(stores / "flat" / "queries.npy", allow_pickle=False), 5)
    assert indices.tolist() == record["indices"]
    assert scores.tolist() == record["scores"]  # exact on every machine


def test_no_store_names_the_machine_it_was_made_on():
    for version in VERSIONS:
        for file in version.rglob("*.json"):
            assert not any(home in file.read_text(encoding="utf-8") for home in ("/tmp", "/home", "/root", "/Users"))
