"""valm generate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from valm.cli.options import Commands, add_retrieval, command, load_model, positive, seed

if TYPE_CHECKING:
    from torch import Tensor


def add_to(commands: Commands) -> None:
    generate = command(commands, "generate", run_generate, "continue a text")
    generate.add_argument("model", type=Path, help="checkpoint folder")
    generate.add_argument("prompt", help="the text to continue")
    generate.add_argument("--max-new-tokens", type=positive, default=20, help="how many tokens are added at most")
    generate.add_argument("--beams", type=positive, default=1, help="width of the beam search; 1 is greedy")
    generate.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    generate.add_argument("--seed", type=seed, default=0, help="of --sample")
    add_retrieval(generate)


def run_generate(arguments: argparse.Namespace) -> None:
    import torch

    from valm.clip.tokenizer import prompt_ids
    from valm.evaluation.scoring import context_length

    model, tokenizer = load_model(arguments)
    torch.manual_seed(arguments.seed)
    prompt = torch.tensor([prompt_ids(tokenizer, arguments.prompt)], device=model.device)
    context = context_length(model)
    # in a context too small for both, the prompt gets at least half
    room = max(context - arguments.max_new_tokens, context // 2)
    if prompt.shape[1] > room:
        prompt = without_middle(prompt, room)
        print(
            f"the model reads {context} tokens: the prompt is cut to its first token and its last {room - 1}",
            file=sys.stderr,
        )
    new_tokens = min(arguments.max_new_tokens, context - prompt.shape[1])
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        num_beams=arguments.beams,
        do_sample=arguments.sample,
    )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


def without_middle(prompt: Tensor, length: int) -> Tensor:
    """The first token of a prompt (1, T), which may begin the document, and its last `length` - 1 tokens."""
    import torch

    return torch.cat([prompt[:, :1], prompt[:, prompt.shape[1] - length + 1 :]], dim=1)
