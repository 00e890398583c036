import os
import shutil
import signal
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from tests.valm.killed import exit_code, forked, needs_fork
from tests.valm.other_tokenizers import gpt2_like
from tests.valm.retrieval.indexed import (
    COUNT,
    K,
    make_index,
    make_indexed,
    make_kb_of_directions,
    queries,
    slow,
    spoil,
)
from tests.valm.tiny_clip import TEXTS
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval import index_filling, index_tuning
from valm.retrieval.context import ContextEncoder
from valm.retrieval.faiss_index import FaissIndex, open_index, remove_index, verify_index
from valm.retrieval.index_parameters import choose_factory, index_parameters
from valm.retrieval.index_tuning import captions, context_queries, recall
from valm_kernels import FlatIPIndex
from valm_kernels.atomic_files import folder_lock

faiss = pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")


@pytest.fixture
def kb(clip, tmp_path):
    return make_kb_of_directions(clip, tmp_path / "kb", caption="a red apple\nthe blue sky")


@pytest.mark.parametrize(
    "factory",
    [
        *("IVF32,Flat", "PCA8,IVF32,PQ8x4fs", "IVF32_HNSW8,SQ8", "HNSW8,SQ8", "SQ8"),
        *map(slow, ("IVF32,SQ8", "OPQ8,IVF16,PQ8x4fs", "HNSW8")),
    ],
)
def test_the_target_recall_is_reached_and_told(kb, factory):
    index = make_index(kb, queries(kb), factory, target_recall=0.9, asked="directions")
    parameters = index.parameters
    asked = queries(kb, seed=2)
    found = index.search(asked, K)
    reached = recall(found.indices, FlatIPIndex(kb.vectors()).search(asked, K).indices)
    # 1,600 and 800 pictures were looked for: a standard deviation of the difference of two shares of 0.9 is 0.013
    assert reached > 0.9 - 0.04
    assert abs(parameters.recall - reached) < 0.04
    assert parameters.recall >= parameters.target == 0.9
    assert parameters.trained_on == (0 if factory == "HNSW8" else COUNT)
    assert (parameters.factory, parameters.queries, parameters.asked) == (factory, 200, "directions")
    tuned = {"IVF": "nprobe=", "HNSW": "efSearch=", "SQ8": ""}[next(n for n in ("IVF", "HNSW", "SQ8") if n in factory)]
    assert parameters.search.startswith(tuned) and (parameters.search == tuned) == (tuned == "")
    assert index_parameters(ImageKnowledgeBase.open(kb.path)) == parameters
    assert parameters.file["bytes"] == (kb.path / "index.faiss").stat().st_size


