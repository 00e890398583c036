"""The report of `valm pictures`: one page with what the model saw and wrote, its numbers, and what to do next."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from valm.clip.tokenizer import prompt_ids
from valm.corpus.retrieved import CorpusRetrieval
from valm.evaluation.controls import OFF, images_for
from valm.explain.explanation import Explanation, explain
from valm.explain.images import ShownImage
from valm.model.checkpoint import load
from valm.model.sampling import keep_ends_alone, sampling_options
from valm.options import as_options
from valm.pictures.making import CLIP, QUESTIONS, Making
from valm.pictures.page import hardware, versions, write_page
from valm.pictures.plan import HELD_OUT
from valm.store.parts import CONTROL, KB, MODEL, RETRIEVAL
from valm.text import first_half, one_line, printable
from valm.training.data import hold_out

HERE = Path(__file__).parent
REPORT_FILE = "report.html"
EXAMPLES, NEW_TOKENS, PROMPT_TOKENS = 6, 16, 24
# How the page names the stages.
STAGES = {
    CLIP: "CLIP",
    KB: "knowledge base",
    RETRIEVAL: "pictures of every token",
    MODEL: "training with your pictures",
    CONTROL: "training of the control",
    QUESTIONS: "your questions",
}
# A smaller change of the perplexity counts as none: trainings with other seeds differ by about as much.
DIFFERENCE = 0.01


class Row(NamedTuple):
    """A perplexity in words. bar: its share of the largest."""

    label: str
    value: float
    bar: float


class Example(NamedTuple):
    """The beginning of a held-out text, and how the model goes on with and without pictures.

    Attributes:
        word: the last token that saw pictures; empty if no token did.
        images: the pictures of `word`, with their shares of its attention.
    """

    prompt: str
    word: str
    images: list[tuple[ShownImage, float]]
    with_pictures: str
    without: str


def write_report(making: Making, seconds: dict[str, float]) -> None:
    """Writes the report of a finished run into its folder. seconds: of each stage."""
    numbers = making.numbers()
    rows, shown = perplexities(making), examples(making)
    write_page(
        making.out / REPORT_FILE,
        HERE / "report.html.j2",
        pictures=Path(making.plan.pictures).absolute().name,
        count=len(making.found.records),
        model=model_name(making),
        out=shlex.quote(str(making.out)),
        load=f"model, tokenizer = valm.load({str(making.out)!r})",
        prompt=shlex.quote(shown[0].prompt if shown else "a picture of"),
        examples=shown,
        rows=rows,
        verdict=verdict(rows),
        clip=numbers.get("clip"),
        questions=numbers.get(QUESTIONS, []),
        seconds={STAGES.get(stage, stage): of_stage for stage, of_stage in seconds.items()},
        versions=versions() | {"threads": str(torch.get_num_threads())},
        hardware=hardware(),
        commands=commands(making),
    )


def model_name(making: Making) -> str:
    return Path(making.plan.model or "a new model").name


def perplexities(making: Making) -> list[Row]:
    """The perplexities of held-out texts: of the base, the control and the model. Lower is better."""
    numbers = making.numbers()
    found = {
        f"{model_name(making)} as it was": numbers[MODEL].get("eval_perplexity_base"),
        "trained with random pictures": numbers[CONTROL].get("eval_perplexity"),
        "trained with your pictures": numbers[MODEL].get("eval_perplexity"),
    }
    known = {label: float(value) for label, value in found.items() if value is not None}
    return [Row(label, value, value / max(known.values())) for label, value in known.items()]


def verdict(rows: list[Row]) -> str:
    """A sentence on whether the pictures helped."""
    if len(rows) < 2:
        return "Too little text was held out to say whether the pictures help."
    change = rows[-1].value / rows[-2].value - 1
    if change < -DIFFERENCE:
        return f"Your pictures lower the perplexity by {-change:.1%} compared with random pictures."
    if change > DIFFERENCE:
        return f"Your pictures did not help: with random pictures the perplexity is {change / (1 + change):.1%} lower."
    return "Your pictures make no clear difference compared with random pictures."


def examples(making: Making) -> list[Example]:
    """How the model continues the beginnings of texts that were held out of its training."""
    model, tokenizer = load(making.out / MODEL)
    keep_ends_alone(model)
    found, off = model.retriever, images_for(model, OFF)
    _, held = hold_out(CorpusRetrieval.open(making.out / RETRIEVAL), HELD_OUT, seed=0)
    chosen: list[Example] = []
    for number in range(0, len(held), -(-len(held) // EXAMPLES)):
        text = tokenizer.decode(held[number]["input_ids"][: 2 * PROMPT_TOKENS], skip_special_tokens=True)
        prompt = first_half(str(text))
        if not prompt or any(prompt == example.prompt for example in chosen):
            continue
        model.set_retriever(found)
        seen, with_pictures = explain(model, tokenizer, prompt), _continued(model, tokenizer, prompt)
        model.set_retriever(off)
        chosen.append(Example(prompt, *_last_images(seen), with_pictures, _continued(model, tokenizer, prompt)))
    return chosen


def _last_images(seen: Explanation) -> tuple[str, list[tuple[ShownImage, float]]]:
    """The last token that sees pictures, and its pictures with their shares of its attention."""
    for token in range(len(seen.tokens) - 1, -1, -1):
        if images := seen.images_of(token):
            shares = seen.weights()[1][token].tolist()  # best first, and so are the images
            return seen.tokens[token], list(zip(images, shares, strict=False))
    return "", []


def _continued(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    ids = torch.tensor([prompt_ids(tokenizer, prompt)])
    options = sampling_options(False)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, **options)
    return printable(one_line(str(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))))


def commands(making: Making) -> list[str]:
    """The single commands with the options that were used."""
    plan, out = making.plan, making.out
    pictures, source = str(plan.pictures), as_options(plan.images())
    clip = making.clip_plan()
    lines = [] if plan.clip else [["clip", "train", pictures, *source, *as_options(clip)]]
    lines.append(["kb", "build", pictures, *source, "--clip", making.clip, "--out", str(out / KB)])
    corpus = [pictures, *(["--captions", str(plan.captions)] if plan.captions else [])]
    corpus = corpus if plan.text is None else [str(plan.text)]
    lines.append(["retrieve", *corpus, *as_options(making.retrieval_plan())])
    for training in (making.training_plan(MODEL, None), making.training_plan(CONTROL, "random")):
        fields = [word for name, value in training.fields.items() for word in (f"--{name}", str(value))]
        lines.append(["train", *as_options(replace(training, resume=False)), *fields])
    return [shlex.join(["valm", *line]) for line in lines]
