"""valm generate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valm.cli.kb import shortened
from valm.cli.options import (
    Commands,
    above_zero,
    add_json,
    add_opening,
    command,
    opening,
    positive,
    print_json,
    seed,
    share,
)
from valm.errors import ValmError
from valm.text import printable, split_lines

if TYPE_CHECKING:
    from torch import Tensor

# Images that are listed below a text; --json has all.
IMAGES_SHOWN = 8


def add_to(commands: Commands) -> None:
    generate = command(commands, "generate", run_generate, "continue a text, and list the images that were seen")
    generate.add_argument("model", type=Path, help="checkpoint folder")
    generate.add_argument("prompt", nargs="?", help="the text to continue")
    generate.add_argument("--prompts", type=Path, metavar="FILE", help="texts to continue, one a line; - reads stdin")
    generate.add_argument("--max-new-tokens", type=positive, default=20, help="how many tokens are added at most")
    generate.add_argument("-k", type=positive, help="images a token sees (default: as the model was trained)")
    generate.add_argument(
        "--temperature",
        type=above_zero,
        help="draw tokens instead of taking the likeliest: at 1 by the model's own probabilities, more boldly above",
    )
    generate.add_argument("--top-p", type=share, help="draw from the likeliest tokens of this share of probability")
    generate.add_argument("--seed", type=seed, default=0, help="of what is drawn, for each prompt anew")
    add_json(generate)
    add_opening(generate)


def run_generate(arguments: argparse.Namespace) -> None:
    prompts = chosen_prompts(arguments)
    model, tokenizer = opening(arguments).load(arguments.model)
    if arguments.k is not None:
        model.set_num_images(arguments.k)
    results = []
    for prompt in prompts:
        result = generated(model, tokenizer, prompt, arguments)
        if arguments.json:
            results.append(result)
        else:
            print_result(result)
    if arguments.json:
        print_json(results)


def chosen_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompt, or the lines of --prompts that have a text.

    Raises:
        ValmError: not exactly one of the two is given, or there is no text.
    """
    from valm.store.files import read_text

    if (arguments.prompt is None) == (arguments.prompts is None):
        raise ValmError("give either a prompt or --prompts FILE")
    if arguments.prompt is not None:
        return [arguments.prompt]
    text = sys.stdin.read() if str(arguments.prompts) == "-" else read_text(arguments.prompts)
    prompts = [line for line in split_lines(text) if line.strip()]
    if not prompts:
        where = "standard input" if str(arguments.prompts) == "-" else arguments.prompts
        raise ValmError(f"{where} has no prompt: give one a line")
    return prompts


def generated(model: Any, tokenizer: Any, text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The prompt, its continuation, and for each new token the images that the token before it saw, best first."""
    import torch

    from valm.clip.tokenizer import prompt_ids
    from valm.evaluation.scoring import context_length
    from valm.model.sampling import keep_ends_alone, sampling_options

    keep_ends_alone(model)
    prompt = torch.tensor([prompt_ids(tokenizer, text)], device=model.device)
    context = context_length(model)
    # in a context too small for both, the prompt gets at least half
    room = max(context - arguments.max_new_tokens, context // 2)
    if prompt.shape[1] > room:
        prompt = without_middle(prompt, room)
        print(
            f"the model reads {context} tokens: the prompt is cut to its first token and its last {room - 1}",
            file=sys.stderr,
        )
    if prompt.shape[1] + arguments.max_new_tokens > context:
        room = context - prompt.shape[1]
        print(f"the model reads {context} tokens: the continuation has {room} at most", file=sys.stderr)
    drawn = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    drawn = {name: value for name, value in drawn.items() if value is not None}
    torch.manual_seed(arguments.seed)
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(arguments.max_new_tokens, context - prompt.shape[1]),
        num_beams=1,
        **sampling_options(bool(drawn), **drawn),
    )
    images = images_of(model, tokens)[prompt.shape[1] - 1 : -1]
    new = tokens[0, prompt.shape[1] :].tolist()
    return {
        "prompt": text,
        "text": tokenizer.decode(tokens[0], skip_special_tokens=True),
        "tokens": [
            {"token": "(end)" if id == tokenizer.eos_token_id else tokenizer.decode([id]).strip(), "images": seen}
            for id, seen in zip(new, images, strict=True)
        ],
    }


def images_of(model: Any, tokens: Tensor) -> list[list[dict[str, Any]]]:
    """The images of each of `tokens` (1, T), best first; none for a model without a knowledge base."""
    from valm.retrieval.retriever import Retriever

    retriever = model.retriever
    if not isinstance(retriever, Retriever):
        return [[] for _ in range(tokens.shape[1])]
    ids, scores = (found[0].tolist() for found in retriever.find(tokens))  # (T, K)
    items = {id: retriever.kb.item(id) for id in {id for seen in ids for id in seen} - {-1}}
    return [
        [
            {"id": id, "score": score, "uri": items[id].uri, "caption": items[id].caption}
            for id, score in zip(of_token, of_scores, strict=True)
            if id >= 0
        ]
        for of_token, of_scores in zip(ids, scores, strict=True)
    ]


def print_result(result: dict[str, Any]) -> None:
    """Prints the text and, below it, the images by how many tokens saw them."""
    print(result["text"])
    images: dict[int, dict[str, Any]] = {}
    for token in result["tokens"]:
        for image in token["images"]:
            seen = images.setdefault(image["id"], {**image, "tokens": []})
            seen["score"] = max(seen["score"], image["score"])
            seen["tokens"].append(token["token"])
    ordered = sorted(images.values(), key=lambda image: (-len(image["tokens"]), -image["score"]))
    for image in ordered[:IMAGES_SHOWN]:
        caption = (image["caption"].splitlines() or [""])[0]
        words = printable(" ".join(image["tokens"]))
        print(f"  {image['score']:.3f}  {printable(image['uri'])}  {printable(shortened(caption))}  seen for: {words}")
    if len(ordered) > IMAGES_SHOWN:
        print(f"  and {len(ordered) - IMAGES_SHOWN:,} more images, which --json lists")


def without_middle(prompt: Tensor, length: int) -> Tensor:
    """The first token of a prompt (1, T), which may begin the document, and its last `length` - 1 tokens."""
    import torch

    return torch.cat([prompt[:, :1], prompt[:, prompt.shape[1] - length + 1 :]], dim=1)
