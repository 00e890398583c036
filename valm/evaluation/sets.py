"""The evaluation sets (sets.yaml) and their file formats. This package contains none of the sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from valm.errors import ValmError
from valm.evaluation.files import read_csv, read_json_lines, read_lines, read_rows
from valm.evaluation.language import NO_LAST_WORD, before_last_word
from valm.store.files import short_names
from valm_kernels.json_files import short

# The environment variable that names the default folder of the files.
DATA_VARIABLE = "VALM_EVAL_DATA"


@dataclass(frozen=True)
class Item:
    """An object or a text to ask about, and its right answer. descriptor: the words before an object's name ("a", "the
    inside of a", ""); None if the data contain none. choices: for the user's own questions."""

    text: str
    answer: str
    descriptor: str | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationSet:
    """A set of items in a file, and how to ask about them; sets.yaml describes each field."""

    name: str
    title: str
    group: str
    protocols: tuple[str, ...]
    file: str
    read: str
    ask: str
    items: int = 0
    source: str = ""
    url: str = ""
    licence: str = "not stated"
    prompts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)
    hub: Mapping[str, str] | None = None
    table: int | None = None
    note: str = ""

    def load(self, path: Path) -> list[Any]:
        """The items in a file: a list of `Item`, of pairs (bigger, smaller), or of texts. Raises ValmError if a row
        does not parse."""
        return READERS[self.read](path, self)


def _packaged() -> dict[str, EvaluationSet]:
    content = yaml.safe_load(Path(__file__).with_name("sets.yaml").read_text(encoding="utf-8"))
    found = {}
    for name, said in content["sets"].items():
        classes = said.get("classes", {})
        lists = {
            "protocols": tuple(said["protocols"]),
            "prompts": tuple(content["prompts"].get(said.get("prompts"), ())),
            "labels": tuple(content["labels"].get(said.get("labels"), classes.values())),
        }
        found[name] = EvaluationSet(**{"name": name} | said | lists)
    return found


def _things(path: Path, _: EvaluationSet) -> list[Item]:
    return [Item(row["sub"], row["obj"]) for row in read_json_lines(path, {"sub", "obj"})]


def _pairs(path: Path, _: EvaluationSet) -> list[tuple[str, str]]:
    return [(row["sub"], row["obj"]) for row in read_json_lines(path, {"sub", "obj"})]


def _size_pairs(path: Path, _: EvaluationSet) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if len(words) != 2:
            raise ValmError(f"{path}, line {number}: expected two words, got {len(words)}")
        pairs.append((words[0], words[1]))
    return pairs


def load_memory_color(path: str | os.PathLike) -> list[Item]:
    """MemoryColor (Norlund et al. 2021): 109 rows of Index,Descriptor,Item,Color. Raises ValmError if the file has
    other columns."""
    rows = read_csv(path, ["Index", "Descriptor", "Item", "Color"])
    return [Item(row["Item"], row["Color"], row["Descriptor"]) for row in rows]


def _color_terms(path: Path, _: EvaluationSet) -> list[Item]:
    return [Item(row["object"], row["color"]) for row in read_csv(path, ["object", "color"])]


def _sst2(path: Path, of: EvaluationSet) -> list[Item]:
    items = []
    for number, line in enumerate(read_lines(path), 1):
        label, _, text = line.partition(" ")
        if label not in of.classes or not text.strip():
            raise ValmError(f"{path}, line {number}: expected 0 or 1 and a text, got {line[:40]!r}")
        items.append(Item(text.strip(), of.classes[label]))
    return items


def _mpqa(path: Path, of: EvaluationSet) -> list[Item]:
    """mpqa.pos, and mpqa.neg in the same folder."""
    both = zip((path, path.with_suffix(".neg")), of.labels, strict=True)
    return [Item(line.strip(), answer) for file, answer in both for line in read_lines(file)]


def _classes(path: Path, of: EvaluationSet) -> list[Item]:
    """Rows of a class number and a text. Another file in the folder defines the numbers, which differ between copies of
    these sets."""
    meta = path.with_name(path.name.replace("_test.csv", "_meta.txt"))
    names = {}
    for number, line in enumerate(read_lines(meta), 1):
        if line.startswith("#"):
            continue
        key, _, name = line.partition(":")
        if name.strip() not in of.classes:
            raise ValmError(f"{meta}, line {number}: expected NUMBER: CLASS, got {line[:40]!r}")
        names[key.strip()] = of.classes[name.strip()]
    items = []
    for number, row in enumerate(read_rows(path), 1):
        if len(row) != 2 or row[0] not in names:
            raise ValmError(f"{path}, row {number}: expected a class of {meta.name} and a text, got {str(row)[:40]}")
        items.append(Item(row[1].strip(), names[row[0]]))
    return items


