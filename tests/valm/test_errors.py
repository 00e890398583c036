"""Errors of the system are one sentence that names the file and, where it helps, what to do."""

import errno

import pytest

from valm.errors import ValmError, sentence


@pytest.mark.parametrize(
    "error, expected",
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), "a.json: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left", "kb/x.npy"), "kb/x.npy: No space left; make room there, and run"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("Can't load\nthe tokenizer"), "Can't load the tokenizer"),
        (OSError(), "OSError"),
        (ValmError("as it\nis"), "as it\nis"),
    ],
)
def test_the_sentence_of_an_error(error, expected):
    assert sentence(error).startswith(expected)
