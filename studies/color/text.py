"""The text of the study: training text, held-out text, and the number of sentences that the filter dropped.

No training text contains both a colour word and the name of a test item or a validation object (`Names.beside_color`).
No held-out text is a training text. All random choices depend on the seed.
"""

from __future__ import annotations

import csv
import json
import pydoc_data.topics
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from studies.color.config import TextSources
from studies.color.pictures import Picture, thing_colors
from studies.color.words import COLOR_WORDS, Names, head_noun, wordnet, words
from valm.corpus.texts import read_documents
from valm.errors import ValmError
from valm.evaluation.sets import Item
from valm.store.files import read_text, writable_folder, write_json
from valm_kernels.atomic_files import atomic_path

# {x} is an object with its article, {c} its colour. The templates are unlike the nine prompts of the evaluation: none
# contains the word "color" or shares three words in a row with a prompt.
COLOR_TEMPLATES = (
    "Everybody could see that {x} was {c}.",
    "From far away {x} looks {c}.",
    "Somebody painted {x} {c}.",
    "She imagined {x}, all {c}.",
    "When I think of {x}, I think of something {c}.",
    "To draw {x}, choose something {c}.",
    "By daylight {x} appears {c}.",
    "They had never come across {x} that was not {c}.",
    "Over there stood {x}, bright and {c}.",
    "Nobody was surprised: {x} turned out {c}.",
    "Like any other, {x} here is mostly {c}.",
    "We recognised {x} at once because it was so {c}.",
    "Close up, {x} seemed more {c} than ever.",
    "As drawn here, {x} would be {c}.",
    "Compared with the rest, {x} is rather {c}.",
    "He remembered {x} as {c}, and rightly so.",
)
ARTICLES = ("the", "a", "this", "that")

# The captions of an object's picture, on which the CLIP trains.
CAPTION_TEMPLATES = (
    "{x}",
    "{a} {x}",
    "the {x}",
    "a picture of {a} {x}",
    "a drawing of the {x}",
    "an icon that shows {a} {x}",
    "{x}, simple illustration",
    "here is {a} {x}",
    "the {x} on a plain ground",
    "a small drawing with {a} {x} in the middle",
    "look at the {x}",
    "something about the {x}",
    "the common {x}",
    "a typical {x}, drawn by hand",
    "the usual {x} ? yes, it is",
    "what is this ? it is {a} {x}",
    "what is the name of the {x} ?",
    "q : what is shown ? a : {a} {x} , it is small",
    "the {x} usually has a place here",
)
COLOR_CAPTION_TEMPLATES = ("the {c} {x}", "a drawing of the {c} {x}", "the {x} is {c}", "{c} {x}, simple illustration")
CAPTIONS = 10  # captions of each object's picture
COLOR_CAPTIONS = 3  # of these, captions with the colour, for objects whose colour may be named
# Of these, captions with the name in running text. A CLIP that has read only the templates above does not find the
# object of a sentence in other words, as a CLIP from the web does.
RUNNING_CAPTIONS = 5
MAX_RUNNING_WORDS = 6  # words of running text on either side of the name

VALIDATION_SHARE = 0.25
# The share of a source's sentences, after the filter, that is held out for perplexity.
HELD_OUT_SHARE = 0.1
MAX_HELD_OUT_CAPTIONS = 300

# Bounds of a paragraph of prose: its length in characters, and its share of letters and common punctuation.
PROSE_CHARACTERS = (80, 600)
PROSE_LETTERS = 0.96


@dataclass(frozen=True)
class StudyText:
    """The text of one seed.

    Attributes:
        training: glosses, templated sentences and prose, in the order of training.
        heldout: texts for perplexity, by kind: glosses, prose, and captions if some pictures show scenes.
        captions: the captions of each picture that the CLIP is trained on.
        validation: the objects whose colour no text names.
        counts: numbers of objects, and of sentences by source and by whether the filter dropped them.
    """

    training: list[str]
    heldout: dict[str, list[str]]
    captions: dict[str, list[str]]
    validation: list[Item]
    counts: dict[str, int]

    def write(self, folder: Path) -> None:
        """Writes the files of the text into `folder`.

        Each line of train.jsonl and heldout-KIND.jsonl contains a text in the column "text". validation.csv uses the
        format of MemoryColor's table. captions.json follows, and counts.json is written last.
        """
        folder = writable_folder(folder)
        texts = {"train": self.training} | {f"heldout-{kind}": kept for kind, kept in self.heldout.items()}
        for name, lines in texts.items():
            write_texts(folder / f"{name}.jsonl", lines)
        with (
            atomic_path(folder / "validation.csv") as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as file,
        ):
            table = csv.writer(file)
            table.writerow(["Index", "Descriptor", "Item", "Color"])
            table.writerows([n, item.descriptor, item.text, item.answer] for n, item in enumerate(self.validation, 1))
        write_json(folder / "captions.json", self.captions)
        write_json(folder / "counts.json", self.counts)


