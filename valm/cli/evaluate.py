"""valm eval."""

from __future__ import annotations

import argparse
from pathlib import Path

from valm.cli.options import Commands, add_retrieval, command, load_model
from valm.errors import ValmError


def add_to(commands: Commands) -> None:
    evaluate = command(commands, "eval", run_eval, "ask a checkpoint for the colours of things")
    evaluate.add_argument("model", type=Path, help="checkpoint folder")
    evaluate.add_argument("--memory-color", type=Path, help="memory_color_data.csv")
    evaluate.add_argument("--color-terms", type=Path, help="color-concrete-objects.csv")
    evaluate.add_argument("--protocol", choices=["fair", "published"], default="fair")
    evaluate.add_argument("--out", type=Path, help="write all answers to this JSON file")
    add_retrieval(evaluate)


def run_eval(arguments: argparse.Namespace) -> None:
    from valm.evaluation.color import evaluate_color, load_color_terms, load_memory_color
    from valm.files import write_json

    sets = {}
    if arguments.memory_color:
        sets["MemoryColor"] = load_memory_color(arguments.memory_color)
    if arguments.color_terms:
        sets["ColorTerms"] = load_color_terms(arguments.color_terms)
    if not sets:
        raise ValmError("nothing to evaluate: give --memory-color or --color-terms, or both")
    model, tokenizer = load_model(arguments)
    results = {}
    for name, items in sets.items():
        result = evaluate_color(model, tokenizer, items, protocol=arguments.protocol, progress=name)
        results[name] = result.to_json()
        print(f"{name}, {len(items)} things, {len(result.prompts)} prompts, {arguments.protocol} protocol")
        print(f"  accuracy            {result.accuracy}  (95 % interval over things)")
        if result.vote is not None:
            print(f"  vote of the prompts {result.vote}")
            print(f"  calibrated          {result.calibrated}")
            print(f"  calibrated vote     {result.calibrated_vote}")
        print(
            f"  always {result.majority_answer!r}{'':<{max(0, 11 - len(result.majority_answer))}} {result.majority:.3f}"
        )
    if arguments.out:
        write_json(arguments.out, results)
