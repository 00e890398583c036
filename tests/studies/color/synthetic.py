"""Synthetic results of a study: VaLM with the threshold follows its images, base and baseline say one colour."""

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
BASE, TWIN, CUT = ("base", "none"), ("twin", "none"), ("cut", "retrieved")
# The hits of each arm by what it sees. An exchange changes the colour of every picture except the first item's.
HITS = {
    ("base", "none"): {"raw": RED},
    ("twin", "none"): {"raw": RED},
    ("cut", "retrieved"): {"raw": MOST} | dict.fromkeys(EXCHANGES, NONE),
    ("cut", "taken-out"): {"raw": RED},
    ("cut", "pictures-50"): {"raw": RED},
    ("cut", "exchanged"): {"raw": NONE, "exchanged": ALL},
    ("random", "random"): {"raw": RED},
    ("blind", "retrieved"): {"raw": MOST},
}


def rows(hits, sets=("memory_color", "validation")):
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
    """Each seed has its own validation objects. pictured: which of them have a picture."""
    things, own = ([f"{of} {number}" for number in range(ITEMS)] for of in ("thing", str(seed)))
    measures = ("raw", *CALIBRATIONS, *EXCHANGES)
    return {
        "study": "synthetic",
        "recipe": "abc",
        "seed": seed,
        "missing": ["vicomte_color", "captions"],
        "asked": [
            *(asked("memory_color", things, measure) for measure in measures),
            *(asked("validation", own, measure, pictured) for measure in measures),
            asked_texts("prose"),
        ],
        "rows": [*rows(HITS), *(text_row(*arm, nats) for arm, nats in ((BASE, 5.0), (TWIN, 4.0), (CUT, 3.9)))],
        "versions": {"torch": "2.13"},
        "hardware": "a processor",
        "threads": 2,
    }


# The arms of the fourth study: the query control at all tokens is the better one on validation objects.
READING_HITS = {
    ("reading", "retrieved"): {"raw": ALL} | dict.fromkeys(EXCHANGES, NONE),
    ("reading", "exchanged"): {"raw": NONE, "exchanged": ALL},
    ("reading-random", "random"): {"raw": RED},
    ("reading-blind", "retrieved"): {"raw": NONE},
    ("reading-blind-all", "retrieved"): {"raw": RED},
}


def fourth(seed):
    """Results with the arms of the fourth study. ColorTerms has an object of MemoryColor, in the plural."""
    found = result(seed)
    names = [f"thing {ITEMS - 1}s", *(f"term {number}" for number in range(1, ITEMS))]
    found["asked"] += [asked("color_terms", names, measure) for measure in ("raw", *CALIBRATIONS, *EXCHANGES)]
    found["rows"] += rows(HITS, ["color_terms"]) + rows(READING_HITS, ["memory_color", "validation", "color_terms"])
    return found


def write(folder, seeds=(0, 1), made=result):
    """Writes the files of these seeds."""
    files = []
    for seed in seeds:
        files.append(folder / f"seed-{seed}.json")
        files[-1].write_text(json.dumps(made(seed)))
    return files


def without(found, *arms):
    """Results without the rows of some arms."""
    return found | {"rows": [row for row in found["rows"] if row["arm"] not in arms]}