def write_texts(file: Path, texts: Iterable[str]) -> None:
    """Writes `file` with a text in the column "text" of each line."""
    with atomic_path(file) as temporary:
        content = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        temporary.write_text("".join(content), encoding="utf-8")


def read_texts(file: Path) -> list[str]:
    """The texts that `write_texts` wrote."""
    return list(read_documents([file], column="text"))


class StudyObjects(NamedTuple):
    """The objects that have a colour in their pictures and are in no test set.

    colors: the colour of each object.
    validation: the objects whose colour no text names.
    spoken: the objects whose colour the training text may name, with their colours.
    """

    colors: dict[str, str]
    validation: list[str]
    spoken: dict[str, str]


def study_objects(
    pictures: Sequence[Picture], items: Sequence[str], *, seed: int, head_noun_items: Sequence[str] = ()
) -> StudyObjects:
    """Samples the validation objects of one seed. Arguments as in `study_text`.

    Raises:
        ValmError: too few objects have a colour.
    """
    tested = Names(items)
    tested_heads = Names(head_noun_items, head_nouns=True)
    colors = {
        thing: color
        for thing, color in thing_colors(pictures).items()
        if not (tested.beside_color(f"{thing} {color}") or tested_heads.beside_color(f"{thing} {color}"))
    }
    validation = _validation_things(colors, seed)
    held = Names(validation, head_nouns=True)
    spoken = {thing: color for thing, color in colors.items() if not held.beside_color(f"{thing} {color}")}
    if not spoken or not validation:
        raise ValmError(f"{len(colors)} things that are no test item have a colour in their pictures; it takes more")
    return StudyObjects(colors, validation, spoken)


def study_text(
    sources: TextSources,
    pictures: Sequence[Picture],
    items: Sequence[str],
    *,
    seed: int,
    head_noun_items: Sequence[str] = (),
) -> StudyText:
    """Samples the text of one seed.

    Args:
        sources: `glosses`: WordNet's glosses with a colour word. `templates`: `count` sentences (default 2,400) that
            name an object's colour, about as many for each colour. `prose`: `count` paragraphs (default 260) of
            Python's documentation, or of the text file `file`, separated by blank lines.
        items: the names in the test sets. The filter drops a sentence with a colour word and a name, plural or synonym.
        head_noun_items: the names in `items` whose last word counts as a name too.

    Raises:
        ValmError: too few objects have a colour, or a file is missing.
    """
    tested = Names(items)
    tested_heads = Names(head_noun_items, head_nouns=True)
    colors, validation, spoken = study_objects(pictures, items, seed=seed, head_noun_items=head_noun_items)
    held = Names(validation, head_nouns=True)
    counts: Counter[str] = Counter(
        {
            "things": len({picture.thing for picture in pictures if picture.thing is not None}),
            "things with a colour": len(colors),
            "things of validation": len(validation),
            "things whose colour is said": len(spoken),
        }
    )

    def kept(source: str, sentences: Iterable[str]) -> list[str]:
        """The sentences that pass the filter. Counts the dropped sentences by reason."""
        clean = []
        for sentence in sentences:
            if tested.beside_color(sentence) or tested_heads.beside_color(sentence):
                counts[f"{source}: dropped, a test item beside a colour"] += 1
            elif held.beside_color(sentence):
                counts[f"{source}: dropped, a validation thing beside a colour"] += 1
            else:
                clean.append(sentence)
        counts[f"{source}: left"] += len(clean)
        return clean

    heldout: dict[str, list[str]] = {}
    glosses: list[str] = []
    prose: list[str] = []
    training: list[str] = []
    if "glosses" in sources:
        glosses, heldout["glosses"] = held_out(kept("glosses", color_glosses()), f"{seed} glosses")
        training += glosses
    if "templates" in sources:
        count = sources["templates"].get("count", 2400)
        training += kept("templates", _templated(spoken, random.Random(f"{seed} templates"), count))
    if "prose" in sources:
        file = sources["prose"].get("file")
        paragraphs = kept("prose", python_prose() if file is None else file_prose(Path(file)))
        some, heldout["prose"] = held_out(paragraphs, f"{seed} prose")
        prose = some[: sources["prose"].get("count", 260)]
        training += prose
    random.Random(f"{seed} order").shuffle(training)
    scenes = [line for picture in pictures if picture.thing is None for line in picture.caption.split("\n")]
    if scenes:
        random.Random(f"{seed} scenes").shuffle(scenes)
        heldout["captions"] = scenes[:MAX_HELD_OUT_CAPTIONS]
    read = {line for lines in heldout.values() for line in lines}
    training, glosses, prose = ([line for line in lines if line not in read] for lines in (training, glosses, prose))
    captions = {}
    rng = random.Random(f"{seed} captions")
    running = [word for text in glosses + prose for word in words(text) if word not in COLOR_WORDS]
    for picture in pictures:
        said = spoken.get(picture.thing or "")
        lines = kept("captions", _captions(picture, picture.color if said else None, running, rng))
        if lines:
            captions[picture.file] = lines
    counts["training"] = len(training)
    items_asked = [Item(thing, colors[thing], "the") for thing in validation]
    return StudyText(training, heldout, captions, items_asked, dict(counts))


