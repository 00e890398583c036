"""Whether a text's images depend on how it is read: alone, in a batch, as a prefix, or token by token.

    python -m benchmarks.valm.tower_noise KB TEXT        # a knowledge base whose CLIP is at hand; lines of text

Read in another way, a query differs by the roundings of the text tower. eps is the most by which that raised the score
of any image over that of one of a token's K. Search is exact, so no image can change where the scores of the K-th and
the next one are further apart. The table has eps for each precision and kind of query, the share of tokens whose scores
are closer, and the share whose images did change; one that changed beyond eps would be an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import QUERIES, ContextEncoder
from valm_kernels import FlatIPIndex

K = 4
TOKENS = 64
ROWS = 32
# Tokens whose scores of all images are in memory at once.
AT_ONCE = 256
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def readings(encoder: ContextEncoder, ids: Tensor) -> Iterator[Tensor]:
    """Queries (B, T, E) of the same text, read in each way; alone comes first."""
    yield torch.cat([encoder(row[None]) for row in ids])
    together = encoder(ids)
    yield together
    half = ids.shape[1] // 2
    yield torch.cat([encoder(ids[:, :half]), together[:, half:]], dim=1)
    cache = encoder.new_cache(len(ids))
    yield torch.cat([encoder.step(token, cache) for token in ids.split(1, dim=1)], dim=1)


def measured(encoder: ContextEncoder, ids: Tensor, index: FlatIPIndex, vectors: Tensor) -> tuple[float, float, float]:
    """eps, the share of tokens whose scores are closer, and the share whose images changed."""
    alone, *others = (queries.flatten(0, 1) for queries in readings(encoder, ids))
    nearest = index.search(alone, K + 1).indices  # (n, K + 1)
    eps = 0.0
    for queries in others:
        for change, found in zip((queries - alone).split(AT_ONCE), nearest.split(AT_ONCE), strict=True):
            raised = change @ vectors.T  # (AT_ONCE, N)
            eps = max(eps, (raised.amax(1) - raised.gather(1, found[:, :K]).amin(1)).max().item())
    eps += 4 * torch.finfo(torch.float32).eps  # of the scores that are compared
    scores = torch.einsum("ne,nke->nk", alone.double(), vectors[nearest].double())
    gap = scores[:, K - 1] - scores[:, K]
    expected = nearest[:, :K].sort().values
    changed = torch.zeros(len(alone), dtype=torch.bool)
    for queries in others:
        changed |= (index.search(queries, K).indices.sort().values != expected).any(-1)
    if (changed & (gap > eps)).any():
        raise SystemExit("images changed where their scores are further apart than eps")
    return eps, (gap <= eps).float().mean().item(), changed.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kb", help="folder of a knowledge base")
    parser.add_argument("text", type=Path, help="file of lines")
    arguments = parser.parse_args()
    kb = ImageKnowledgeBase.open(arguments.kb)
    clip = kb.load_clip()
    tokens = clip.tokenizer(arguments.text.read_text(), add_special_tokens=False)["input_ids"]
    rows = min(ROWS, len(tokens) // TOKENS)
    if rows < 2:
        raise SystemExit(f"{arguments.text} has {len(tokens)} tokens, fewer than two rows of {TOKENS}")
    ids = torch.tensor(tokens[: rows * TOKENS]).reshape(rows, TOKENS)
    vectors = torch.tensor(kb.vectors(), dtype=torch.float32)
    index = FlatIPIndex(vectors)
    print(f"{ids.numel()} tokens, {len(kb)} images, K {K}, {torch.get_num_threads()} threads")
    print(f"{'precision':<10} {'query':<6} {'eps':>8} {'closer':>8} {'changed':>8}")
    for dtype in DTYPES:
        if dtype == torch.int8 and not torch.cpu._is_vnni_supported():
            continue
        for query in QUERIES:
            eps, closer, changed = measured(ContextEncoder(clip, query=query, dtype=dtype), ids, index, vectors)
            print(f"{str(dtype).removeprefix('torch.'):<10} {query:<6} {eps:8.1e} {closer:8.2%} {changed:8.2%}")


if __name__ == "__main__":
    main()
