"""Queries, images and documents of tiny texts, which must stay equal unless a change intends otherwise.

    python -m tests.record.retrieval    # writes tests/record/retrieval.safetensors with the current code

They were recorded at commit ad5fab6, the vectors at cb7a91eb. Files are not recorded, because their format may change.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tests.record.drawn import draw, save
from tests.valm.other_tokenizers import chat_like, gpt2_like, llama_like
from tests.valm.tiny_clip import TEXTS, TINY
from valm.clip.clip import Clip
from valm.clip.tokenizer import clip_tokenizer, padded, prompt_ids, prune_tokenizer
from valm.corpus.retrieved import retrieve_corpus
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.embeddings import EmbeddingSource
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever, Retriever

OUTPUTS = Path(__file__).with_name("retrieval.safetensors")
TOKENIZERS = {"clip": lambda: None, "gpt2": gpt2_like, "chat": chat_like, "llama": llama_like}
LINES = [*TEXTS, "a dog.", TEXTS[1] + " " + TEXTS[0], "blue grass", "naïve café ☕ bananas"]
K = 4


def tiny_clip() -> Clip:
    clip = Clip.create(TINY, prune_tokenizer(clip_tokenizer(), TEXTS), name="tiny")
    draw(clip.model)
    return clip


def write_embeddings(folder: Path) -> EmbeddingSource:
    numbers = np.random.RandomState(0)
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for part, rows in enumerate((30, 17)):
        np.save(folder / "img_emb" / f"img_emb_{part}.npy", numbers.standard_normal((rows, 16)).astype(np.float16))
        table = {"url": [f"u{part}/{row}" for row in range(rows)], "caption": [f"c{row}" for row in range(rows)]}
        pq.write_table(pa.table(table), folder / "metadata" / f"metadata_{part}.parquet")
    return EmbeddingSource(folder)


def outputs(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for everything that is recorded; works in the empty `folder`."""
    clip = tiny_clip()
    kb = build(write_embeddings(folder / "embeddings"), folder / "kb", clip, progress=False)
    yield "vectors", torch.from_numpy(np.array(kb.vectors()))
    for name, make in TOKENIZERS.items():
        for query in ("eot", "state"):
            encoder = ContextEncoder(clip, tokenizer=make(), query=query, dtype=torch.float64)
            ids, mask = padded([prompt_ids(encoder.tokenizer, line) for line in LINES])
            yield f"{name}/{query}/queries", encoder(ids, mask)
            found, scores = Retriever(encoder, kb, K).find(ids, mask)
            yield f"{name}/{query}/ids", found
            yield f"{name}/{query}/scores", scores
            blind = BlindRetriever(encoder)(ids, mask)
            yield (
                f"{name}/{query}/own queries",
                blind.image_pool[blind.image_index.clamp(min=0)] * mask[..., None, None],
            )
        corpus = retrieve_corpus(LINES, Retriever(encoder, kb, K), folder / f"corpus-{name}", progress=False)
        for document in range(len(corpus)):
            for key, values in corpus[document].items():
                yield f"{name}/document {document}/{key}", torch.from_numpy(np.array(values))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(dict(outputs(Path(folder))), OUTPUTS)


if __name__ == "__main__":
    main()