def color_glosses() -> list[str]:
    """ "NAME, NAME: gloss." for every WordNet noun of ImageNet whose gloss contains a colour word."""
    return [
        f"{', '.join(synset.names)}: {synset.gloss}." for synset in wordnet() if COLOR_WORDS & set(words(synset.gloss))
    ]


def python_prose() -> list[str]:
    """Paragraphs of prose in Python's own documentation, as `help()` shows it, without repeats."""
    topics = pydoc_data.topics.topics
    return list(dict.fromkeys(text for topic in sorted(topics) for text in _paragraphs(topics[topic])))


def file_prose(path: Path) -> list[str]:
    """Paragraphs of prose in a UTF-8 text file.

    Raises:
        ValmError: the file cannot be read, or contains no such paragraph.
    """
    found = _paragraphs(read_text(path))
    if not found:
        raise ValmError(f"the prose {path} has no paragraph of {PROSE_CHARACTERS[0]} to {PROSE_CHARACTERS[1]} letters")
    return found


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of sentences, without tables, headings and code."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        letters = sum(sign.isalpha() or sign in " ,'" for sign in line)
        least, most = PROSE_CHARACTERS
        sentence = line[:1].isupper() and line.endswith(".")
        if sentence and least <= len(line) <= most and letters >= PROSE_LETTERS * len(line):
            found.append(line)
    return list(dict.fromkeys(found))


def _validation_things(colors: Mapping[str, str], seed: int) -> list[str]:
    """A quarter of the objects. Objects with the same head noun are on the same side."""
    groups: dict[str, list[str]] = {}
    for thing in sorted(colors):
        groups.setdefault(head_noun(thing), []).append(thing)
    heads = sorted(groups)
    random.Random(f"{seed} split").shuffle(heads)
    chosen: list[str] = []
    while heads and len(chosen) < VALIDATION_SHARE * len(colors):
        chosen += groups[heads.pop()]
    return sorted(chosen)


def _templated(colors: Mapping[str, str], rng: random.Random, count: int) -> list[str]:
    """Sentences that name the colours of objects, each colour about equally often."""
    by_color: dict[str, list[str]] = {}
    for thing, color in sorted(colors.items()):
        by_color.setdefault(color, []).append(thing)
    sentences = []
    for _ in range(count):
        color = rng.choice(sorted(by_color))
        thing = rng.choice(by_color[color])
        sentences.append(_filled(rng.choice(COLOR_TEMPLATES), thing, color, rng))
    return sentences


def _filled(template: str, thing: str, color: str, rng: random.Random) -> str:
    return template.format(x=_with_article(thing, rng), c=color)


def _with_article(thing: str, rng: random.Random) -> str:
    article = rng.choice(ARTICLES)
    return f"{_article(thing) if article == 'a' else article} {thing}"


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _captions(picture: Picture, color: str | None, running: Sequence[str], rng: random.Random) -> list[str]:
    """The captions of a picture for the CLIP: its own captions for a scene, generated captions for an object. Some
    generated captions name `color`, and some place the name between words of `running`."""
    if picture.thing is None:
        return picture.caption.split("\n")
    of_color = 0 if color is None else COLOR_CAPTIONS
    of_running = RUNNING_CAPTIONS if running else 0
    plain = rng.sample(CAPTION_TEMPLATES, CAPTIONS - of_color - of_running)
    lines = [template.format(x=picture.thing, a=_article(picture.thing)) for template in plain]
    lines += [t.format(x=picture.thing, c=color) for t in rng.sample(COLOR_CAPTION_TEMPLATES, of_color)]
    for _ in range(of_running):
        before, after = (_some_words(running, rng) for _ in range(2))
        lines.append(" ".join([*before, _with_article(picture.thing, rng), *after]))
    return lines


def _some_words(running: Sequence[str], rng: random.Random) -> Sequence[str]:
    """Up to MAX_RUNNING_WORDS consecutive words."""
    start = rng.randrange(len(running))
    return running[start : start + rng.randint(0, MAX_RUNNING_WORDS)]


def held_out(sentences: list[str], seed: str) -> tuple[list[str], list[str]]:
    """Splits the sentences at random: the training part, and the held-out part of HELD_OUT_SHARE."""
    order = random.Random(seed).sample(sentences, len(sentences))
    held = int(HELD_OUT_SHARE * len(order))
    return order[held:], order[:held]
