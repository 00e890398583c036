"""Results of a study whose numbers are known: VaLM follows its images and its twin says one colour always."""

import json

import numpy as np

from studies.color.scoring import compact

ITEMS, PROMPTS, CANDIDATES = 30, 9, ["red", "blue", "green"]


def result(seed, items=ITEMS, validation=None):
    """Right answers are random; VaLM is right 8 times of 9, the twin always says "red"."""
    draw = np.random.default_rng(100)
    right = draw.integers(0, 3, items)
    exchanged = (right + 1) % 3
    valm, after = (np.repeat(one[:, None], PROMPTS, 1) for one in (right, exchanged))
    valm[:, 0] = (right + 2) % 3
    twin = np.zeros((items, PROMPTS), int)
    colors = [
        {"retrieved": CANDIDATES[a], "exchanged": CANDIDATES[b], "other-colors": CANDIDATES[b]}
        for a, b in zip(right, exchanged, strict=True)
    ]
    colors[0] = dict.fromkeys(colors[0])
    about = {
        "items": [f"thing {number}" for number in range(items)],
        "prompts": ["?"] * PROMPTS,
        "candidates": CANDIDATES,
        "right": compact(np.repeat(right[:, None], PROMPTS, 1)),
        "pictured": [number % 2 == 0 for number in range(items)],
        "colors": colors,
    }
    answers = {
        ("twin", "none"): twin,
        ("valm", "retrieved"): valm,
        ("valm", "random"): twin,
        ("valm", "taken-out"): twin,
        ("valm", "exchanged"): after,
        ("valm", "other-colors"): after,
        ("blind", "retrieved"): valm,
    }
    rows = [
        {"arm": arm, "images": images, "set": name, "raw": compact(said), "calibrated": compact(said)}
        for (arm, images), said in answers.items()
        for name in ("memory_color", "validation")
    ]
    for arm, nats in (("twin", 4.0), ("valm", 6.0)):
        images = "none" if arm == "twin" else "retrieved"
        rows.append({"arm": arm, "images": images, "text": "prose", "nats": [nats, 2 * nats], "tokens": [2, 4]})
    own = {**about, "items": [f"{seed} {number}" for number in range(items)]}
    return {
        "study": "synthetic",
        "recipe": "abc",
        "seed": seed,
        "sets": {"memory_color": about, "validation": own},
        "rows": rows,
        "losses": {"twin": [3.0, 2.0], "valm": [3.0, 1.0], "blind": [2.0, 1.0]},
        "clip": {"R@1": 0.5},
        "counts": {"glosses dropped": 12},
        "versions": {"torch": "2.13"},
        "hardware": "a processor",
        "threads": 2,
        "seconds": {"clip": 10.0 + seed},
    }


def write(folder, seeds=(0, 1)):
    """The files of these seeds."""
    files = []
    for seed in seeds:
        files.append(folder / f"seed-{seed}.json")
        files[-1].write_text(json.dumps(result(seed)))
    return files


def second_result(seed):
    """As `result`, with the base, VaLM with a cut, which is right 8 times of 9 too, captions that say one colour, and
    a Blind without colours, as the twin."""
    found = result(seed)
    rows = {(row["arm"], row["images"]): row for row in found["rows"] if row.get("set") == "validation"}
    new = {
        ("base", "none"): ("twin", "none"),
        ("valm", "cut"): ("valm", "retrieved"),
        ("valm", "cut-random"): ("twin", "none"),
        ("context", "captions"): ("twin", "none"),
        ("colorless-valm", "retrieved"): ("valm", "retrieved"),
        ("colorless-blind", "retrieved"): ("twin", "none"),
    }
    for (arm, images), same in new.items():
        for name in ("memory_color", "validation"):
            found["rows"].append(rows[same] | {"arm": arm, "images": images, "set": name})
    for (arm, images), nats in {("base", "none"): 5.0, ("valm", "cut"): 3.9}.items():
        found["rows"].append(
            {"arm": arm, "images": images, "text": "prose", "nats": [nats, 2 * nats], "tokens": [2, 4]}
        )
    found["sets"]["validation"]["pictured"] = [True] * ITEMS
    return found | {
        "missing": ["relative_size", "captions"],
        "training": {"valm": {"steps": 480, "base_share": 0.25, "eval_perplexity": 12.5}},
    }
