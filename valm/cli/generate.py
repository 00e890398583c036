"""valm generate."""

from __future__ import annotations

import argparse
from pathlib import Path

from valm.cli.options import Commands, add_retrieval, command, load_model, positive


def add_to(commands: Commands) -> None:
    generate = command(commands, "generate", run_generate, "continue a text")
    generate.add_argument("model", type=Path, help="checkpoint folder")
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=positive, default=20)
    generate.add_argument("--beams", type=positive, default=1)
    generate.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    generate.add_argument("--seed", type=int, default=0, help="of --sample")
    add_retrieval(generate)


def run_generate(arguments: argparse.Namespace) -> None:
    import torch

    model, tokenizer = load_model(arguments)
    torch.manual_seed(arguments.seed)
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.beams,
        do_sample=arguments.sample,
    )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
