"""The evaluation sets: their sources and file formats. None of them ships with this package."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valm.errors import ValmError
from valm.evaluation.color import load_color_terms, load_memory_color
from valm.evaluation.files import read_json_lines, read_lines, read_rows
from valm.evaluation.language import load_lambada
from valm.evaluation.size import load_size_pairs

# The environment variable with the default folder of the files.
DATA_VARIABLE = "VALM_EVAL_DATA"

# The words for the classes of AG News and DBPedia, as in Blind-VaLM's scripts, by the classes' own names.
AG_NEWS_LABELS = {"World": "world", "Sports": "sports", "Business": "business", "Sci/Tech": "technology"}
DBPEDIA_LABELS = {
    "Company": "company",
    "EducationalInstitution": "school",
    "Artist": "artist",
    "Athlete": "athlete",
    "OfficeHolder": "politics",
    "MeanOfTransportation": "transportation",
    "Building": "building",
    "NaturalPlace": "nature",
    "Village": "village",
    "Animal": "animal",
    "Plant": "plant",
    "Album": "album",
    "Film": "film",
    "WrittenWork": "book",
}
POSITIVE, NEGATIVE = "Positive", "Negative"


@dataclass(frozen=True)
class Item:
    """A thing or a text to ask about, its right answer, and the words before a thing's name (None if the data have
    none)."""

    text: str
    answer: str
    descriptor: str | None = None


@dataclass(frozen=True)
class Hub:
    """The location of a set on the Hugging Face Hub, and the function that reads a row."""

    dataset: str
    config: str | None
    split: str
    read: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class EvaluationSet:
    """A set of items in a file.

    Attributes:
        file: its path in the data folder.
        load: reads the file: a list of `Item`, of pairs (bigger, smaller), or of texts.
        items: number of items in the file of the published numbers, or in ours.
    """

    name: str
    title: str
    file: str
    load: Callable[[Path], list[Any]]
    source: str
    url: str
    licence: str
    items: int
    hub: Hub | None = None


def _things(path: Path) -> list[Item]:
    return [Item(row["sub"], row["obj"]) for row in read_json_lines(path, {"sub", "obj"})]


def _pairs(path: Path) -> list[tuple[str, str]]:
    return [(row["sub"], row["obj"]) for row in read_json_lines(path, {"sub", "obj"})]


def _memory_color(path: Path) -> list[Item]:
    return [Item(item.item, item.color, item.descriptor) for item in load_memory_color(path)]


def _color_terms(path: Path) -> list[Item]:
    return [Item(item.item, item.color, item.descriptor) for item in load_color_terms(path)]


def _sst2(path: Path) -> list[Item]:
    items = []
    for number, line in enumerate(read_lines(path), 1):
        label, _, text = line.partition(" ")
        if label not in ("0", "1") or not text.strip():
            raise ValmError(f"{path}, line {number}: expected 0 or 1 and a text, got {line[:40]!r}")
        items.append(Item(text.strip(), POSITIVE if label == "1" else NEGATIVE))
    return items


def _mpqa(path: Path) -> list[Item]:
    """mpqa.pos, with mpqa.neg beside it."""
    both = ((path, POSITIVE), (path.with_suffix(".neg"), NEGATIVE))
    return [Item(line.strip(), answer) for file, answer in both for line in read_lines(file)]


def _classes(path: Path, meta: str, labels: Mapping[str, str]) -> list[Item]:
    """Rows of a class number and a text; the file `meta` beside it defines the numbers, which differ between copies of
    these sets."""
    names = {}
    for number, line in enumerate(read_lines(path.with_name(meta)), 1):
        if line.startswith("#"):
            continue
        key, _, name = line.partition(":")
        if name.strip() not in labels:
            raise ValmError(f"{path.with_name(meta)}, line {number}: expected NUMBER: CLASS, got {line[:40]!r}")
        names[key.strip()] = labels[name.strip()]
    items = []
    for number, row in enumerate(read_rows(path), 1):
        if len(row) != 2 or row[0] not in names:
            raise ValmError(f"{path}, row {number}: expected a class of {meta} and a text, got {str(row)[:40]}")
        items.append(Item(row[1].strip(), names[row[0]]))
    return items


def _ag_news(path: Path) -> list[Item]:
    return _classes(path, "agnews_meta.txt", AG_NEWS_LABELS)


def _dbpedia(path: Path) -> list[Item]:
    return _classes(path, "dbpedia_meta.txt", DBPEDIA_LABELS)


def _wikitext(path: Path) -> list[str]:
    """Articles: each begins with a heading like " = Title = "."""
    articles: list[list[str]] = []
    for line in read_lines(path):
        heading = line.strip()
        if not articles or (heading.startswith("= ") and not heading.startswith("= =")):
            articles.append([])
        articles[-1].append(line)
    return ["\n".join(lines) for lines in articles]


def _label_of(labels: Iterable[str], text: str) -> Callable[[Mapping[str, Any]], Item]:
    words = list(labels)
    return lambda row: Item(row[text], words[row["label"]])


VICOMTE = "Zhang et al. 2022, Visual Commonsense in Pretrained Unimodal and Multimodal Models"
VICOMTE_URL = "https://github.com/ChenyuHeidiZhang/VL-commonsense"
ON_HUB = "https://huggingface.co/datasets/"

SETS = {
    entry.name: entry
    for entry in (
        EvaluationSet(
            "memory_color",
            "MemoryColor",
            "object_color/memory_color_data.csv",
            _memory_color,
            "Norlund et al. 2021, Transferring Knowledge from Vision to Language",
            "https://github.com/tobiasnorlund/CMKI",
            "not stated",
            109,
        ),
        EvaluationSet(
            "color_terms",
            "ColorTerms",
            "object_color/color-concrete-objects.csv",
            _color_terms,
            "Bruni et al. 2012, Distributional Semantics in Technicolor",
            "https://github.com/Victorwz/VaLM (data/object_color)",
            "not stated",
            52,
        ),
        EvaluationSet(
            "vicomte_color",
            "ViComTe colour",
            "vicomte/color_single_test.jsonl",
            _things,
            VICOMTE,
            VICOMTE_URL,
            "not stated",
            252,
        ),
        EvaluationSet(
            "object_shape",
            "ObjectShape",
            "vicomte/shape_single_test.jsonl",
            _things,
            VICOMTE,
            VICOMTE_URL,
            "not stated",
            101,
        ),
        EvaluationSet(
            "vicomte_material",
            "ViComTe material",
            "vicomte/material_single_test.jsonl",
            _things,
            VICOMTE,
            VICOMTE_URL,
            "not stated",
            192,
        ),
        EvaluationSet(
            "relative_size",
            "RelativeSize",
            "object_size/sizePairsFull.txt",
            load_size_pairs,
            "Bagherinezhad et al. 2016, Are Elephants Bigger than Butterflies?",
            "https://github.com/Victorwz/VaLM (data/object_size)",
            "not stated",
            486,
        ),
        EvaluationSet(
            "vicomte_size",
            "ViComTe size",
            "vicomte/size_larger_test.jsonl",
            _pairs,
            VICOMTE,
            VICOMTE_URL,
            "not stated",
            200,
        ),
        EvaluationSet(
            "sst2",
            "SST-2",
            "nlu/sst2_dev.txt",
            _sst2,
            "Socher et al. 2013, Recursive Deep Models for Semantic Compositionality",
            ON_HUB + "stanfordnlp/sst2",
            "not stated",
            872,
            Hub("stanfordnlp/sst2", None, "validation", _label_of((NEGATIVE, POSITIVE), "sentence")),
        ),
        EvaluationSet(
            "mpqa",
            "MPQA",
            "nlu/mpqa.pos",
            _mpqa,
            "Wiebe et al. 2005, Annotating Expressions of Opinions and Emotions in Language",
            "https://github.com/facebookresearch/SentEval",
            "GPL, of the corpus",
            10603,
        ),
        EvaluationSet(
            "ag_news",
            "AG News",
            "nlu/agnews_test.csv",
            _ag_news,
            "Zhang et al. 2015, Character-level Convolutional Networks for Text Classification",
            ON_HUB + "fancyzhang/ag_news",
            "non-commercial use",
            6381,
            Hub("fancyzhang/ag_news", None, "test", _label_of(AG_NEWS_LABELS.values(), "text")),
        ),
        EvaluationSet(
            "dbpedia",
            "DBPedia",
            "nlu/dbpedia_test.csv",
            _dbpedia,
            "Zhang et al. 2015, Character-level Convolutional Networks for Text Classification",
            ON_HUB + "fancyzhang/dbpedia_14",
            "CC BY-SA 3.0",
            5000,
            Hub("fancyzhang/dbpedia_14", None, "test", _label_of(DBPEDIA_LABELS.values(), "content")),
        ),
        EvaluationSet(
            "wikitext103",
            "WikiText-103",
            "wikitext-103/wiki.test.raw",
            _wikitext,
            "Merity et al. 2017, Pointer Sentinel Mixture Models",
            ON_HUB + "EleutherAI/wikitext_document_level",
            "CC BY-SA 3.0",
            60,
            Hub("EleutherAI/wikitext_document_level", "wikitext-103-raw-v1", "test", lambda row: row["page"]),
        ),
        EvaluationSet(
            "lambada",
            "LAMBADA",
            "lambada/lambada_test.jsonl",
            load_lambada,
            "Paperno et al. 2016, The LAMBADA Dataset",
            ON_HUB + "EleutherAI/lambada_openai",
            "CC BY 4.0",
            5153,
            Hub("EleutherAI/lambada_openai", "default", "test", lambda row: row["text"]),
        ),
    )
}


def find_file(name: str, data: str | os.PathLike | None = None) -> Path | None:
    """The file of the set `name` in the folder `data` or in `data`/eval; None if there is none.

    Args:
        data: by default the value of the environment variable DATA_VARIABLE.
    """
    folder = data or os.environ.get(DATA_VARIABLE)
    if not folder:
        return None
    places = (Path(folder) / SETS[name].file, Path(folder) / "eval" / SETS[name].file)
    return next((place for place in places if place.is_file()), None)


def read_set(name: str, data: str | os.PathLike | None = None, *, allow_download: bool = False) -> list[Any]:
    """The items of the set `name`: from `data`, or from the Hub where `allow_download`.

    Raises:
        ValmError: it is in neither (the message says where to get it), or a row does not parse.
    """
    found = SETS[name]
    file = find_file(name, data)
    if file is not None:
        items = found.load(file)
        if not items:
            raise ValmError(f"{file} has no items")
        return items
    if found.hub is None or not allow_download:
        folder = data or os.environ.get(DATA_VARIABLE)
        missing = f"no {found.file} in {folder}" if folder else f"neither --data nor {DATA_VARIABLE} names a folder"
        download = ", or allow its download (--allow-download)" if found.hub else ""
        raise ValmError(f"{found.title} is not here ({missing}): get it from {found.url}{download}")
    return _download(found.title, found.hub)


def _download(title: str, hub: Hub) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{title} is read from the Hub by datasets: pip install -e '.[huggingface]'") from error
    try:
        rows: Any = datasets.load_dataset(hub.dataset, hub.config, split=hub.split, trust_remote_code=False)
    except Exception as error:  # datasets and the hub's client raise many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValmError(f"cannot load {title} from the Hub ({hub.dataset}): {reason}") from error
    return [hub.read(row) for row in rows]
