import pytest

from valm.text import decoded, encoding_of, printable


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


def test_an_encoding_is_seen_across_chunks():
    content = "a café, 一只狗".encode()
    assert encoding_of([content[i : i + 1] for i in range(len(content))]) == "utf-8-sig"
    assert encoding_of([content[:-1]]) == encoding_of([b"caf\xe9"]) == "latin-1"
    assert encoding_of([]) == "utf-8-sig"


def test_a_damaged_text_is_decoded():
    assert decoded("ab".encode("utf-16")[:-1]) == "a\ufffd"
