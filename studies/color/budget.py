"""Where a colour is lost between the pictures and the answer: the budget of a finished seed.

Its numbers are shares of the questions about the seed's validation objects: every prompt about every object. No test
set is asked. The names in the test sets only tell which objects the training text names without their colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from studies.color.captions import last_images
from studies.color.conditions import Conditions, commonest
from studies.color.config import COLORED_CAPTIONS, VALIDATION, StudyConfig
from studies.color.pictures import read_pictures
from studies.color.questions import COLOR_SETS, item_names, validation_questions
from studies.color.report import BUDGET_ROWS
from studies.color.results import read_results
from studies.color.run import RESULTS_FILE, language_model
from studies.color.seed_scores import Scoring
from studies.color.study import STUDY_FILE, Study
from studies.color.text import study_objects
from valm.cli import main
from valm.errors import ValmError
from valm.evaluation.clip_check import PROBE_FOLDS, fit_probe
from valm.evaluation.questions import Questions
from valm.store.files import read_json, write_json

BUDGET_FILE = "budget.json"
RUN = "run `python -m studies.color run CONFIG --out"
# A budget describes the first of these arms that the study has.
ARMS_WITH_IMAGES = ("reading", "cut", "valm")


class Images(NamedTuple):
    """The K images of the token before each of n answers.

    own: (n, K) bool, whether the image shows the object of the question.
    colors: the colour word of each image's pixels, None if no colour prevails.
    scores: (n, K), -inf = no image.
    vectors: (n, K, E).
    """

    own: np.ndarray
    colors: Sequence[Sequence[str | None]]
    scores: np.ndarray
    vectors: np.ndarray


def finished_seeds(
    out: Path, data: Path | None, seeds: Sequence[int] | None = None, progress: bool = True
) -> tuple[Study, dict[int, Path]]:
    """The study in `out`, and the results file of each finished seed, or of each seed in `seeds`.

    Raises:
        ValmError: `out` contains no study or a study of another recipe, or a seed is not finished.
    """
    if not (out / STUDY_FILE).is_file():
        raise ValmError(f"{out} contains no study, because it lacks {STUDY_FILE}: {RUN} {out}`")
    note = read_json(out / STUDY_FILE, "the note on a study", dict[str, Any], "run the study again")
    try:
        config = StudyConfig(**note["config"])
    except (KeyError, TypeError, ValueError):  # a field or an arm of other code
        config = None
    if config is None or config.recipe != note.get("recipe"):
        raise ValmError(f"other code made the study in {out}: run the study again in another folder")
    study, files = Study(config, out, main, data, validation=True, progress=progress), {}
    for seed in config.seeds if seeds is None else seeds:
        names = (RESULTS_FILE, f"{VALIDATION}-{RESULTS_FILE}")
        found = [file for name in names if (file := study.seed_folder(seed) / name).is_file()]
        if found:
            files[seed] = found[0]
        elif seeds is not None:
            raise ValmError(f"seed {seed} in {out} is not finished: {RUN} {out} --seed {seed}`")
    if not files:
        raise ValmError(f"no seed in {out} is finished: {RUN} {out}`")
    return study, files


def write_budget(study: Study, seed: int, results: Path) -> dict[str, Any]:
    """Writes the budget of a seed to BUDGET_FILE in its folder, and returns it.

    It contains the share of questions for each of BUDGET_ROWS, None if the study lacks it, and the numbers of questions
    and of the pictures that train the probe.

    Raises:
        ValmError: no arm sees images, too few objects have a colour, or the test sets are not those of the run.
        ImportError: scikit-learn is not installed.
    """
    config = study.config
    arm = next((name for name in ARMS_WITH_IMAGES if name in config.arms), None)
    if arm is None:
        raise ValmError(
            f"no arm of {study.out} sees images: add one of {', '.join(ARMS_WITH_IMAGES)}, and run the study again"
        )
    pictures, known = read_pictures(study.pictures), read_results([results])
    scoring = Scoring(study, seed, language_model(config.language_model, study.out / "language-model"), pictures)
    names, heads = item_names(COLOR_SETS, study.data), item_names(COLOR_SETS[:2], study.data)
    objects = study_objects(pictures, names, seed=seed, head_noun_items=heads)
    if objects.validation != [thing.text for thing in scoring.things]:
        raise ValmError(f"the study in {study.out} ran with other test sets: name their folder with --data")
    probe, count = color_probe(scoring.conditions, objects.spoken)
    asked, model = validation_questions(scoring.things), scoring.open(arm)
    min_score = model.fusion_options.min_score
    answers = np.array([asked.candidates[right] for row in asked.right for right in row])
    shares = shares_of_images(answers, retrieved_images(asked, scoring.conditions), min_score, probe)
    for row, one in {"mixed": (arm, "retrieved"), "colors_in_prompt": ("base", COLORED_CAPTIONS)}.items():
        if accuracy := known.accuracy(one, VALIDATION):
            shares[row] = accuracy.value
    numbers = {"questions": len(answers), "pictures": count, "images": config.images, "min_score": min_score}
    about = {"study": config.name, "recipe": config.recipe, "seed": seed, "arm": arm}
    budget = about | numbers | {"shares": {row: shares.get(row) for row in BUDGET_ROWS}}
    write_json(study.seed_folder(seed) / BUDGET_FILE, budget)
    return budget


def color_probe(conditions: Conditions, objects: Mapping[str, str]) -> tuple[Any, int]:
    """A linear probe for the colour word of an image vector, and the number of pictures that it is trained on.

    VaLM reads its images through linear maps and a mean that attention weights. The probe's accuracy on the mean bounds
    what any linear reading of the mean can reach, as far as a probe of these pictures can tell.

    Args:
        objects: the objects whose pictures train the probe. No validation object is among them.
    """
    shown = [(id, one) for id, one in enumerate(conditions.shown) if one.thing in objects and one.color is not None]
    colors, names = np.array([one.color for _, one in shown]), np.array([one.thing for _, one in shown])
    if len(set(colors)) < 2 or len(set(names)) < PROBE_FOLDS:
        raise ValmError(f"{len(set(names))} objects cannot train a probe of colours: add sources of pictures")
    vectors = conditions.kb.gather(np.array([id for id, _ in shown])).astype(np.float32)
    return fit_probe(vectors, colors, PROBE_FOLDS, names), len(shown)  # the pictures of an object are in one fold


def retrieved_images(asked: Questions, conditions: Conditions) -> Images:
    """The images of the last token of each question."""
    ids, scores = last_images([text for row in asked.texts for text in row], conditions["retrieved"])
    own, prompts = [conditions.pictures_of(item) for item in asked.items], len(asked.texts[0])
    shown = [[conditions.shown[id] if id >= 0 else None for id in row] for row in ids.tolist()]
    vectors = conditions.kb.gather(ids.clamp(min=0).flatten().numpy()).astype(np.float32)
    return Images(
        np.array([[picture in own[number // prompts] for picture in row] for number, row in enumerate(shown)]),
        [[picture and picture.color for picture in row] for row in shown],
        scores.numpy(),
        vectors.reshape(*ids.shape, -1),
    )


def shares_of_images(answers: np.ndarray, images: Images, min_score: float | None, probe: Any) -> dict[str, float]:
    """The shares that need no language model.

    Args:
        answers: (n,), the correct colour words.
        min_score: None leaves out the rows of the threshold.
        probe: its `predict` names the colours of vectors (n, E).
    """

    def from_mean(of: np.ndarray) -> np.ndarray:
        """Whether the probe is right about the mean of the vectors `of` (n, K) bool; False for a question of none."""
        means = (images.vectors * of[..., None]).sum(1) / np.maximum(of.sum(1, keepdims=True), 1)
        return (probe.predict(means) == answers) & of.any(1)

    there = np.isfinite(images.scores)
    right = {
        "retrieved": images.own.any(1),
        "pixels": np.array([commonest(row) or "" for row in images.colors]) == answers,
        "probe_of_best": from_mean(there & (np.arange(there.shape[1]) == 0)),
        "probe_of_mean": from_mean(there),
    }
    if min_score is not None:
        above = there & (images.scores >= min_score)
        right["seen"] = images.own.any(1) & above.any(1)  # the best score decides, see valm.retrieval.min_score.cut
        right["own_above"] = (images.own & above).any(1)
        right["probe_of_mean_above"] = from_mean(above)
    return {row: float(hits.mean()) for row, hits in right.items()}
