"""The split: whose colours are said, who is asked for, and that nobody is on both sides."""

import pytest
from PIL import Image

from studies.demo.split import find_memory_color, split_things
from studies.demo.things import Thing
from valm.errors import ValmError
from valm.evaluation.sets import Item

DRAWING = Image.new("RGBA", (8, 8))
THINGS = [Thing(f"thing {i:02d}", "red" if i % 3 else None, DRAWING) for i in range(60)]
MEMORY = [Item("thing 03", "green", "a"), Item("thing 04", "blue", "a"), Item("unicorn", "white", "a")]


def names(things) -> set[str]:
    return {getattr(thing, "name", None) or thing.text for thing in things}


@pytest.mark.parametrize("split", ["test", "validation"])
def test_nobody_is_on_both_sides(split):
    parts = split_things(THINGS, MEMORY, seed=0, split=split)
    groups = [names(parts.spoken), names(parts.heldout), names(parts.memory)]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert names(parts.memory) == {"thing 03", "thing 04"}
    assert all(thing.color for thing in parts.spoken)
    assert set().union(*groups) <= names(parts.pictured)
    assert parts.asked == parts.heldout + parts.memory


def test_validation_never_touches_the_tests_things():
    test, validation = (split_things(THINGS, MEMORY, seed=0, split=split) for split in ("test", "validation"))
    assert not names(test.heldout) & (names(validation.heldout) | names(validation.spoken))
    assert names(validation.heldout) | names(validation.spoken) == names(test.spoken)
    assert names(test.heldout) <= names(validation.pictured)


def test_memory_color_is_found_or_a_word_says_why_not(tmp_path):
    assert find_memory_color(None) == ([], "no evaluation data given (--eval-data or VALM_EVAL_DATA)")
    items, note = find_memory_color(tmp_path)
    assert items == [] and "memory_color_data.csv" in note
    table = tmp_path / "eval" / "object_color" / "memory_color_data.csv"
    table.parent.mkdir(parents=True)
    table.write_text("Index,Descriptor,Item,Color\n1,a ,sunflower,yellow\n")
    expected = ([Item("sunflower", "yellow", "a")], None)
    assert find_memory_color(tmp_path) == find_memory_color(table) == expected


def test_the_seed_draws_a_quarter_of_those_with_a_colour():
    first, again, other = (split_things(THINGS, MEMORY, seed=seed, split="test") for seed in (0, 0, 1))
    assert first == again
    assert names(first.heldout) != names(other.heldout)
    colored = 40 - 1  # thing 04 is MemoryColor's
    assert (len(first.heldout), len(first.spoken)) == (colored // 4, colored - colored // 4)
    small = split_things(THINGS, MEMORY, seed=0, split="test", max_things=8)
    assert (len(small.heldout), len(small.spoken), len(small.memory)) == (2, 6, 2)
    with pytest.raises(ValmError, match="split must be one of test, validation, got 'train'"):
        split_things(THINGS, [], seed=0, split="train")
