"""Asks a model one question three times: with the images that it finds, with random images, and without images.

make demo
python examples/images_on_and_off.py demo-output/valm
"""

from __future__ import annotations

import argparse

import torch

import valm
from valm.errors import ValmError
from valm.evaluation.controls import switch_images

SHOWN = 3


@torch.no_grad()
def likeliest(model, tokenizer, ids: torch.Tensor) -> str:
    """The likeliest next words, with their probabilities."""
    probabilities = model(ids).logits[0, -1].softmax(-1)
    best = probabilities.topk(SHOWN)
    return ", ".join(
        f"{tokenizer.decode(token).strip()} {share:.2f}"
        for share, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a checkpoint with images")
    parser.add_argument("--question", default="the color of the banana is")
    arguments = parser.parse_args()
    try:
        model, tokenizer = valm.load(arguments.model, strict=True)
    except ValmError as error:
        raise SystemExit(f"error: {error}") from error
    ids = tokenizer(arguments.question, return_tensors="pt").input_ids
    retriever = model.retriever
    if retriever is None:
        raise SystemExit(f"error: {arguments.model} retrieves no images")
    found = retriever(ids)
    last = found.image_ids[found.image_index[0, -1]].tolist()  # the images of the last token
    print("images found:", "; ".join(retriever.kb.item(image).caption or "-" for image in last))
    for name, retrieval in (("found", "on"), ("random", "random"), ("none", "off")):
        model.set_retriever(retriever)
        switch_images(model, retrieval)
        print(f"{name:>6}: {likeliest(model, tokenizer, ids)}")


if __name__ == "__main__":
    main()
