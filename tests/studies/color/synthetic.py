"""Synthetic results of a study: VaLM follows its images, the base says one colour, and the control learns slowly."""

import json

import numpy as np

from studies.color.config import EXCHANGES

ITEMS, PROMPTS, COLORS = 30, 9, np.array(["red", "blue", "green"])
RIGHT = COLORS[np.random.default_rng(100).integers(0, 3, ITEMS)]
PICTURED = np.arange(ITEMS) % 2 == 0
# Hits among PROMPTS: always, 8 of 9, never, and only if "red" is right.
ALL, MOST, NONE = (np.full(ITEMS, count) for count in (PROMPTS, PROMPTS - 1, 0))
RED = PROMPTS * (RIGHT == "red")
CALIBRATIONS = ("calibrated", "calibrated apart")
SETS = ("memory_color", "color_terms", "validation")
# The steps of the curve, and the query control's hits of PROMPTS after each of them; VaLM has one more.
CONTROL_HITS = {60: 2, 120: 4, 240: 8}
STEPS = 240
# The hits of each arm by what it sees. An exchange changes the colour of every picture except the first item's.
HITS = {
    ("base", "none"): {"raw": RED},
    ("valm", "retrieved"): {"raw": ALL} | dict.fromkeys(EXCHANGES, NONE),
    ("valm", "taken-out"): {"raw": RED},
    ("valm", "exchanged"): {"raw": NONE, "exchanged": ALL},
    ("valm", "other-colors"): {"raw": NONE, "other-colors": ALL},
    ("control", "retrieved"): {"raw": MOST},
    ("random", "random"): {"raw": RED},
} | {
    (f"{arm}-{steps}", "retrieved"): {"raw": np.full(ITEMS, hits + more)}
    for arm, more in (("valm", 1), ("control", 0))
    for steps, hits in CONTROL_HITS.items()
    if steps != STEPS
}


def rows(hits, sets):
    """Rows of the results; the calibrated answers equal the raw answers."""
    found = []
    for (arm, images), measured in hits.items():
        for of in sets:
            for measure, counts in (measured | dict.fromkeys(CALIBRATIONS, measured["raw"])).items():
                some = counts[1:] if measure in EXCHANGES else counts
                row = {"arm": arm, "images": images, "of": of, "measure": measure, "hits": some.tolist()}
                found.append(row)
    return found


def text_row(arm, images, nats, of="prose"):
    """Two texts, of 2 and of 4 tokens."""
    return {"arm": arm, "images": images, "of": of, "measure": "nats", "hits": [nats, 2 * nats]}


def asked(of, names, measure, pictured=PICTURED):
    values = {"items": names, "tries": [PROMPTS] * ITEMS, "answers": RIGHT.tolist(), "pictured": pictured.tolist()}
    values["pixels"] = np.where(RIGHT == "green", "blue", RIGHT).tolist()
    first = measure in EXCHANGES
    return {"of": of, "measure": measure} | {part: value[first:] for part, value in values.items()}


def asked_texts(of):
    not_looked_up = {name: [] for name in ("answers", "pictured", "pixels")}
    return {"of": of, "measure": "nats", "items": ["0", "1"], "tries": [2, 4]} | not_looked_up


def result(seed, pictured=PICTURED):
    """Each seed has its own validation objects. pictured: which of them have a picture. ColorTerms has an object of
    MemoryColor, in the plural."""
    things, own = ([f"{of} {number}" for number in range(ITEMS)] for of in ("thing", str(seed)))
    terms = [f"thing {ITEMS - 1}s", *(f"term {number}" for number in range(1, ITEMS))]
    measures = ("raw", *CALIBRATIONS, *EXCHANGES)
    return {
        "study": "synthetic",
        "recipe": "abc",
        "config": {"training": {"steps": STEPS}, "curve": list(CONTROL_HITS)},
        "seed": seed,
        "missing": ["vicomte_color", "captions"],
        "asked": [
            *(asked("memory_color", things, measure) for measure in measures),
            *(asked("color_terms", terms, measure) for measure in measures),
            *(asked("validation", own, measure, pictured) for measure in measures),
            asked_texts("prose"),
        ],
        "rows": [*rows(HITS, SETS), text_row("base", "none", 5.0), text_row("valm", "retrieved", 3.9)],
        "versions": {"torch": "2.13"},
        "hardware": "a processor",
        "threads": 2,
    }


def write(folder, seeds=(0, 1)):
    """Writes the files of these seeds."""
    files = []
    for seed in seeds:
        files.append(folder / f"seed-{seed}.json")
        files[-1].write_text(json.dumps(result(seed)))
    return files


def without(found, *arms):
    """Results without the rows of some arms."""
    return found | {"rows": [row for row in found["rows"] if row["arm"] not in arms]}
