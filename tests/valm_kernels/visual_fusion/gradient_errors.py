"""Prints the errors of gradients on the CPU relative to eager PyTorch's, both against float64: tests/README.md's table.

    python -m tests.valm_kernels.visual_fusion.gradient_errors

An entry is the least and the largest ratio of the two RMS errors over the seeds. "exact delta": the ratio if the
backward computed delta = sum(grad_out * out) in float64 instead of from the rounded `out`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from tests.valm_kernels.visual_fusion.problems import Problem, gradients_of
from valm_kernels import visual_fusion_attn

NAMES = ("q", "k", "v", "image_k", "image_v", "image_v_bias", "image_k_bias", "image_logit_bias")
USUAL = (
    Problem(num_queries=256, num_images=4, head_dim=64, gaps=False),
    Problem(num_queries=256, num_images=8, head_dim=64, pool_size=50),
    Problem(batch=16, num_queries=8, num_images=4, head_dim=64),
)
FEW_KEYS = (Problem(num_queries=64, num_images=2, head_dim=64, first_key="descending"),)
SEEDS = range(5)
# The text's share of the weight below which the native backward corrects delta (csrc/image_attn/kernels.hpp).
NO_TEXT = 2**-13


def gradients(
    inputs: dict, impl: str, grad_out: Tensor, grad_lse: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients of NAMES, and out."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES}
    out, lse = visual_fusion_attn(**(inputs | leaves), impl=impl, return_lse=True)
    return gradients_of((out, lse), (grad_out, grad_lse), leaves), out.detach()


def errors(problem: Problem, dtype: torch.dtype, mean: int) -> dict[str, tuple[float, float]]:
    """By name: our RMS error ÷ eager's, and with an exact delta. mean: mean of the gradient of out."""
    inputs = problem.inputs(dtype)
    wide = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    generator = torch.Generator().manual_seed(problem.seed + 999)
    grad_out = (torch.randn(inputs["q"].shape, generator=generator) + mean).bfloat16().half().to(dtype)
    truth, exact = gradients(wide, "reference", grad_out.double())
    eager, _ = gradients(inputs, "reference", grad_out)
    ours, out = gradients(inputs, "cpu", grad_out)
    # the gradient of lse is subtracted from delta; if images have all of the weight, delta is exact already
    correction = (grad_out.double() * (out.double() - exact)).sum(-1).float()
    _, weights = visual_fusion_attn(**wide, impl="reference", return_image_weights=True)
    correction = correction.masked_fill(1 - weights.sum(-1) < NO_TEXT, 0)
    corrected, _ = gradients(inputs, "cpu", grad_out, correction)

    def rms(found: dict[str, Tensor], name: str) -> float:
        return (found[name].double() - truth[name]).square().mean().sqrt().item()

    return {name: (rms(ours, name) / rms(eager, name), rms(corrected, name) / rms(eager, name)) for name in NAMES}


def main() -> None:
    for dtypes in ((torch.bfloat16, torch.float16), (torch.float32,)):
        print(", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes))
        print("| Gradient | usual inputs | exact delta | few keys (`descending`) | exact delta |")
        print("| --- | --- | --- | --- | --- |")
        cells = defaultdict(list)
        for column, problems in (("usual", USUAL), ("few", FEW_KEYS)):
            for dtype, problem, mean, seed in product(dtypes, problems, (0, 1), SEEDS):
                found = errors(replace(problem, seed=seed), dtype, mean)
                for name, (now, exact) in found.items():
                    cells[name, column].append(now)
                    cells[name, column, "exact"].append(exact)
        for name in NAMES:
            columns = [(name, "usual"), (name, "usual", "exact"), (name, "few"), (name, "few", "exact")]
            ranges = [f"{min(cells[key]):.1f} to {max(cells[key]):.1f}" for key in columns]
            print(f"| {name} | {' | '.join(ranges)} |")


if __name__ == "__main__":
    main()