def _wikitext(path: Path, _: EvaluationSet) -> list[str]:
    """The articles; each begins with a heading like " = Title = "."""
    articles: list[list[str]] = []
    for line in read_lines(path):
        heading = line.strip()
        if not articles or (heading.startswith("= ") and not heading.startswith("= =")):
            articles.append([])
        articles[-1].append(line)
    return ["\n".join(lines) for lines in articles]


def _lambada(path: Path, _: EvaluationSet) -> list[str]:
    passages = [row["text"] for row in read_json_lines(path, {"text"})]
    for number, passage in enumerate(passages, 1):
        if not before_last_word(passage):
            raise ValmError(f"{path}, line {number}: {NO_LAST_WORD}, got {short(passage)}")
    return passages


def _questions(path: Path, _: EvaluationSet) -> list[Item]:
    items = []
    for number, row in enumerate(read_csv(path, ["question", "answer", "choices"]), 2):
        choices = tuple(map(str.strip, row["choices"].split("|")))
        wrong = ""
        if not row["question"]:
            wrong = "the question is empty"
        elif len(choices) < 2 or "" in choices or len({*choices}) < len(choices):
            wrong = f"expected two or more different choices with | between them, got {row['choices']!r}"
        elif row["answer"] not in choices:
            wrong = f"the answer {row['answer']!r} is not one of the choices {row['choices']}"
        if wrong:
            raise ValmError(f"{path}, row {number}: {wrong}")
        items.append(Item(row["question"], row["answer"], choices=choices))
    return items


READERS: Mapping[str, Callable[[Path, EvaluationSet], list[Any]]] = {
    "things": _things,
    "pairs": _pairs,
    "size_pairs": _size_pairs,
    "memory_color": lambda path, _: load_memory_color(path),
    "color_terms": _color_terms,
    "sst2": _sst2,
    "mpqa": _mpqa,
    "classes": _classes,
    "wikitext": _wikitext,
    "lambada": _lambada,
    "questions": _questions,
}
SETS = _packaged()
# The group of the user's own questions.
OWN = "own"
GROUPS = tuple(dict.fromkeys(entry.group for entry in SETS.values()))


def own_sets(files: Sequence[str | os.PathLike]) -> list[EvaluationSet]:
    """Sets of the user's own questions, named after their files: tables with the columns question, answer, and choices
    with | between them. Raises ValmError if two files would get the same name."""
    files = list({os.path.abspath(file): file for file in files}.values())
    found: dict[str, EvaluationSet] = {}
    for name, file in zip(short_names([Path(file).with_suffix("") for file in files]), files, strict=True):
        own = f"ask-{name.replace('/', '-')}"
        if own in found:
            raise ValmError(f"--ask: {found[own].file} and {file} would both be {own}: rename one of the two")
        found[own] = EvaluationSet(
            name=own,
            title=f"Your questions: {name}",
            group=OWN,
            protocols=("fair",),
            file=str(file),
            read="questions",
            ask="own",
        )
    return list(found.values())


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


def read_set(found: EvaluationSet, data: str | os.PathLike | None = None, *, allow_download: bool = False) -> list[Any]:
    """The items of a set: from `data`, or from the Hub if `allow_download`. Raises ValmError if the set is in neither
    (the message says where to get it), or a row does not parse."""
    file = Path(found.file) if found.group == OWN else find_file(found.name, data)
    if file is not None:
        items = found.load(file)
        if not items:
            raise ValmError(f"{file} contains no items")
        return items
    if found.hub is None or not allow_download:
        folder = data or os.environ.get(DATA_VARIABLE)
        missing = f"no {found.file} in {folder}" if folder else f"neither --data nor {DATA_VARIABLE} names a folder"
        download = ", or allow its download (--allow-download)" if found.hub else ""
        raise ValmError(f"{found.title} is not here ({missing}): get it from {found.url}{download}")
    return _download(found, found.hub)


def _download(found: EvaluationSet, hub: Mapping[str, str]) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{found.title} from the Hub needs datasets: pip install -e '.[huggingface]'") from error
    name = hub["dataset"]
    try:
        rows: Any = datasets.load_dataset(name, hub.get("config"), split=hub["split"], trust_remote_code=False)
    except Exception as error:  # datasets and the hub's client raise many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValmError(f"cannot load {found.title} from the Hub ({name}): {reason}") from error
    words = list(found.classes.values())
    return [Item(row[hub["text"]], words[row["label"]]) if words else row[hub["text"]] for row in rows]
