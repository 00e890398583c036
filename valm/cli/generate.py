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

# Images listed below a text; --json lists all images.
IMAGES_SHOWN = 8


EXAMPLE = 'valm generate model "the color of the sky is" --max-new-tokens 3'


def add_to(commands: Commands) -> None:
    help = "continue a text, and list the images that the model saw"
    generate = command(commands, "generate", run_generate, help, EXAMPLE)
    generate.add_argument("model", type=Path, help="folder of the checkpoint, or of `valm pictures`")
    generate.add_argument("prompt", nargs="?", help="text to continue")
    generate.add_argument(
        "--prompts", type=Path, metavar="FILE", help="file with a text to continue on each line; - reads standard input"
    )
    generate.add_argument("--max-new-tokens", type=positive, default=20, help="largest number of tokens to add")
    generate.add_argument("-k", type=positive, help="images per token (default: as in training)")
    generate.add_argument(
        "--temperature",
        type=above_zero,
        help="sample tokens instead of taking the most likely token; 1 keeps the model's probabilities, a higher "
        "temperature makes unlikely tokens more likely",
    )
    generate.add_argument(
        "--top-p", type=share, help="sample from the most likely tokens that together have this probability"
    )
    generate.add_argument("--seed", type=seed, default=0, help="random seed for sampling, reset for each prompt")
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
    """The prompt, or the lines of --prompts that are not empty.

    Raises:
        ValmError: neither or both are given, or there is no text.
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
        raise ValmError(f"{where} contains no prompt: write one prompt on each line")
    return prompts


def generated(model: Any, tokenizer: Any, text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The prompt, its continuation and, for each new token, the images that the token before it saw, best first."""
    import torch

    from valm.clip.tokenizer import prompt_ids
    from valm.evaluation.scoring import context_length
    from valm.model.sampling import keep_ends_alone, sampling_options

    keep_ends_alone(model)
    prompt = torch.tensor([prompt_ids(tokenizer, text)], device=model.device)
    context = context_length(model)
    # if the context is too small for prompt and continuation, the prompt gets at least half
    room = max(context - arguments.max_new_tokens, context // 2)
    if prompt.shape[1] > room:
        prompt = without_middle(prompt, room)
        print(
            f"the model reads {context} tokens: the prompt is cut to its first token and its last {room - 1}",
            file=sys.stderr,
        )
    if prompt.shape[1] + arguments.max_new_tokens > context:
        room = context - prompt.shape[1]
        print(f"the model reads {context} tokens: the continuation is at most {room} tokens long", file=sys.stderr)
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    torch.manual_seed(arguments.seed)
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(arguments.max_new_tokens, context - prompt.shape[1]),
        num_beams=1,
        **sampling_options(bool(sampling), **sampling),
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
    """The images of each of `tokens` (1, T), best first; no images for a model without a knowledge base."""
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
    """Prints the text, then the images, those that most tokens saw first."""
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
    """The first token of a prompt (1, T), which may be the bos token, and its last `length` - 1 tokens."""
    import torch

    return torch.cat([prompt[:, :1], prompt[:, prompt.shape[1] - length + 1 :]], dim=1)
