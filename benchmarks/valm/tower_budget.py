"""Where the time of CLIP's text tower goes, for 512 tokens of prose, as a share of a GPT-2 forward of the same tokens.

    python -m benchmarks.valm.tower_budget

Random weights, on which speed does not depend. Times are of one thread's processor, so that other work on the machine
matters less.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.valm.inputs import clip, gpt2, prose, token_rows
from benchmarks.valm.thread_time import thread_seconds
from valm.retrieval import text_tower
from valm.retrieval.context import ContextEncoder

TOKENS = 512
ROUNDS = 2
CASES = (("RN50x16", "state"), ("ViT-B/32", "eot"))
PARTS = ("products", "rounding and scaling", "attention", "activation", "norms", "rest")


class Clock:
    """Adds up the seconds of each part of a call; what a part calls is counted there only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.inside.append(0.0)
            start = time.thread_time()
            result = function(*arguments, **options)
            took = time.thread_time() - start
            self.seconds[part] += took - self.inside.pop()
            self.inside[-1] += took
            return result

        return call


def budget(tower: str, query: str, dtype: torch.dtype, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of each of PARTS, in the fastest of ROUNDS."""
    clock = Clock()
    encoder = ContextEncoder(clip(tower), query=query, dtype=dtype)
    part = "rounding and scaling" if dtype == torch.int8 else "products"
    for block in encoder.tower.blocks:
        for norm in (block.ln_1, block.ln_2):
            norm.forward = clock.timed("norms", norm.forward)
    encoder.tower.linear = [
        text_tower.BlockLinear(*(clock.timed(part, linear) for linear in layer)) for layer in encoder.tower.linear
    ]
    replaced = [(text_tower, "visual_fusion_attn", "attention"), (text_tower, "_activate", "activation")]
    replaced.append((torch, "_int_mm", "products"))
    before = [getattr(module, name) for module, name, _ in replaced]
    encode = clock.timed("rest", encoder)
    best: dict[str, float] = {}
    try:
        for (module, name, of), function in zip(replaced, before, strict=True):
            setattr(module, name, clock.timed(of, function))
        for _ in range(ROUNDS):
            clock.seconds.clear()
            encode(ids)
            if not best or sum(clock.seconds.values()) < sum(best.values()):
                best = dict(clock.seconds)
    finally:
        for (module, name, _), function in zip(replaced, before, strict=True):
            setattr(module, name, function)
        for block in encoder.tower.blocks:
            for norm in (block.ln_1, block.ln_2):
                del norm.forward
    return best


def main() -> None:
    torch.set_num_threads(1)
    ids = token_rows(prose(), 1, TOKENS)
    model = torch.no_grad()(lambda: gpt2(torch.float32)(ids, use_cache=False).logits)
    forward = thread_seconds(model, ROUNDS)
    print(f"GPT-2 base, {TOKENS} tokens, float32: {forward:.3f} s", flush=True)
    for tower, query in CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            of_part = budget(tower, query, dtype, ids)
            shares = ", ".join(f"{part} {of_part.get(part, 0) / forward:.3f}" for part in PARTS)
            whole = sum(of_part.values()) / forward
            print(f'{tower} "{query}" {str(dtype).removeprefix("torch.")}: {whole:.3f} = {shares}', flush=True)


if __name__ == "__main__":
    main()
