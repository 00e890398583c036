"""report.html: one file that holds the demo's table, figures and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from valm import plots
from valm.demo.corpus import begins_a_sentence
from valm.demo.exhibits import Exhibits
from valm.demo.things import CREDIT
from valm.evaluation.color import COLORS, PROMPTS
from valm.explain import figures
from valm.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW_NAMES = {
    "valm": "VaLM, 4 retrieved pictures a token",
    "gpt2": "GPT-2*, the same model without pictures",
    "random_images": "VaLM, random pictures at test time",
    "valm_state_queries": "VaLM with state queries, as published",
    "majority": "always the commonest colour",
}

STYLE = """
:root { color-scheme: light; --ink: #23272e; --soft: #5c6470; --line: #dde1e6; --blue: #2f6fb0; }
body { font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); background: #fff;
       max-width: 60rem; margin: 2.5rem auto 4rem; padding: 0 1.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; } .soft, figcaption { color: var(--soft); font-size: .88rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .38rem .9rem; text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; }
tbody tr + tr td { border-top: 1px solid var(--line); }
tr.first td { font-weight: 700; color: var(--blue); }
figure { margin: 1rem 0; } figure > svg { max-width: 100%; height: auto; } figcaption { margin-top: .4rem; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: .9rem 1.6rem; }
.example { display: flex; gap: .9rem; align-items: center; border-top: 1px solid var(--line); padding-top: .9rem; }
.pictures { display: flex; gap: 3px; } .pictures img { width: 52px; height: 52px; border-radius: 5px; display: block; }
.right { color: #2f7d32; } .wrong { color: #b3261e; } .answer { font-weight: 700; }
.swap { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1.2rem; }
.swap .pictures { margin: .3rem 0; }
code { font-size: .9em; background: #f3f5f7; padding: .1em .3em; border-radius: 3px; }
.claim { border-left: 4px solid var(--blue); padding: .1rem 0 .1rem 1rem; margin: 1.2rem 0; }
"""


def check_can_report() -> None:
    """Raises ValmError where the packages that draw figures are missing."""
    figures.check_can_draw()


def write_report(
    path: Path, results: Mapping[str, Any], losses: Mapping[str, Sequence[float]], exhibits: Exhibits
) -> None:
    """Writes the report, all or nothing."""
    parts = [
        _head(results),
        _table(results),
        _meaning(results),
        _examples(exhibits),
        _attention(exhibits),
        _swaps(results, exhibits),
        _queries(results),
        _prompts(results),
        _losses(losses),
        _run(results),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>valm demo</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _head(results: Mapping[str, Any]) -> str:
    accuracy, things = results["heldout_color_accuracy"], results["things"]
    others = f"{things['heldout']} others" + (
        f" and {things['memory_color']} of MemoryColor's" if things["memory_color"] else ""
    )
    return f"""<h1>Colours that stand in no text</h1>
<p>Two small language models read the same {results["settings"]["sentences"]:,} sentences. These say the colours of
{things["colour_said"]} things and only name {others}. Asked for the colours of the held-out {things["heldout"]}, the
model that looks at retrieved pictures while it reads (VaLM) is right <b>{accuracy["valm"]:.0%}</b> of the time, its
twin without pictures (GPT-2*) <b>{accuracy["gpt2"]:.0%}</b>, and VaLM with random pictures in the place of the
retrieved ones <b>{accuracy["random_images"]:.0%}</b>.</p>"""


def _table(results: Mapping[str, Any]) -> str:
    heldout, memory, things = results["heldout_color_accuracy"], results["memory_color_accuracy"], results["things"]
    details = results["details"]
    rows = []
    for name, label in ROW_NAMES.items():
        cells = [_share(heldout[name], details.get(name, {}).get("heldout"))]
        if memory:
            cells.append(_share(memory[name], details.get(name, {}).get("memory")))
        kind = ' class="first"' if name == "valm" else ""
        rows.append(f"<tr{kind}><td>{label}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    columns = f"<th>{things['heldout']} held-out things</th>"
    if memory:
        columns += f"<th>{things['memory_color']} things of MemoryColor</th>"
    note = "" if memory else f'<p class="soft">MemoryColor is left out: {escape(results["memory_color_note"])}.</p>'
    return f"""<table><thead><tr><th>right answers</th>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table>
<p class="soft">Mean over the paper's nine prompts and all things; the likeliest of eleven colour words is the answer.
In brackets the 95 % interval over things. The right answers for the held-out things are the colours of their pixels,
those for MemoryColor's are what people said.</p>{note}"""


def _share(value: float, detail: Mapping[str, Any] | None) -> str:
    if detail is None:
        return f"{value:.1%}"
    low, high = detail["interval"]
    return f'{value:.1%} <span class="soft">[{low:.0%}, {high:.0%}]</span>'


def _meaning(results: Mapping[str, Any]) -> str:
    return """<div class="claim"><p><b>What this shows.</b> The colour of a held-out thing stands in no sentence that
the language models read and in no caption that CLIP read. The pictures alone hold it, and it comes into the answer
through the pictures: with others in their place it is gone, and with two of their channels exchanged the answers
change.</p>
<p><b>What it does not show.</b> CLIP has seen the pictures of the held-out things together with their names, so these
are no unseen things. Nor does it show that their pictures must be in the knowledge base: this CLIP puts a name near
pictures of the same colour, so others may do as well, and its feature of the text alone already tells much of the
colour (Blind-VaLM reads that in the place of pictures).</p></div>"""


def _examples(exhibits: Exhibits) -> str:
    blocks = []
    for example in exhibits.examples:
        right = example.answer == example.truth
        verdict = "" if right else f' <span class="soft">(it is {escape(example.truth)})</span>'
        blocks.append(
            f'<div class="example">{_pictures(example.pictures, example.captions)}<div>{escape(example.question)} '
            f'<span class="answer {"right" if right else "wrong"}">{escape(example.answer)}</span>{verdict}</div></div>'
        )
    return f"""<h2>Pictures found, answers given</h2>
<p>Things drawn at random, nobody picked them, with the four pictures that the last word of each question found.</p>
<div class="examples">{"".join(blocks)}</div>{_credit()}"""


def _attention(exhibits: Exhibits) -> str:
    return f"""<h2>What each word looks at</h2>
<p>The fusion block weighs text and pictures in one softmax. Each row is a word; on the left how much it looks at the
words before it, on the right at the four pictures that the text up to it has found (the clearer, the more).</p>
<figure>{svg(figures.attention(exhibits.attention))}<figcaption>Mean over the heads.</figcaption></figure>{_credit()}"""


def _swaps(results: Mapping[str, Any], exhibits: Exhibits) -> str:
    blocks = []
    for swap in exhibits.swaps:
        pictures = "".join(
            f"<div>{_pictures(shown, [name] * len(shown))}<span class='soft'>{escape(name)}</span></div>"
            for name, shown in swap.pictures.items()
        )
        blocks.append(
            f'<div class="swap"><div><b>{escape(swap.question)} …</b>{pictures}</div>'
            f"<figure>{svg(figures.answer_bars(swap.probabilities))}</figure></div>"
        )
    before, after = results["red_blue_swap"]["before"], results["red_blue_swap"]["after"]
    rows = "".join(
        f"<tr><td>{color}</td><td>{sum(before[color].values())}</td><td>{_counts(before[color])}</td>"
        f"<td>{_counts(after[color])}</td></tr>"
        for color in COLORS
        if color in before
    )
    return f"""<h2>The same pictures with red and blue exchanged</h2>
<p>Retrieval stays as it was; only the vectors of the found pictures are replaced by those of the same pictures with
their red and blue channels exchanged, so that red things look blue, yellow ones sky-blue, and grey ones stay grey.
Shown are the first things drawn that are answered rightly as they are; the table counts all.</p>
{"".join(blocks)}{_credit()}
<table><thead><tr><th>colour of the pixels</th><th>things</th><th>answers before</th><th>answers after</th></tr></thead>
<tbody>{rows}</tbody></table>"""


def _counts(counts: Mapping[str, int]) -> str:
    most = sorted(counts.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{color} {count}" for color, count in most[:3]) + (" …" if len(most) > 3 else "")


def _queries(results: Mapping[str, Any]) -> str:
    names = {"eot": "what CLIP answers for the text so far (EOT after it)", "state": "the state at the word itself"}
    accuracy = results["heldout_color_accuracy"]
    right = {"eot": accuracy["valm"], "state": accuracy["valm_state_queries"]}
    rows = "".join(
        f"<tr><td>{names[query]}</td>"
        + "".join(f"<td>{share:.1%}</td>" for share in rates.values())
        + f"<td>{right[query]:.1%}</td></tr>"
        for query, rates in results["hit_rate"].items()
    )
    return f"""<h2>Two kinds of retrieval query</h2>
<p>How often the last word of a question finds a picture of its own thing. CLIP is trained in the ordinary way, at EOT
only; the published model asks with states that CLIP was never trained for.</p>
<table><thead><tr><th>query</th><th>first</th><th>top 4</th><th>top 8</th><th>held-out accuracy</th></tr></thead>
<tbody>{rows}</tbody></table>"""


def _prompts(results: Mapping[str, Any]) -> str:
    details = results["details"]
    rows = "".join(
        f"<tr><td>{escape(prompt)}</td><td>{'yes' if begins_a_sentence(prompt) else 'no'}</td>"
        + "".join(f"<td>{details[name]['heldout']['by_prompt'][prompt]:.1%}</td>" for name in ("valm", "gpt2"))
        + "</tr>"
        for prompt in PROMPTS
    )
    return f"""<h2>Prompt by prompt</h2>
<p>Some of the nine begin sentences of the training text; the others put its words together anew.</p>
<table><thead><tr><th>held-out things</th><th>in the text</th><th>VaLM</th><th>GPT-2*</th></tr></thead>
<tbody>{rows}</tbody></table>"""


def _losses(losses: Mapping[str, Sequence[float]]) -> str:
    clip = {name: values for name, values in losses.items() if name == "CLIP"}
    language = {name: values for name, values in losses.items() if name != "CLIP"}
    return f"""<h2>Training</h2>
<figure>{svg(plots.loss_curves(language))}<figcaption>Language models: the same sentences in the same
order.</figcaption></figure>
<figure>{svg(plots.loss_curves(clip))}<figcaption>CLIP: contrastive loss over pictures and captions without colour
words.</figcaption></figure>"""


def _run(results: Mapping[str, Any]) -> str:
    rows = [(stage, time) for stage, time in results["seconds"].items()]
    rows.append(("together", sum(results["seconds"].values())))
    seconds = "".join(f"<tr><td>{escape(stage)}</td><td>{time:.1f}</td></tr>" for stage, time in rows)
    versions = ", ".join(f"{escape(name)} {escape(str(number))}" for name, number in results["versions"].items())
    split = "" if results["split"] == "test" else f", {results['split']} split"
    return f"""<h2>This run</h2>
<table><thead><tr><th>stage</th><th>seconds</th></tr></thead><tbody>{seconds}</tbody></table>
<p class="soft">Seed {results["seed"]}{split}. {versions}.</p>
<p>The trained models lie beside this file: <code>valm generate valm "the color of the tomato is"</code></p>"""


def svg(figure: Figure) -> str:
    """The figure as an SVG element, its texts as text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _pictures(pictures: Sequence[Image.Image], titles: Sequence[str]) -> str:
    images = "".join(
        f'<img src="{data_uri(picture)}" alt="{escape(title)}" title="{escape(title)}">'
        for picture, title in zip(pictures, titles, strict=True)
    )
    return f'<div class="pictures">{images}</div>'


def data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _credit() -> str:
    return f'<p class="soft">{escape(CREDIT)}</p>'
