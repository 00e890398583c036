"""The study's text: nothing leaks, a seed decides everything, and the templates are unlike the prompts."""

import csv
import json
import re
from collections import Counter

import pytest

from studies.color import text as study
from studies.color.pictures import Picture
from studies.color.text import COLOR_TEMPLATES, color_glosses, file_prose, python_prose, study_text
from studies.color.words import COLOR_WORDS, Names, words
from valm.errors import ValmError
from valm.evaluation.questions import COLOR_PROMPTS, COLORS
from valm.evaluation.sets import DATA_VARIABLE, find_file, load_memory_color

SOURCES = {"glosses": {}, "templates": {"count": 200}, "prose": {"count": 20}}
ITEMS = ["tomato", "polar bear"]
ALL_CAPTIONS = (*study.CAPTION_TEMPLATES, *study.COLOR_CAPTION_TEMPLATES)


@pytest.fixture
def glosses(monkeypatch):
    """Few glosses, so that tests are quick; two of them leak."""
    few = [f"zz{n}: a plant with yellow flowers." for n in range(30)]
    planted = ["love apple, tomato: a mildly acid red fruit.", "ice bear: a large bear that is white."]
    monkeypatch.setattr(study, "color_glosses", lambda: [*planted, *few])
    return planted


def drawn(pictures, seed=0, **options):
    return study_text(SOURCES, pictures, ITEMS, seed=seed, **options)


def ngrams(template, thing):
    """Runs of three words, the thing with its article or descriptor as one of them."""
    text = " ".join(template.replace(thing, " thing ").replace("[DESCRIPTOR]", "").split())
    found = words(text)
    return {found[start : start + 3] for start in range(len(found) - 2)}


def test_templates_are_unlike_the_prompts():
    prompts = set().union(*(ngrams(prompt, "[ITEM]") for prompt in COLOR_PROMPTS))
    for template in COLOR_TEMPLATES:
        assert template.count("{x}") == template.count("{c}") == 1
        assert not ngrams(template.replace("{c}", ""), "{x}") & prompts, template
        assert "color" not in template.lower() and "colour" not in template.lower()
    assert ngrams("The color of {x} is {c}.", "{x}") & prompts  # the test finds what it looks for


def test_captions_name_the_thing_in_running_text_without_colours(pictures, glosses):
    text = drawn(pictures)
    of_things = [picture for picture in pictures if picture.thing is not None]
    found = Counter()
    for picture in of_things:
        made = {t.format(x=picture.thing, a=a, c=picture.color) for t in ALL_CAPTIONS for a in ("a", "an")}
        running = [line for line in text.captions[picture.file] if line not in made]
        found[len(running)] += 1
        for line in running:
            before, after = line.split(picture.thing, 1)
            assert not COLOR_WORDS & {*words(before), *words(after)}, line
            assert len(words(before)) <= study.MAX_RUNNING_WORDS + 1 and len(words(after)) <= study.MAX_RUNNING_WORDS
    # now and then, without words on either side, a line is that of a template
    assert found[study.RUNNING_CAPTIONS] > len(of_things) / 2


def test_a_planted_leak_is_dropped_and_counted(pictures, glosses):
    text = drawn(pictures)
    everything = [*text.training, *(line for kind in ("glosses", "prose") for line in text.heldout[kind])]
    assert not set(glosses) & set(everything)
    assert text.counts["glosses: dropped, a test item beside a colour"] == 2
    assert text.counts["glosses: left"] == 30
    assert text.counts["captions: dropped, a test item beside a colour"] == 1  # of the scene
    assert text.captions["photos/00000.png"] == ["A brown dog runs."]
    names = Names(ITEMS)
    assert not [line for line in everything if names.beside_color(line)]


def test_no_item_of_memory_color_stands_beside_a_colour(pictures):
    file = find_file("memory_color")
    if file is None:
        pytest.skip(f"no memory_color_data.csv: {DATA_VARIABLE} names no folder that has it")
    items = [item.text for item in load_memory_color(file)]
    text = study_text({"glosses": {}, "prose": {}}, pictures, items, seed=0)
    color = re.compile(rf"\b({'|'.join(COLORS)}|gray)\b", re.IGNORECASE)
    said = [line for line in text.training if color.search(line)]
    assert len(said) > 500
    for item in set(items) - {"orange"}:
        name = re.compile(rf"\b{item}(s|es)?\b", re.IGNORECASE)
        assert not [line for line in said if name.search(line)], item
        if item in ("tomato", "swan", "milk"):  # WordNet has sentences that leak these
            assert [line for line in color_glosses() if name.search(line) and color.search(line)]


