"""Rendered prompts, and how often each set's answers occur."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.valm.evaluation.small_sets import write_sets
from valm.errors import ValmError
from valm.evaluation.questions import FAIR, PUBLISHED, YES_NO, chosen_sets, fill, objects_of, what_is_asked
from valm.evaluation.sets import SETS, own_sets

DATA = os.environ.get("VALM_EVAL_DATA")
FIXTURE = Path(__file__).parents[2] / "fixtures" / "prompts.json"
needs_data = pytest.mark.skipif(not DATA, reason="VALM_EVAL_DATA does not say where the evaluation sets are")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_sets(root)
    return root


@pytest.mark.parametrize("task", json.loads(FIXTURE.read_text(encoding="utf-8")))
def test_prompts_are_the_published_ones_byte_for_byte(data, task):
    expected = json.loads(FIXTURE.read_text(encoding="utf-8"))[task]
    for protocol in (PUBLISHED, FAIR):
        asked = what_is_asked(SETS[task], protocol, data)
        assert list(asked.texts[0]) == expected[protocol]
        if protocol == PUBLISHED and task in ("memory_color", "color_terms"):
            assert asked.candidates == ("yellow", "red", "blue", "white")
        elif "candidates" in expected:
            assert list(asked.candidates) == expected["candidates"]


@needs_data
@pytest.mark.parametrize(
    "task, protocol, items, prompts, majority",
    [
        # the paper's majorities where it has them: SST-2 50.9, MPQA 50
        ("memory_color", PUBLISHED, 109, 9, 25 / 109),
        ("color_terms", FAIR, 52, 9, 10 / 52),
        ("vicomte_color", FAIR, 252, 9, 97 / 252),
        ("object_shape", PUBLISHED, 101, 5, 81 / 101),
        ("relative_size", PUBLISHED, 486, 4, 1),
        ("relative_size", FAIR, 486, 12, 0.5),
        ("vicomte_size", FAIR, 200, 12, 0.5),
        ("vicomte_material", FAIR, 192, 4, 54 / 192),
        ("sst2", PUBLISHED, 872, 1, 444 / 872),
        ("mpqa", PUBLISHED, 2000, 1, 0.5),
        ("mpqa", FAIR, 10603, 1, 7292 / 10603),
        ("dbpedia", FAIR, 5000, 1, 382 / 5000),
        ("ag_news", FAIR, 6381, 1, 1658 / 6381),
    ],
)
def test_the_real_sets_have_the_known_majorities(task, protocol, items, prompts, majority):
    asked = what_is_asked(SETS[task], protocol, DATA)
    counts = Counter(answer for row in asked.right for answer in row)
    assert (len(asked.items), len(asked.texts[0])) == (items, prompts)
    assert max(counts.values()) / counts.total() == pytest.approx(majority)


def test_a_thing_is_asked_for_with_its_descriptor():
    first, *_, last = SETS["memory_color"].prompts
    assert fill(first, "banana", None, fair=True) == "Q: What is the color of the banana? A: It is"
    assert fill(first, "banana", None, fair=False) == "Q: What is the color of [DESCRIPTOR] banana? A: It is"
    assert fill(last, "fur", "the inside of a", fair=True) == "the inside of a fur usually has the color of"
    assert fill(last, "snow", "", fair=True) == "snow usually has the color of"


def test_the_objects_of_pairs():
    assert objects_of(["bus > cat", "polar bear > bus"], YES_NO).tolist() == [[0, 1], [2, 0]]
    assert objects_of(["a review > the film"], ("Positive", "Negative")) is None


def test_the_answer_of_a_pair_is_yes_in_one_order(data):
    asked = what_is_asked(SETS["relative_size"], FAIR, data)
    assert asked.right == ((0, 1) * 6,) * 3
    assert what_is_asked(SETS["relative_size"], PUBLISHED, data).right == ((0,) * 4,) * 3


def test_published_wikitext_is_its_paragraphs(data):
    published, fair = (what_is_asked(SETS["wikitext103"], protocol, data) for protocol in (PUBLISHED, FAIR))
    assert len(fair.texts) == 2 and fair.texts[0].startswith(" = Title") and "Another" in fair.texts[0]
    paragraphs = (" = Title = ", " One line . ", " = = Part = = ", " Another . ", " = Second = ", " Third . ")
    assert published.texts == paragraphs


@pytest.mark.parametrize("name, protocol", [("memory_color", PUBLISHED), ("memory_color", FAIR), ("lambada", FAIR)])
def test_a_limit_asks_items_as_among_all(data, name, protocol):
    """The candidates of the published MemoryColor are the colours of its items."""
    whole, some, again = (what_is_asked(SETS[name], protocol, data, limit=limit) for limit in (None, 1, 1))
    assert some == again and len(some.texts) == 1 < len(whole.texts) and set(some.texts) < set(whole.texts)
    if name == "memory_color":
        assert some.candidates == whole.candidates
        assert some.right == (whole.right[whole.items.index(some.items[0])],)


def test_tasks_and_groups_by_name():
    found = [one.name for one in chosen_sets(["color", "sst2", "sst2"])]
    assert found == ["memory_color", "color_terms", "vicomte_color", "sst2"]
    with pytest.raises(ValmError, match="no task 'colour': did you mean 'color'"):
        chosen_sets(["colour"])
    with pytest.raises(ValmError, match="no tasks are named"):
        chosen_sets([])
    with pytest.raises(ValmError, match="has no protocol 'published', only fair"):
        what_is_asked(SETS["vicomte_size"], PUBLISHED)


@pytest.mark.parametrize(
    "task, content, message",
    [
        ("vicomte_material", '{"sub": "a", "obj": "fog"}', "'fog' in ViComTe"),
        ("color_terms", "object,color\nsea,teal", "'teal' in ColorTerms is not"),
    ],
)
def test_an_answer_that_is_no_label_is_named(tmp_path, task, content, message):
    (tmp_path / SETS[task].file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / SETS[task].file).write_text(content)
    with pytest.raises(ValmError, match=message):
        what_is_asked(SETS[task], FAIR, tmp_path)


def test_ones_own_questions(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("question,answer,choices\nIs 3 > 2?,yes,yes|no\nIs 1 > 2?,no,no|yes\n")
    (mine,) = own_sets([file, file])
    asked = what_is_asked(mine, FAIR)
    assert (asked.task, mine.title) == ("ask-mine", "Your questions: mine")
    assert (asked.candidates, asked.right, asked.choices) == (("yes", "no"), ((0,), (1,)), ())
    assert asked.objects is None  # of no pairs, though their texts look so
    file.write_text("question,answer,choices\nA,x,x|y\nB,z,y|z|w\nC,x,x|y\n")
    asked = what_is_asked(mine, FAIR)
    assert (asked.candidates, asked.right) == ((), ((0,), (1,), (0,)))
    assert asked.choices == (("x", "y"), ("y", "z", "w"), ("x", "y"))
    some = what_is_asked(mine, FAIR, limit=2)
    own = dict(zip(asked.items, asked.choices, strict=True))
    assert some.choices == tuple(own[item] for item in some.items)
    (tmp_path / "b").mkdir()
    titles = [one.title for one in own_sets([file, tmp_path / "b" / "mine.csv"])]
    assert titles == [f"Your questions: {tmp_path.name}/mine", "Your questions: b/mine"]
    assert [one.file for one in own_sets([file, f"{tmp_path}/b/../mine.csv"])] == [f"{tmp_path}/b/../mine.csv"]
