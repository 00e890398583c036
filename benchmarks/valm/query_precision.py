"""How many tokens get other images if the text encoder runs in 16 or 8 bits, or reads a text in a batch.

    python -m benchmarks.valm.query_precision KB... --captions CAPTIONS     # knowledge bases whose CLIPs are at hand

The texts are glosses of WordNet (from timm), LAMBADA (from VALM_EVAL_DATA) and the captions of Flickr8k's captions.txt.
For each precision and kind of query the table gives two shares of tokens: those whose K images differ from float32's,
and those whose images in a batch of 8 texts differ from the text alone. Search is exact.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.valm.inputs import evaluation_texts
from studies.color.words import wordnet
from valm.clip.tokenizer import padded
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import QUERIES, ContextEncoder
from valm_kernels import FlatIPIndex

K = 4
TEXTS = 256
BATCH = 8
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def texts(captions: Path) -> dict[str, list[str]]:
    """TEXTS texts of each kind, at equal distances in their source."""
    with captions.open(newline="") as file:
        sources = {
            "glosses": [synset.gloss for synset in wordnet()],
            "prose": evaluation_texts("lambada"),
            "captions": [row["caption"] for row in csv.DictReader(file)],
        }
    return {kind: source[:: len(source) // TEXTS][:TEXTS] for kind, source in sources.items()}


def images(encoder: ContextEncoder, index: FlatIPIndex, documents: list[list[int]], rows: int) -> Tensor:
    """The K images (n, K) of each token but the first of `documents`, in ascending order, read `rows` at a time."""
    found = []
    for first in range(0, len(documents), rows):
        ids, mask = padded(documents[first : first + rows])
        asked = mask.bool()
        asked[:, 0] = False
        found.append(index.search(encoder(ids, mask)[asked], K).indices)
    return torch.cat(found).sort().values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kb", nargs="+", help="folder of a knowledge base")
    parser.add_argument("--captions", type=Path, required=True, help="of Flickr8k: a table with the column caption")
    arguments = parser.parse_args()
    for place in arguments.kb:
        kb = ImageKnowledgeBase.open(place)
        clip, index = kb.load_clip(), FlatIPIndex(torch.tensor(kb.vectors(), dtype=torch.float32))
        print(f"{place}: {len(kb)} images, K {K}, {torch.get_num_threads()} threads")
        print(f"{'texts':<9} {'tokens':>6} {'query':<6} {'precision':<9} {'other':>7} {'in a batch':>10}")
        for kind, some in texts(arguments.captions).items():
            documents = clip.tokenizer(some)["input_ids"]
            for query in QUERIES:
                exact = images(ContextEncoder(clip, query=query), index, documents, 1)
                for dtype in DTYPES:
                    encoder = ContextEncoder(clip, query=query, dtype=dtype)
                    alone, batched = (images(encoder, index, documents, rows) for rows in (1, BATCH))
                    shares = (
                        (found != other).any(1).float().mean() for found, other in ((alone, exact), (batched, alone))
                    )
                    other, changed = (share.item() for share in shares)
                    name = str(dtype).removeprefix("torch.")
                    print(f"{kind:<9} {len(exact):>6} {query:<6} {name:<9} {other:7.2%} {changed:10.2%}", flush=True)


if __name__ == "__main__":
    main()