def test_a_thing_that_is_an_item_is_never_coloured(pictures, glosses):
    leaking = [Picture(f"drawn/tomatoes-{n}.png", "tomatoes", "drawn", "tomatoes", "red", "blue") for n in range(3)]
    text = drawn([*pictures, *leaking])
    assert not [line for line in text.training if "tomato" in line]
    assert "tomatoes" not in [item.text for item in text.validation]
    captions = text.captions["drawn/tomatoes-0.png"]
    assert captions and not [line for line in captions if "red" in words(line)]


def test_head_nouns_of_some_items(pictures, glosses, monkeypatch):
    monkeypatch.setattr(study, "color_glosses", lambda: ["a bear: it is brown.", "zz: yellow."] * 10)
    assert any("bear" in line for line in drawn(pictures).training)
    text = drawn(pictures, head_noun_items=["polar bear"])
    assert not any("bear" in line for line in text.training)


def test_validation_things_are_a_quarter_and_silent(pictures, glosses):
    text = drawn(pictures)
    held = {item.text for item in text.validation}
    assert len(held) == 10
    assert not [line for line in text.training if held & set(words(line))]
    for picture in pictures:
        if picture.thing is not None:
            said = any(picture.color in words(line) for line in text.captions[picture.file])
            assert said == (picture.thing not in held)


def test_colours_are_balanced(pictures, glosses):
    reds = [picture for picture in pictures if picture.color == "red" or picture.thing is None]
    few = [picture for picture in pictures if picture.color == "blue"][:8]
    lines = study_text({"templates": {"count": 400}}, [*reds, *few], ITEMS, seed=3).training
    assert 150 < sum("blue" in words(line) for line in lines) < 250


def test_a_seed_decides_everything_and_nothing_held_out_is_trained_on(pictures, glosses):
    one, again, two = (drawn(pictures, seed) for seed in (1, 1, 2))
    assert one == again
    assert one.validation != two.validation
    assert sorted(one.training) != sorted(two.training)
    assert one.heldout["glosses"] != two.heldout["glosses"]
    for kind in ("glosses", "prose"):
        assert one.heldout[kind] and not set(one.heldout[kind]) & set(one.training)


def test_repeats_do_not_bring_held_out_texts_into_training(pictures, monkeypatch):
    repeated = [f"zz{n}: a plant with yellow flowers." for n in range(30)] * 3
    topics = {topic: "\n\n".join(python_prose()[:40]) for topic in "abc"}
    monkeypatch.setattr(study, "color_glosses", lambda: repeated)
    monkeypatch.setattr(study.pydoc_data.topics, "topics", topics)
    text = drawn(pictures)
    read = {line for lines in text.heldout.values() for line in lines}
    assert read & set(repeated) and read & set(topics["a"].split("\n\n"))
    assert not read & set(text.training)
    assert text.counts["prose: left"] == 40
    assert text.counts["training"] == len(text.training)


def test_files(pictures, glosses, tmp_path):
    text = drawn(pictures)
    text.write(tmp_path / "text")
    lines = (tmp_path / "text/train.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == text.training
    assert load_memory_color(tmp_path / "text/validation.csv") == text.validation
    with open(tmp_path / "text/validation.csv") as file:
        assert next(csv.reader(file)) == ["Index", "Descriptor", "Item", "Color"]
    assert json.loads((tmp_path / "text/counts.json").read_text()) == text.counts
    assert {file.name for file in (tmp_path / "text").iterdir()} == {
        "train.jsonl", "heldout-glosses.jsonl", "heldout-prose.jsonl", "heldout-captions.jsonl",
        "captions.json", "validation.csv", "counts.json",
    }  # fmt: skip


def test_glosses_and_prose_are_there():
    assert len(color_glosses()) > 3000
    prose = python_prose()
    assert len(set(prose)) == len(prose) > 200
    assert all(line[0].isupper() and line.endswith(".") for line in prose)


def test_prose_of_a_file(tmp_path):
    path = tmp_path / "prose.txt"
    sentence = "It was the best of times, it was the worst of times, it was the age of wisdom and of foolishness."
    path.write_text(f"CHAPTER I\n\n{sentence[:50]}\n{sentence[50:]}\n\n1 | 2 | 3\n")
    assert file_prose(path) == [sentence[:50] + (" " if sentence[50] != " " else "") + sentence[50:]]
    path.write_text("short.")
    with pytest.raises(ValmError, match="no paragraph"):
        file_prose(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        file_prose(tmp_path / "missing.txt")


def test_too_few_things_are_named(pictures):
    with pytest.raises(ValmError, match="0 things"):
        study_text({"templates": {}}, pictures[-1:], ITEMS, seed=0)
