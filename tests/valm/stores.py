"""One small store of each kind in one folder, for tests that damage them or open them with little memory."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests.valm.killed import exit_code_if_killed
from tests.valm.models import model_of
from tests.valm.other_tokenizers import gpt2_like
from valm.clip.clip import Clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.corpus.retrieved import CorpusRetrieval, retrieve_corpus
from valm.corpus.texts import read_documents
from valm.knowledge_base.build import build
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.checkpoint import save_checkpoint
from valm.retrieval.context import ContextEncoder
from valm.retrieval.index_tuning import build_index, captions, context_queries
from valm.retrieval.retriever import Retriever
from valm.retrieval.source import RetrievalSource
from valm_kernels import FlatIPIndex

PICTURES, K, SHARD = 20, 2, 8
COLORS = ["red", "green", "blue", "yellow", "grey"]
THINGS = ["apple", "bus", "boat", "lemon"]
CORPUS = """\
a red apple lies on the wooden table. the sky is blue!
two dogs run; she said "look at the yellow bus."

is the grass green?
a small boat, a lemon, and 12 black cats.
the grey boat is not a brown bus, and the apple is green: it is no lemon at all, she said, and ran to the red boat.
blue
"""
# Smaller than `tiny_clip`, because some tests load its weights thousands of times.
CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "mlp_ratio": 1},
    "text_cfg": {"context_length": 20, "width": 8, "heads": 1, "layers": 2, "mlp_ratio": 1},
}
SIZES = {"n_embd": 8, "n_inner": 16, "n_layer": 2, "n_head": 1, "image_dim": CLIP["embed_dim"]}
# A process is killed after so many finished files: in the second shard.
KILLED_AFTER = 4


def make_stores(out: Path) -> Path:
    """Writes pictures, corpus.txt, clip, kb with an index, and corpus, the last two also unfinished. Writes the models
    valm, gpt2 and blind, and in flat an index of each dtype with its queries.npy."""
    make_pictures(out / "pictures")
    (out / "corpus.txt").write_text(CORPUS)
    torch.manual_seed(0)
    Clip.create(CLIP, prune_tokenizer(clip_tokenizer(), CORPUS.splitlines()), name="tiny").save(out / "clip")
    clip = Clip.load(out / "clip")
    kb = build_kb(out, out / "kb")
    killed(lambda: build_kb(out, out / "kb-unfinished"))
    queries = context_queries(ContextEncoder(clip), captions(kb))
    build_index(kb, queries, "IVF4,PQ8x4fs", k=K, target_recall=0, progress=False)
    other = gpt2_like(CORPUS.splitlines(), vocab_size=265)
    retriever = Retriever(ContextEncoder(clip, tokenizer=other), kb, K)
    retrieve(out, retriever, out / "corpus")
    killed(lambda: retrieve(out, retriever, out / "corpus-unfinished"))
    save_model(out / "valm", clip.tokenizer, RetrievalSource.of_knowledge_base(kb, "eot"), num_images=K)
    save_model(out / "gpt2", other, None, num_images=0)
    save_model(out / "blind", other, RetrievalSource.of_knowledge_base(kb, "state"), num_images=1, blind=True)
    save_flat_indexes(out / "flat")
    return out


def build_kb(stores: Path, out: Path) -> ImageKnowledgeBase:
    """The knowledge base of the pictures in `stores`; finishes a build that was killed."""
    source = FolderSource(stores / "pictures", shard_size=SHARD)
    return build(source, out, Clip.load(stores / "clip"), Encoding(batch_size=8, thumbnails=8), progress=False)


def make_pictures(out: Path) -> None:
    """Single-colour pictures with captions; one picture and one caption file are damaged."""
    out.mkdir()
    random = np.random.default_rng(0)
    texts: dict[str, str | list[str]] = {}
    for number in range(PICTURES):
        name = f"{number:02d}.png"
        Image.new("RGB", (16, 12), tuple(random.integers(0, 256, 3).tolist())).save(out / name)
        texts[name] = f"a {COLORS[number % len(COLORS)]} {THINGS[number // len(COLORS)]}"
    texts["03.png"] = ["a yellow apple", "a naïve café"]
    (out / "captions.json").write_text(json.dumps(texts), encoding="utf-8")
    (out / "05.json").write_text('{"caption": \n')
    (out / "damaged.png").write_bytes((out / "00.png").read_bytes()[:40])


def retrieve(stores: Path, retriever: Retriever, out: Path) -> CorpusRetrieval:
    return retrieve_corpus(read_documents([stores / "corpus.txt"]), retriever, out, part_bytes=100, progress=False)


def save_model(
    out: Path, tokenizer: PreTrainedTokenizerFast, source: RetrievalSource | None, **options: object
) -> None:
    model = model_of(tokenizer, **SIZES, **options)
    if source is not None:
        model.finder.set_source(source)
    save_checkpoint(model, tokenizer, out)
    (out / "README.md").unlink()  # the model card, which nothing loads


def save_flat_indexes(out: Path) -> None:
    """An index over rows of which some are equal."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(40, 10)).astype(np.float32)
    rows[[7, 20]] = rows[3]
    out.mkdir()
    np.save(out / "queries.npy", np.concatenate([random.normal(size=(3, 10)).astype(np.float32), rows[3:4]]))
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        FlatIPIndex(rows, dtype=dtype).save(out / dtype)


def killed(function: Callable[[], object]) -> None:
    assert exit_code_if_killed(function, KILLED_AFTER) == -signal.SIGKILL
