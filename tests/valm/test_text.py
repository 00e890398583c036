import pytest

from valm.text import markdown_table, printable, split_lines


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a dog, ein Hund, 一只狗 🐶", "a dog, ein Hund, 一只狗 🐶"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("one\ntwo\rthree\u2028four", r"one\ntwo\rthree\u2028four"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),
        ("gnp.\u202eexe", r"gnp.\u202eexe"),
        ("half \ud800", r"half \ud800"),
    ],
)
def test_nothing_steers_the_terminal(text, shown):
    assert printable(text) == shown
    printable(text).encode("utf-8")


def test_lines_end_at_line_breaks_alone():
    assert split_lines("a\r\nb\rc\n\nd") == ["a", "b", "c", "", "d"]
    assert split_lines("a\u2028b\x85c\x0cd\x0be\n") == ["a\u2028b\x85c\x0cd\x0be", ""]


def test_a_table_in_markdown():
    assert markdown_table(["", "of"], [("a", "1"), ("b", "")]) == "| | of |\n| --- | --- |\n| a | 1 |\n| b | |"