@pytest.mark.parametrize("target", [slow(0.7), 0.9])
def test_the_target_is_reached_on_queries_that_were_not_tuned_on(kb, target):
    """Whichever they are, and also where they are harder: of all directions, the others near those of the pictures."""
    for seed in range(1, 5):
        index = make_index(kb, queries(kb, 200, seed), "IVF64,Flat", target_recall=target)
        assert index.parameters.recall >= target
    hard = torch.nn.functional.normalize(torch.randn(100, kb.dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    mixed = torch.cat([queries(kb, 100), hard])
    index = make_index(kb, mixed, "IVF64,Flat", target_recall=target)
    assert index.parameters.recall >= target


def test_more_recall_is_a_longer_search(kb):
    less, more = (make_index(kb, queries(kb), "IVF64,Flat", target_recall=target) for target in (0.5, 0.99))
    assert int(less.parameters.search.removeprefix("nprobe=")) < int(more.parameters.search.removeprefix("nprobe="))
    assert less.parameters.recall < more.parameters.recall


def test_what_cannot_be_indexed_is_refused(kb):
    for count, factory, k, message in (
        (1, "IVF8,Flat", K, "needs at least 2 queries, .* got 1"),
        (400, "IVFFF", K, "faiss makes no index of 16 dimensions from the factory string 'IVFFF'"),
        (400, "IVF5000,Flat", K, "5,000 cells needs as many images, but the knowledge base has 3,000"),
        (400, "Flat", 1025, "k must be from 1 to 1,024, got 1,025: a search returns no more of "),
        (400, "IDMap,Flat", K, "faiss cannot fill an index of the factory string 'IDMap,Flat': "),
    ):
        with pytest.raises(ValmError, match=message):
            make_index(kb, queries(kb, count), factory, k=k)
    assert not list(kb.path.glob("*.partial"))
    assert isinstance(open_index(kb), FlatIPIndex)


def test_what_does_not_reach_the_target_leaves_the_index_that_was_there(kb, monkeypatch):
    make_index(kb, queries(kb), "IVF16,Flat", target_recall=0.5)
    before = {file.name: file.read_bytes() for file in kb.path.iterdir()}
    monkeypatch.setattr("valm.retrieval.index_tuning.CANDIDATES", (1,))
    with pytest.raises(ValmError, match=r"finds at most 0\.\d+ of .* The target 0\.99 needs finer codes"):
        make_index(kb, queries(kb), "IVF16,PQ1x4", target_recall=0.99)
    assert {file.name: file.read_bytes() for file in kb.path.iterdir() if file.suffix != ".partial"} == before
    # for a lower target nothing is made again
    monkeypatch.setattr(index_filling.NearestCell, "__call__", lambda *_: pytest.fail("made again"))
    make_index(kb, queries(kb), "IVF16,PQ1x4", target_recall=0.01)
    assert not list(kb.path.glob("*.partial"))


@pytest.mark.parametrize(
    "factory", [slow("IVF16,PQ8x4"), "PCA8,IVF16,Flat", slow("PCA8,IVF32_HNSW8,SQ8"), "PCA8,IVF32,PQ8x4fs"]
)
def test_an_interrupted_build_loses_a_part(clip, tmp_path, monkeypatch, factory):
    monkeypatch.setattr(index_filling, "ROWS", 1500)
    monkeypatch.setattr(index_filling, "MIN_PART", 1500)
    calls, stops = [], set()
    search = index_filling.NearestCell.__call__

    def interrupted(nearest, vectors):
        calls.append(len(vectors))
        if len(calls) in stops:
            raise KeyboardInterrupt
        return search(nearest, vectors)

    monkeypatch.setattr(index_filling.NearestCell, "__call__", interrupted)
    kb = make_kb_of_directions(clip, tmp_path / "kb")
    make_index(kb, queries(kb), factory, target_recall=0.5)
    assert calls == [1500] * 2
    expected, calls[:] = (kb.path / "index.faiss").read_bytes(), []
    kb = make_kb_of_directions(clip, tmp_path / "again")
    stops |= {1, 3}
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            make_index(kb, queries(kb), factory, target_recall=0.5)
    make_index(kb, queries(kb), factory, target_recall=0.5)
    assert len(calls) == 4
    assert (kb.path / "index.faiss").read_bytes() == expected


def test_the_nearest_cells_are_those_that_faiss_finds():
    generator = np.random.default_rng(0)
    centroids = generator.normal(size=(300, 24)).astype(np.float32) * generator.uniform(0.2, 3, (300, 1))
    vectors = generator.normal(size=(5000, 24)).astype(np.float32)
    index = faiss.IndexFlatL2(24)
    index.add(centroids)
    found = index_filling.NearestCell(centroids.astype(np.float32), torch.device("cpu"))(vectors)
    assert np.array_equal(found, index.search(vectors, 1)[1][:, 0])


@pytest.mark.parametrize("factory", ["IVF16,SQ8", slow("PCA8,IVF16,PQ8"), "IVF16,PQ8x4fs", "PCA8,IVF32,PQ4x4fsr_64"])
def test_the_index_is_what_faiss_makes_of_the_cells_and_codes(kb, tmp_path, factory):
    packed = tmp_path / "packed"
    file = index_filling.filled_index(kb, factory, tmp_path / "partial", packed, progress=False)
    assert (file == packed) == ("x4fs" in factory)
    filled = faiss.read_index(str(file))
    added = faiss.clone_index(filled)
    added.reset()
    added.add(kb.vectors().astype(np.float32))
    assert np.array_equal(faiss.serialize_index(filled), faiss.serialize_index(added))


@pytest.mark.parametrize("factory, parts", [("IVF16,Flat", [0, 1]), ("Flat", [1]), ("IVF16,PQ8x4fs", [0, 1, 1])])
def test_an_index_is_written_once_if_it_is_not_packed(kb, monkeypatch, factory, parts):
    """Beside once when it is trained."""
    written, write = [], index_filling._write_to
    monkeypatch.setattr(
        index_filling, "_write_to", lambda *what, **how: (written.append(what[1].ntotal), write(*what, **how))
    )
    make_index(kb, queries(kb), factory, target_recall=0.1)
    assert written == [part * len(kb) for part in parts]
    assert verify_index(kb) == [] and (kb.path / "index.faiss").stat().st_nlink == 1


def test_another_build_removes_what_a_killed_one_left(kb):
    left = kb.path / "index-0123456789abcdef.partial"
    left.touch()
    make_index(kb, queries(kb), "IVF16,Flat", target_recall=0.5)
    assert not list(kb.path.glob("*.partial"))


def interrupted(kb, monkeypatch, factory="PCA8,IVF16,SQ8", step=(index_tuning, "_exact")):
    """The partial file of a build that was interrupted when all vectors had been added, or at `step`, and how to go
    on."""

    def build():
        return make_index(kb, queries(kb), factory, target_recall=0.5)

    with monkeypatch.context() as patched:
        patched.setattr(*step, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build()
    (partial,) = kb.path.glob("*.partial")
    return partial, build


def flip(place, file):
    """Changes eight bytes, counted from the end if `place` is negative."""
    content = bytearray(file.read_bytes())
    place %= len(content)
    content[place : place + 8] = bytes(255 - byte for byte in content[place : place + 8])
    file.write_bytes(content)


STEPS = {
    "trained": (index_filling.NearestCell, "__call__"),
    "added": (index_tuning, "_exact"),
    "linked": (index_tuning, "write_json"),
}


@pytest.mark.parametrize("factory", ["PCA8,IVF16,SQ8", "IVF16,PQ8x4fs"])
def test_what_a_killed_build_leaves_makes_the_same_index(clip, tmp_path, monkeypatch, factory):
    """The knowledge base has the old index, none, or the new one, and what is done stays until the new one is whole."""
    kb = make_indexed(clip, tmp_path / "whole", factory=factory, target_recall=0.5)
    expected = {name: (kb.path / name).read_bytes() for name in ("index.faiss", "index.json")}
    for name, step in STEPS.items():
        kb = make_indexed(clip, tmp_path / name, factory="IVF8,Flat", target_recall=0.5)
        partial, build = interrupted(kb, monkeypatch, factory, step)
        assert faiss.read_index(str(partial)).ntotal == (0 if name == "trained" else COUNT)
        assert isinstance(open_index(kb), FlatIPIndex if name == "linked" else FaissIndex)
        with monkeypatch.context() as patched:
            if name != "trained":  # nothing is added again
                patched.setattr(index_filling, "_vectors", Mock(side_effect=AssertionError))
            build()
        assert {name: (kb.path / name).read_bytes() for name in expected} == expected
        assert not list(kb.path.glob("*.partial"))


def of_another_width(partial):
    other = faiss.index_factory(2000, "Flat")
    faiss.write_index(other, str(partial))


@pytest.mark.parametrize(
    "damage",
    [
        *(partial(flip, place) for place in (100, -40, -20)),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        of_another_width,
    ],
    ids=["near the beginning", "at the end of the index", "in the checksum", "truncated", "of another width"],
)
def test_a_damaged_partial_index_is_named_and_made_from_the_start(kb, monkeypatch, damage):
    expected = make_index(kb, queries(kb), "PCA8,IVF16,SQ8", target_recall=0.5)
    content = (kb.path / "index.faiss").read_bytes()
    remove_index(kb)
    file, build = interrupted(kb, monkeypatch)
    damage(file)
    with pytest.warns(
        UserWarning, match=rf"{file} of an interrupted build is damaged, so the index is made from the start"
    ):
        found = build()
    assert found.parameters == expected.parameters and (kb.path / "index.faiss").read_bytes() == content


def test_an_index_of_another_width_is_named(kb):
    make_index(kb, queries(kb), "IVF16,Flat", target_recall=0.5)
    file = kb.path / "index.faiss"
    size = file.stat().st_size
    faiss.write_index(faiss.index_factory(kb.dim + 1, "Flat"), str(file))
    file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    with pytest.raises(
        ValmError, match=rf"index.faiss contains 0 vectors of {kb.dim + 1} numbers, but .* {COUNT:,} of {kb.dim}"
    ):
        open_index(kb)


def test_a_link_out_of_the_folder_is_refused(kb, monkeypatch):
    partial, build = interrupted(kb, monkeypatch)
    shutil.move(partial, kb.path.parent / "elsewhere")
    partial.symlink_to(kb.path.parent / "elsewhere")
    with pytest.raises(PermissionError, match=rf"leads out of its folder.*{partial.name}"):
        build()


@pytest.mark.parametrize(
    "change",
    [{"factory": "IVF8,Flat"}, {"seed": 1}, {"fingerprint": "after kb add"}, {"MAX_TRAIN": 2000, "MIN_TRAIN": 2000}],
    ids=str,
)
def test_another_plan_has_a_file_of_its_own(kb, monkeypatch, change):
    one = index_filling.partial_file(kb, "IVF16,Flat", 0)
    for name in change.keys() & set(dir(index_filling)):
        monkeypatch.setattr(index_filling, name, change[name])
    kb.fingerprint = change.get("fingerprint", kb.fingerprint)
    assert one != index_filling.partial_file(kb, change.get("factory", "IVF16,Flat"), change.get("seed", 0))


def test_one_process_at_a_time_makes_an_index(kb, monkeypatch):
    monkeypatch.setattr(index_tuning, "WAIT_SECONDS", 0.1)
    with folder_lock(kb.path, 0), pytest.raises(TimeoutError, match="another"):
        make_index(kb, queries(kb), "IVF16,Flat")
    assert not list(kb.path.glob("*.tmp"))


@pytest.mark.parametrize(
    "factory", ["IVF16,Flat,RFlat", slow("IVF16,PQ4+4"), "PCA8,IVF16,SQ8,RFlat", "PCA4,IVF16,Flat"]
)
def test_all_kinds_are_filled(kb, factory):
    index = make_index(kb, queries(kb), factory, target_recall=0.3)
    assert len(index) == COUNT and index.parameters.recall > 0.3


def test_faiss_finds_cells_of_too_many_numbers(kb, monkeypatch):
    monkeypatch.setattr(index_filling, "MAX_DIM", kb.dim - 1)
    monkeypatch.setattr(index_filling.NearestCell, "__call__", lambda *_: pytest.fail("too many numbers"))
    assert len(make_index(kb, queries(kb), "IVF16,Flat", target_recall=0.5)) == COUNT


@pytest.mark.parametrize("sampled", [True, False])
def test_a_vector_that_is_no_number_is_not_indexed(kb, monkeypatch, sampled):
    rows = np.arange(COUNT)
    if not sampled:
        monkeypatch.setattr(index_filling, "training_rows", lambda kb, index: 1000)
        rows = np.setdiff1d(rows, np.random.default_rng(0).choice(COUNT, 1000, replace=False))
    spoil(kb, 0, rows[7])
    with pytest.raises(ValmError, match="is damaged: a vector is not finite; build it again"):
        make_index(ImageKnowledgeBase.open(kb.path), queries(kb), "IVF16,Flat")


def test_progress_names_every_step(kb, capfd):
    make_index(kb, queries(kb), "IVF16,Flat", target_recall=0.5, progress=True)
    bars = capfd.readouterr().err
    for name in ("train", "add", "search exactly"):
        assert f"{name}: 100%" in bars


@pytest.mark.parametrize("other", [False, True], ids=["CLIP's tokenizer", "another tokenizer"])
def test_queries_of_texts_are_context_queries(clip, tokenizer, other):
    encoder = ContextEncoder(clip, tokenizer=gpt2_like() if other else None)
    found = context_queries(encoder, ["", *TEXTS])
    rows = [encoder(torch.tensor([encoder.tokenizer(text)["input_ids"]]))[0] for text in TEXTS]
    assert rounded(found) < rounded(torch.cat(rows))
    assert len(found) == 16 < len(torch.cat(rows))  # eight of each text
    assert len(context_queries(encoder, TEXTS, count=7)) == 6
    assert not torch.cat(rows).any(1).all()  # a first token has no query
    assert context_queries(encoder, ["a red dog", "the sky"]).any(1).all()
    with pytest.raises(ValmError, match="no text"):
        context_queries(encoder, ["", "  "])
    with pytest.raises(ValmError, match="there is one text to make queries from"):
        context_queries(encoder, ["", "a dog"])


def test_a_query_ends_at_a_line_break_alone(clip, monkeypatch):
    read = []

    def prompt_ids(tokenizer, text):
        read.append(text)
        return tokenizer(text)["input_ids"]

    monkeypatch.setattr(index_tuning, "prompt_ids", prompt_ids)
    context_queries(ContextEncoder(clip), ["a\u2028dog\x0cruns\na cat", "the sky"])
    assert sorted(read) == ["a cat", "a\u2028dog\x0cruns", "the sky"]


def test_the_captions_of_a_picture_are_in_one_half_of_the_queries(clip):
    """Each read alone."""
    encoder = ContextEncoder(clip)
    pictures = ["the red apple\n\na dog", "two black cats\nyellow bus", "sky"]  # no two of them begin alike
    of_picture = [
        rounded(
            torch.cat([encoder(torch.tensor([ids]))[0, 1:] for ids in clip.tokenizer(text.split("\n"))["input_ids"]])
        )
        for text in pictures
    ]
    for seed in range(5):
        halves = context_queries(encoder, pictures, seed=seed).chunk(2)
        seen = [{place for place, known in enumerate(of_picture) if rounded(half) & known} for half in halves]
        assert all(seen) and not seen[0] & seen[1]


def rounded(queries):
    return {tuple(np.round(query.tolist(), 4)) for query in queries}


def test_captions(kb, clip, tmp_path):
    assert set(captions(kb)) == {"a red apple\nthe blue sky"}
    assert len(captions(kb, images=10)) == 10
    with pytest.raises(ValmError, match="have no captions to make queries from: give a text file as --queries"):
        captions(make_kb_of_directions(clip, tmp_path / "without"))


def test_factories_by_size():
    assert choose_factory(COUNT, 768) is None
    assert choose_factory(1_000_000, 128) == "IVF4096,PQ128x4fs"
    assert choose_factory(1_000_000, 768) == "PCA256,IVF4096,PQ256x4fs"
    assert choose_factory(20_000_000, 256) == "IVF16384,PQ256x4fs"
    assert choose_factory(1000, 768, "cuda") is None
    assert choose_factory(1_000_000, 128, "cuda") == "IVF4096,SQ8"
    assert choose_factory(1_000_000, 768, "cuda") == "PCA256,IVF4096,SQ8"
    assert choose_factory(20_000_000, 256, "cuda") == "OPQ64,IVF16384,PQ64"
    assert choose_factory(200_000_000, 768, "cuda") == choose_factory(200_000_000, 768) == "OPQ64,IVF65536,PQ64"


def test_an_index_made_again_is_the_same_one(clip, tmp_path):
    """To the byte: the plan of a retrieval names it, and one that was begun goes on with it."""
    kb = make_indexed(clip, tmp_path / "kb", factory="IVF16,PQ8x4fs", target_recall=0.5)
    before = {name: (kb.path / name).read_bytes() for name in ("index.faiss", "index.json")}
    for _ in range(3):
        make_index(kb, queries(kb), "IVF16,PQ8x4fs", target_recall=0.5)
        assert {name: (kb.path / name).read_bytes() for name in before} == before


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("full_at", ["index-", "index.faiss"])
def test_a_full_disk_leaves_the_old_index(clip, tmp_path, monkeypatch, full_at):
    """At the file of what is done, or at the index itself, whose codes are packed."""
    resource = pytest.importorskip("resource")
    kb = make_indexed(clip, tmp_path / "kb", factory="IVF16,Flat")
    before = {file.name: file.read_bytes() for file in kb.path.iterdir()}
    if full_at == "index.faiss":
        interrupted(kb, monkeypatch, "IVF8,PQ8x4fs")

    def build():
        factory = "IVF8,PQ8x4fs" if full_at == "index.faiss" else "IVF8,Flat"
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() reports EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            make_index(kb, queries(kb), factory, target_recall=0.1)
        except (ValmError, OSError) as error:
            os._exit(3 if str(kb.path / full_at) in str(error) else 4)

    assert exit_code(forked(build)) == 3
    assert {file.name: file.read_bytes() for file in kb.path.iterdir() if file.suffix != ".partial"} == before


def test_a_vector_that_is_no_number_is_damage(clip, tmp_path):
    kb = make_indexed(clip, tmp_path / "kb", factory="IVF16,Flat")
    for shard in range(3):
        spoil(kb, shard, slice(None))
    damaged = ImageKnowledgeBase.open(kb.path)
    message = "is damaged: .*finite; build it again|is damaged: .*NaN.*; build it again"
    with pytest.raises(ValmError, match=message):
        FaissIndex.open(damaged).search(queries(kb)[:2], 2)
    remove_index(damaged)
    with pytest.raises(ValmError, match=message):
        open_index(damaged)
