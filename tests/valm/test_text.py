import pytest

from valm.text import decoded, encoding_of, markdown_table, printable, split_lines, why_no_text


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
    assert encoding_of([content[:-1]]) == encoding_of([b"caf\xe9"]) == "cp1252"
    assert encoding_of([]) == "utf-8-sig"


def test_what_is_no_utf8_is_read_as_browsers_read_it():
    text = "the “big” dog… for 3 €, a café"
    assert decoded(text.encode("cp1252")) == text
    undefined = bytes([0x81, 0x8D, 0x8F, 0x90, 0x9D])
    assert decoded(undefined) == undefined.decode("latin-1")


def test_lines_end_at_line_breaks_alone():
    assert split_lines("a\r\nb\rc\n\nd") == ["a", "b", "c", "", "d"]
    assert split_lines("a\u2028b\x85c\x0cd\x0be\n") == ["a\u2028b\x85c\x0cd\x0be", ""]


def test_a_damaged_text_is_decoded():
    assert decoded("ab".encode("utf-16")[:-1]) == "a\ufffd"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(encoding):
    content = "a café".encode(encoding)
    assert decoded(content) == "a café"
    why = f"is {encoding.upper()}, expected UTF-8: convert it, such as by `iconv -f {encoding.upper()}"
    assert why in why_no_text(content)


def test_binary_files_need_not_be_converted():
    assert why_no_text(b"\x89PNG\r\n\x1a\n\0\0").endswith("convert it if it is text, else leave it out")


def test_a_table_in_markdown():
    assert markdown_table(["", "of"], [("a", "1"), ("b", "")]) == "| | of |\n| --- | --- |\n| a | 1 |\n| b | |"
