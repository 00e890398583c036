"""Rendered prompts, and how often each set's answers occur."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.valm.evaluation.small_sets import write_sets
from valm.errors import ValmError
from valm.evaluation.questions import FAIR, MATERIALS, PUBLISHED, TASKS, VICOMTE_COLORS, chosen_tasks, what_is_asked
from valm.evaluation.sets import SETS

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
        asked = what_is_asked(TASKS[task], protocol, data)
        assert list(asked.texts[0]) == expected[protocol]
        if "candidates" in expected and task not in ("memory_color", "color_terms"):
            assert list(asked.candidates) == expected["candidates"]
    if task in ("memory_color", "color_terms"):
        assert list(what_is_asked(TASKS[task], FAIR, data).candidates) == expected["candidates"]
        assert what_is_asked(TASKS[task], PUBLISHED, data).candidates == ("yellow", "red", "blue", "white")


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
    asked = what_is_asked(TASKS[task], protocol, DATA)
    counts = Counter(answer for row in asked.right for answer in row)
    assert (len(asked.items), len(asked.texts[0])) == (items, prompts)
    assert max(counts.values()) / counts.total() == pytest.approx(majority)


@needs_data
@pytest.mark.parametrize("task, labels", [("vicomte_color", VICOMTE_COLORS), ("vicomte_material", MATERIALS)])
def test_the_candidates_are_all_labels_of_the_set(task, labels):
    folder = Path(DATA) / "eval/vicomte"
    name = task.removeprefix("vicomte_")
    rows = [json.loads(line) for part in ("train", "test") for line in (folder / f"{name}_single_{part}.jsonl").open()]
    assert {row[key] for row in rows for key in ("obj", "alt")} == set(labels)


def test_the_answer_of_a_pair_is_yes_in_one_order(data):
    asked = what_is_asked(TASKS["relative_size"], FAIR, data)
    assert asked.right == ((0, 1) * 6,) * 3
    assert what_is_asked(TASKS["relative_size"], PUBLISHED, data).right == ((0,) * 4,) * 3


def test_published_wikitext_is_its_paragraphs(data):
    published, fair = (what_is_asked(TASKS["wikitext103"], protocol, data) for protocol in (PUBLISHED, FAIR))
    assert len(fair.texts) == 2 and fair.texts[0].startswith(" = Title") and "Another" in fair.texts[0]
    assert published.texts == (
        " = Title = ",
        " One line . ",
        " = = Part = = ",
        " Another . ",
        " = Second = ",
        " Third . ",
    )


@pytest.mark.parametrize("name, protocol", [("memory_color", PUBLISHED), ("memory_color", FAIR), ("lambada", FAIR)])
def test_a_limit_asks_items_as_among_all(data, name, protocol):
    """The candidates of the published MemoryColor are the colours of its items."""
    whole, some = (what_is_asked(TASKS[name], protocol, data, limit=limit) for limit in (None, 1))
    assert len(some.texts) == 1 < len(whole.texts) and set(some.texts) < set(whole.texts)
    if name == "lambada":
        return
    assert some.candidates == whole.candidates and len(some.items) == 1
    for item, right in zip(some.items, some.right, strict=True):
        assert right == whole.right[whole.items.index(item)]


def test_a_limit_draws_the_same_items_again(data):
    one, two = (what_is_asked(TASKS["memory_color"], FAIR, data, limit=2) for _ in range(2))
    assert one == two and len(one.items) == 2


def test_tasks_and_groups_by_name():
    assert [task.name for task in chosen_tasks("color, sst2,sst2")] == [
        "memory_color", "color_terms", "vicomte_color", "sst2",
    ]  # fmt: skip
    with pytest.raises(ValmError, match="no task 'colour': did you mean 'color'"):
        chosen_tasks("colour")
    with pytest.raises(ValmError, match="no tasks are named"):
        chosen_tasks(" ")
    with pytest.raises(ValmError, match="has no protocol 'published', only fair"):
        what_is_asked(TASKS["vicomte_size"], PUBLISHED)


@pytest.mark.parametrize(
    "file, content, task, message",
    [
        ("nlu/sst2_dev.txt", "1 good\n2 bad", "sst2", r"sst2_dev\.txt, line 2: expected 0 or 1"),
        ("nlu/agnews_test.csv", '"7","text"', "ag_news", r"agnews_test\.csv, row 1: expected a class"),
        ("nlu/agnews_meta.txt", "1: Weather", "ag_news", r"agnews_meta\.txt, line 1: expected NUMBER: CLASS"),
        ("vicomte/material_single_test.jsonl", '{"sub": "a"}', "vicomte_material", "line 1: expected an object"),
        ("vicomte/material_single_test.jsonl", '{"sub": "a", "obj": "fog"}', "vicomte_material", "'fog' in ViComTe"),
        ("lambada/lambada_test.jsonl", "\n", "lambada", "has no items"),
    ],
)
def test_wrong_rows_are_named(tmp_path, file, content, task, message):
    write_sets(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValmError, match=message):
        what_is_asked(TASKS[task], FAIR, tmp_path)


def test_a_missing_file_says_where_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(ValmError, match=r"SST-2 is not here \(no nlu/sst2_dev.txt in .*get it from https://.*sst2, or"):
        what_is_asked(TASKS["sst2"], FAIR, tmp_path)
    monkeypatch.delenv("VALM_EVAL_DATA", raising=False)
    with pytest.raises(ValmError, match="neither --data nor VALM_EVAL_DATA"):
        what_is_asked(TASKS["memory_color"], FAIR)


def test_a_set_without_a_file_is_read_from_the_hub_where_that_is_allowed(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names, split, trust_remote_code):
        asked.append((*names, split, trust_remote_code))
        return datasets.Dataset.from_list([{"text": "Shares fell.", "label": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = what_is_asked(TASKS["ag_news"], FAIR, tmp_path, allow_download=True)
    assert asked == [("fancyzhang/ag_news", None, "test", False)]
    assert found.candidates[found.right[0][0]] == "business"

    def unreachable(*names, split, trust_remote_code):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValmError, match=r"cannot load AG News from the Hub \(fancyzhang/ag_news\): no route"):
        what_is_asked(TASKS["ag_news"], FAIR, tmp_path, allow_download=True)


def test_the_documentation_has_every_set():
    lines = (Path(__file__).parents[3] / "docs" / "reference" / "test-sets.md").read_text(encoding="utf-8").splitlines()
    for name, entry in SETS.items():
        facts = (
            f"`{name}`",
            entry.title,
            f"{entry.items:,}",
            f"`{entry.file}`",
            entry.source,
            entry.url,
            entry.licence,
        )
        row = next(line for line in lines if line.startswith("|") and f"| `{name}` |" in line)
        assert all(f"| {fact} |" in row for fact in facts)
        assert f"| {', '.join(TASKS[name].protocols)} |" in row
