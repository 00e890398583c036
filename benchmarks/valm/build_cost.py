"""What `valm kb build` and `valm kb index` spend on a CPU, and other ways to compute the same.

    python -m benchmarks.valm.build_cost
    python -m benchmarks.valm.build_cost --clip CLIP --pictures FOLDER --text FILE.jsonl

The first command times the image tower of ViT-B/32, with random weights, in four ways; and what an inverted file
does for each vector, in k-means as when it is filled: find the nearest cell. Times are of one thread's processor. The
second says how many of the images of the tokens of a text stay the same where a trained CLIP encodes them in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.valm.thread_time import thread_seconds
from valm.clip import Clip
from valm.knowledge_base.images import read_image
from valm.retrieval.context import QUERIES, ContextEncoder
from valm.retrieval.index_factory import import_faiss
from valm.retrieval.index_tuning import recall
from valm.retrieval.int8_linear import Int8Linear
from valm.tokenizer import padded
from valm_kernels import FlatIPIndex, ip_topk

IMAGES = 32
K = 4
# Cells, numbers in a vector, vectors. The default index of a million images has cells of the first size.
SIZES = ((4096, 256, 8192), (4096, 768, 8192), (32768, 768, 1024))


class Int8Attention(torch.nn.Module):
    """`torch.nn.MultiheadAttention` with linear layers in int8."""

    def __init__(self, attention: torch.nn.MultiheadAttention):
        super().__init__()
        self.heads = attention.num_heads
        self.linear_in = Int8Linear(attention.in_proj_weight, attention.in_proj_bias)
        self.linear_out = Int8Linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, states: Tensor, *_: Tensor, **__: object) -> tuple[Tensor, None]:
        q, k, v = self.linear_in(states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.linear_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


def in_int8(clip: Clip) -> Clip:
    """`clip` with the linear layers of its image tower's blocks in int8."""
    model = copy.deepcopy(clip.model)
    for block in model.visual.transformer.resblocks:
        block.attn = Int8Attention(block.attn)
        for name in ("c_fc", "c_proj"):
            linear = getattr(block.mlp, name)
            setattr(block.mlp, name, Int8Linear(linear.weight, linear.bias))
    return Clip(model, clip.tokenizer, clip.model_cfg)


def in_bfloat16(clip: Clip, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return clip.encode_images(images)


def image_tower() -> None:
    torch.manual_seed(0)
    clip = Clip.create("ViT-B-32")
    images = torch.randn(IMAGES, 3, 224, 224)

    print(f"image tower of ViT-B/32, {IMAGES} images at once:")
    exact = clip.encode_images(images)
    ways = {"float32": lambda: clip.encode_images(images), "bfloat16 (autocast)": lambda: in_bfloat16(clip, images)}
    half = Clip(copy.deepcopy(clip.model).bfloat16(), clip.tokenizer, clip.model_cfg)
    ways["bfloat16 (weights)"] = lambda: half.encode_images(images)
    if torch.cpu._is_vnni_supported():
        rounded = in_int8(clip)
        ways["int8"] = lambda: rounded.encode_images(images)
    for name, encode in ways.items():
        cosine = (encode() * exact).sum(1).min()
        print(f"  {name}: {IMAGES / thread_seconds(encode):.1f} images a second, cosine {cosine:.5f}", flush=True)


def same_images(clip: Clip, pictures: Path, text: Path) -> None:
    files = sorted(file for file in pictures.iterdir() if file.is_file())
    float32, bfloat16 = [], []
    for start in range(0, len(files), IMAGES):
        images = torch.stack([clip.transform(read_image(file)) for file in files[start : start + IMAGES]])
        float32.append(clip.encode_images(images))
        bfloat16.append(in_bfloat16(clip, images))
    vectors, rounded = torch.cat(float32), torch.cat(bfloat16)
    print(f"{len(vectors):,} images in bfloat16: mean cosine {(vectors * rounded).sum(1).mean():.5f}")
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    for query in QUERIES:
        encoder = ContextEncoder(clip, query=query)
        ids, mask = padded(encoder.tokenizer(texts)["input_ids"])
        queries = encoder(ids, mask)[mask.bool()]
        before, after = (ip_topk(queries, each.half(), K).indices for each in (vectors, rounded))
        print(f'  "{query}": {recall(after, before):.3f} of the {K} images of {len(queries):,} tokens')


def nearest_cell(cells: int, dim: int, count: int) -> None:
    faiss = import_faiss()
    generator = np.random.default_rng(0)
    near = generator.standard_normal((3000, dim), dtype=np.float32)[generator.integers(0, 3000, cells + count)]
    rows = near + 0.5 * generator.standard_normal(near.shape, dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    flat = faiss.IndexFlatL2(dim)
    flat.add(rows[:cells])
    centroids, vectors = torch.from_numpy(rows[:cells]), torch.from_numpy(rows[cells:])
    # the nearest centroid has the largest inner product less half of its square
    offset = -centroids.square().sum(1) / 2
    exact = FlatIPIndex(torch.cat([centroids, offset[:, None]], 1), dtype="float32")
    wide = torch.cat([vectors, vectors.new_ones(count, 1)], 1)
    rounded = centroids.T.bfloat16().contiguous()
    ways = {
        "faiss IndexFlatL2": lambda: torch.from_numpy(flat.search(rows[cells:], 1)[1][:, 0]),
        "torch float32": lambda: torch.cat(
            [torch.addmm(offset, part, centroids.T).argmax(1) for part in vectors.split(256)]
        ),
        "torch bfloat16": lambda: torch.cat(
            [(part.bfloat16() @ rounded).float().add_(offset).argmax(1) for part in vectors.split(256)]
        ),
        "FlatIPIndex": lambda: exact.search(wide, 1).indices[:, 0],
    }
    print(f"nearest of {cells:,} cells of {dim} numbers:")
    truth = ways["faiss IndexFlatL2"]()
    for name, find in ways.items():
        same = (find() == truth).float().mean()
        print(
            f"  {name}: {1e6 * thread_seconds(find) / count:.0f} us a vector, the same cell for {same:.4f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--text", type=Path, help="JSON lines with a text each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.clip is not None:
        same_images(Clip.load(arguments.clip), arguments.pictures, arguments.text)
        return
    import_faiss().omp_set_num_threads(1)
    for size in SIZES:
        nearest_cell(*size)
    image_tower()


if __name__ == "__main__":
    main()
