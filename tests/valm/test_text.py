import pytest

from valm.text import printable


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
