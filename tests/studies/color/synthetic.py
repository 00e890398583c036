"""Results of a study whose numbers are known: VaLM follows its images and its twin says one colour always."""

import json

import numpy as np

from studies.color.config import EXCHANGES

ITEMS, PROMPTS, COLORS = 30, 9, np.array(["red", "blue", "green"])
RIGHT = COLORS[np.random.default_rng(100).integers(0, 3, ITEMS)]
PICTURED = np.arange(ITEMS) % 2 == 0
# Hits of PROMPTS: always, 8 times of 9, never, and where "red" is right.
ALL, MOST, NONE = (np.full(ITEMS, count) for count in (PROMPTS, PROMPTS - 1, 0))
RED = PROMPTS * (RIGHT == "red")
# What each arm hits with what it sees; a picture has another colour after an exchange, but that of the first item.
HITS = {
    ("twin", "none"): {"raw": RED},
    ("valm", "retrieved"): {"raw": MOST} | dict.fromkeys(EXCHANGES, NONE),
    ("valm", "random"): {"raw": RED},
    ("valm", "taken-out"): {"raw": RED},
    ("valm", "exchanged"): {"raw": NONE, "exchanged": ALL},
    ("valm", "other-colors"): {"raw": NONE, "other-colors": ALL},
    ("blind", "retrieved"): {"raw": MOST},
}


def rows(hits, sets=("memory_color", "validation")):
    """Rows of the results; calibrated answers are the raw ones."""
    found = []
    for (arm, images), measured in hits.items():
        for of in sets:
            for measure, counts in (measured | {"calibrated": measured["raw"]}).items():
                some = counts[1:] if measure in EXCHANGES else counts
                row = {"arm": arm, "images": images, "of": of, "measure": measure, "hits": some.tolist()}
                found.append(row)
    return found


def text_row(arm, images, nats, of="prose"):
    """Two texts, of 2 and of 4 tokens."""
    return {"arm": arm, "images": images, "of": of, "measure": "nats", "hits": [nats, 2 * nats]}


def asked(of, names, measure, pictured=PICTURED):
    values = {"items": names, "tries": [PROMPTS] * ITEMS, "answers": RIGHT.tolist(), "pictured": pictured.tolist()}
    first = measure in EXCHANGES
    return {"of": of, "measure": measure} | {part: value[first:] for part, value in values.items()}


def asked_texts(of):
    return {"of": of, "measure": "nats", "items": ["0", "1"], "tries": [2, 4], "answers": [], "pictured": []}


def result(seed, pictured=PICTURED):
    """The first study's arms; the validation things are each seed's own. pictured: of these."""
    things, own = ([f"{of} {number}" for number in range(ITEMS)] for of in ("thing", str(seed)))
    measures = ("raw", "calibrated", *EXCHANGES)
    return {
        "study": "synthetic",
        "recipe": "abc",
        "seed": seed,
        "missing": [],
        "asked": [
            *(asked("memory_color", things, measure) for measure in measures),
            *(asked("validation", own, measure, pictured) for measure in measures),
            asked_texts("prose"),
        ],
        "rows": [*rows(HITS), text_row("twin", "none", 4.0), text_row("valm", "retrieved", 6.0)],
        "losses": {"twin": [3.0, 2.0], "valm": [3.0, 1.0], "blind": [2.0, 1.0]},
        "training": {},
        "versions": {"torch": "2.13"},
        "hardware": "a processor",
        "threads": 2,
    }


def second_result(seed):
    """As `result`, with the base, VaLM with a cut, which is right 8 times of 9 too, captions that say one colour, and
    a Blind without colours, as the twin."""
    found = result(seed, PICTURED | True)
    new = {
        ("base", "none"): {"raw": RED},
        ("valm", "cut"): {"raw": MOST},
        ("valm", "cut-random"): {"raw": RED},
        ("context", "captions"): {"raw": RED},
        ("colorless-valm", "retrieved"): {"raw": MOST},
        ("colorless-blind", "retrieved"): {"raw": RED},
    }
    found["rows"] += [*rows(new), text_row("base", "none", 5.0), text_row("valm", "cut", 3.9)]
    return found | {
        "missing": ["relative_size", "captions"],
        "training": {"valm": {"steps": 480, "base_share": 0.25, "eval_perplexity": 12.5}},
    }


def write(folder, seeds=(0, 1), made=result):
    """The files of these seeds."""
    files = []
    for seed in seeds:
        files.append(folder / f"seed-{seed}.json")
        files[-1].write_text(json.dumps(made(seed)))
    return files


def without(found, *arms):
    """Results without the rows of some arms."""
    return found | {"rows": [row for row in found["rows"] if row["arm"] not in arms]}
