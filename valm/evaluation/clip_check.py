"""Evaluates a CLIP as its paper does (Radford et al. 2021), on a folder of the user's images.

Images in class folders: zero-shot accuracy (section 3.1) and a linear probe (section 3.2). Images with captions:
retrieval of captions by image and of images by caption (appendix E.1), recall@1, 5 and 10.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import build_zero_shot_classifier
from torch import Tensor
from typing_extensions import TypedDict

from valm.clip.clip import Clip
from valm.errors import ValmError
from valm.evaluation.statistics import Estimate, accuracy, ratio
from valm.knowledge_base.encode import encode_records
from valm.knowledge_base.format import Skipped
from valm.knowledge_base.records import Encoding, Record
from valm.knowledge_base.sources import Source
from valm.store.files import Sha256, read_json, write_json
from valm.store.shards import ProgressBar

# The mean of many texts of a class classifies better than any single text (section 3.1.4).
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a blurry photo of a {}.",
    "a close photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a drawing of a {}.",
    "a picture of several {}.",
)
RECALL_AT = (1, 5, 10)

# Inverse regularisation strengths that the probe tries; large, because features are unit vectors.
PROBE_C = tuple(10.0**power for power in range(-2, 6))
PROBE_ITERATIONS = 1000
PROBE_FOLDS = 3
MIN_PER_CLASS = 3  # one image for the test, two for two folds

# Scores of a retrieval held at once.
BLOCK_SCORES = 1 << 24

# A file in the folder of a CLIP.
HELD_OUT_FILE = "held-out.json"


class HeldOut(TypedDict):
    """The images that the training of a CLIP held out, and the hash of its weights."""

    clip: Sha256
    images: list[str]


@dataclass(frozen=True)
class LinearProbe:
    """accuracy: on the test images. c: the best inverse regularisation in cross-validation."""

    accuracy: Estimate
    majority: float
    trained_on: int
    tested_on: int
    c: float


@dataclass(frozen=True)
class Classification:
    """How well images are classified.

    Attributes:
        chance: accuracy of a random guess.
        majority: accuracy of always answering the largest class (in `LinearProbe`: on the test images).
        balanced: zero-shot accuracy, averaged over the classes that have images.
        linear_probe: None if a class has fewer than MIN_PER_CLASS images.
    """

    classes: tuple[str, ...]
    pictures: int
    zero_shot: Estimate
    balanced: float
    linear_probe: LinearProbe | None
    chance: float
    majority: float


@dataclass(frozen=True)
class Recall:
    """Share of the questions whose answer is among the first `at` results, and the share for a random order."""

    at: int
    recall: Estimate
    chance: float


@dataclass(frozen=True)
class Retrieval:
    """image_to_text: an image finds any of its captions. text_to_image: a caption finds its image."""

    pictures: int
    captions: int
    image_to_text: tuple[Recall, ...]
    text_to_image: tuple[Recall, ...]


@dataclass(frozen=True)
class ClipCheck:
    """The measurements on a folder; None without labels or without two captions. Intervals are 95 % over images.

    Attributes:
        skipped: uri and reason of damaged images and caption files.
        images: number of images.
        held_out: number of images that were used because the CLIP's training held them out; 0: all images were used.
        listed: number of held-out images in the list in the CLIP's folder; 0 without a list.
    """

    clip: str
    classification: Classification | None
    retrieval: Retrieval | None
    skipped: list[Skipped]
    images: int
    held_out: int
    listed: int


def check_clip(
    source: Source,
    clip: Clip,
    *,
    templates: Sequence[str] = TEMPLATES,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> ClipCheck:
    """Evaluates `clip` on images: by class if all are in at least two class folders, by captions if there are any.

    A CLIP looks too good on images that it was trained on. If `source` contains the images that its training held out
    (`note_held_out`), only those are used.

    Args:
        source: such as `FolderSource(folder)`.
        templates: texts with {} for the class name: the folder's name with blanks for `_` and `-`.
        seed: random seed for the split of the linear probe.

    Raises:
        ValmError: there are neither classes nor captions, or too few readable images; or a template lacks {}.
        ImportError: scikit-learn is not installed, which a linear probe needs.
    """
    if not templates or not all("{}" in template for template in templates):
        raise ValmError(f"each prompt template needs {{}} for the name of the class, got {list(templates)}")
    records = list(source.images())
    classes = [_class_of(record.uri) for record in records if record.source is not None]
    captioned = any(record.caption for record in records)
    labelled = None not in classes and len(set(classes)) > 1
    if not labelled and not captioned:
        raise ValmError(
            f"there is nothing to check a CLIP by: the {len(records):,} images, such as {records[0].uri}, have no "
            "captions, and not all of them are in class folders (two at least)"
        )
    if labelled and min(Counter(classes).values()) >= MIN_PER_CLASS:
        _need_sklearn()  # before the images are encoded
    held_out, listed = held_out_of(clip, records)
    with ProgressBar("encode", " images", 1, progress) as bar:
        shard = encode_records(held_out or records, clip, Encoding(thumbnails=0, workers=workers), bar)
    features = torch.from_numpy(shard.vectors)  # (N, E)
    classification = retrieval = None
    if labelled:
        labels = [str(_class_of(row["uri"])) for row in shard.rows]
        # held-out images are classified among the classes of all images, or the task would be easier
        classification = classify(features, labels, clip, templates, classes=map(str, classes), seed=seed)
    if captioned:
        captions = [row["caption"].splitlines() for row in shard.rows]
        if classification is None or sum(map(bool, captions)) > 1:
            retrieval = retrieve(features, captions, clip)
    return ClipCheck(clip.name, classification, retrieval, shard.skipped, len(classes), len(held_out), listed)


def _class_of(uri: str) -> str | None:
    """The class folder of an image; None if it is in none."""
    return uri.partition("/")[0] if "/" in uri else None


def note_held_out(folder: str | os.PathLike, clip: Clip, records: Iterable[Record]) -> None:
    """Writes the list of `records` that the training of `clip` held out into its folder."""
    noted: HeldOut = {"clip": clip.weights_hash, "images": [_mark(record) for record in records]}
    write_json(Path(folder) / HELD_OUT_FILE, noted)


def held_out_of(clip: Clip, records: Sequence[Record]) -> tuple[list[Record], int]:
    """The `records` that the training of `clip` held out, and the number of listed images. Empty without a list, and if
    `records` contain at most half of the list: then they are other images. Raises ValmError if the list is damaged."""
    file = Path(clip.source or "") / HELD_OUT_FILE
    if clip.source is None or not file.is_file():
        return [], 0
    noted: HeldOut = read_json(file, "the list of held-out images", HeldOut, "delete it")
    marks = set(noted["images"])
    if noted["clip"] != clip.weights_hash:  # the list of an earlier CLIP in the folder
        return [], 0
    found = [record for record in records if _mark(record) in marks]
    return found if 2 * len(found) > len(marks) else [], len(marks)


def _mark(record: Record) -> str:
    """Identifies an image wherever its folder is: its path in the folder, and its size."""
    return f"{record.uri} {record.identity()}"


def classify(
    features: Tensor,
    labels: Sequence[str],
    clip: Clip,
    templates: Sequence[str] = TEMPLATES,
    *,
    classes: Iterable[str] = (),
    seed: int = 0,
) -> Classification:
    """Zero-shot accuracy and linear probe of L2-normalised image features (N, E).

    Args:
        labels: the class of each image.
        classes: further classes to choose from, which may have no images.

    Raises:
        ValmError: there are no images, or fewer than two classes.
    """
    classes = sorted({*labels, *classes})
    if not labels or len(classes) < 2:
        raise ValmError(
            f"there are {len(labels)} readable images of {len(classes)} classes, expected at least one image and two "
            "classes"
        )
    gold = np.array([classes.index(label) for label in labels])  # (N,)
    names = [name.replace("_", " ").replace("-", " ") for name in classes]
    # (E, classes)
    # functions, because str.format would also interpret other braces of a template
    prompts = [partial(template.replace, "{}") for template in templates]
    weights = build_zero_shot_classifier(clip.model, clip.token_ids, names, prompts, device=clip.device)
    right = (features @ weights.float().cpu()).argmax(-1).numpy() == gold
    counts = np.bincount(gold, minlength=len(classes))
    return Classification(
        classes=tuple(classes),
        pictures=len(gold),
        zero_shot=accuracy(right[None]),
        balanced=float(np.mean([right[gold == label].mean() for label in np.unique(gold)])),
        linear_probe=linear_probe(features.numpy(), gold, seed) if counts.min() >= MIN_PER_CLASS else None,
        chance=1 / len(classes),
        majority=float(counts.max() / len(gold)),
    )


def linear_probe(features: np.ndarray, labels: np.ndarray, seed: int) -> LinearProbe:
    """Logistic regression on features (N, E) with labels (N,) int, at least MIN_PER_CLASS of each.

    A fifth of the images, at least as many as there are classes, is the test part, stratified by class.
    Cross-validation on the other images chooses the regularisation for the final fit on all of them.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    _need_sklearn()
    from sklearn.model_selection import train_test_split

    tested = max(len(labels) // 5, len(np.unique(labels)))
    train, test = train_test_split(np.arange(len(labels)), test_size=tested, stratify=labels, random_state=seed)
    folds = min(PROBE_FOLDS, np.unique(labels[train], return_counts=True)[1].min())
    search = fit_probe(features[train], labels[train], folds)
    right = search.predict(features[test]) == labels[test]
    majority = float(np.bincount(labels[test]).max() / len(test))
    return LinearProbe(accuracy(right[None]), majority, len(train), len(test), search.best_params_["C"])


def fit_probe(features: np.ndarray, labels: np.ndarray, folds: int) -> Any:
    """Logistic regression on features (N, E) with labels (N,), whose regularisation cross-validation chooses.

    Args:
        folds: number of folds, stratified by label.

    Returns:
        A fitted `GridSearchCV`.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    _need_sklearn()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    regression = LogisticRegression(max_iter=PROBE_ITERATIONS)
    with warnings.catch_warnings():
        # weak regularisation converges slowly; the result is measured anyway
        warnings.simplefilter("ignore", ConvergenceWarning)
        # among equally good values the first, which is the strongest regularisation
        search = GridSearchCV(regression, {"C": PROBE_C}, cv=folds)
        return search.fit(features, labels)


def _need_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("a linear probe needs scikit-learn: pip install -e '.[eval]'") from error


def retrieve(features: Tensor, captions: Sequence[Sequence[str]], clip: Clip) -> Retrieval:
    """Recall between L2-normalised image features (N, E) and the captions of each image. Images without captions are
    skipped. Raises ValmError if fewer than two images have captions."""
    has = [number for number, lines in enumerate(captions) if lines]
    if len(has) < 2:
        raise ValmError(f"there are {len(has)} readable images with captions, expected at least two")
    image_of = np.repeat(np.arange(len(has)), [len(captions[number]) for number in has])  # (M,)
    texts = clip.encode_texts([line for number in has for line in captions[number]]).cpu()  # (M, E)
    to_text, to_image = ranks(features[has], texts, image_of)
    own = np.bincount(image_of)
    return Retrieval(
        pictures=len(has),
        captions=len(image_of),
        image_to_text=tuple(
            Recall(k, accuracy((to_text < k)[None]), _chance(own, len(image_of), k)) for k in RECALL_AT
        ),
        # the captions of an image are not independent questions
        text_to_image=tuple(
            Recall(
                k,
                ratio(np.bincount(image_of, to_image < k)[None], own[None].astype(float)),
                min(1.0, k / len(has)),
            )
            for k in RECALL_AT
        ),
    )


def ranks(images: Tensor, texts: Tensor, image_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 0; ties count against the right answer.

    Args:
        images: (N, E).
        texts: (M, E), the captions.
        image_of: (M,), ascending, the image of each caption.

    Returns:
        For each image (N,), how many captions of other images are at least as near as the nearest of its own; for each
        caption (M,), how many other images are at least as near as its own.
    """
    image = torch.from_numpy(image_of)
    to_text = torch.empty(len(images), dtype=torch.int64)
    to_image = torch.empty(len(texts), dtype=torch.int64)
    for rows in torch.arange(len(images)).split(max(1, BLOCK_SCORES // len(texts))):
        scores = images[rows] @ texts.T  # (n, M)
        own = image == rows[:, None]
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        to_text[rows] = ((scores >= best) & ~own).sum(1)
    for rows in torch.arange(len(texts)).split(max(1, BLOCK_SCORES // len(images))):
        scores = texts[rows] @ images.T  # (m, N)
        own = scores.gather(1, image[rows, None])
        to_image[rows] = (scores >= own).sum(1) - 1
    return to_text.numpy(), to_image.numpy()


def _chance(own: np.ndarray, captions: int, k: int) -> float:
    """Probability that `k` random captions include one of an image's own, averaged over images."""
    k = min(k, captions)
    return float(np.mean([1 - math.comb(captions - int(n), k) / math.comb(captions, k) for n in own]))
