"""The errors that the command line prints as one sentence: ValmError and errors of the operating system."""

import errno

PANIC = "a tokenizer stopped; its tokenizer.json is damaged, or cannot split this text"


class ValmError(ValueError):
    """An input cannot be used. The message names the input, what was found in it and what to do."""


# What to do about a system error, whose own text does not say.
REMEDIES = {
    errno.ENOSPC: "make room there, and run the same command again",
    errno.EDQUOT: "make room there, and run the same command again",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EEXIST: "choose another name",
    errno.ENOTDIR: "a folder is needed there",
}


def sentence(error: BaseException) -> str:
    """The message of an error. A system error's message states the file, the reason and what to do."""
    if not isinstance(error, OSError):
        return str(error)
    if error.strerror is None:  # a library raised it with its own text
        return " ".join(str(error).split()) or type(error).__name__
    file = "" if error.filename is None else f"{error.filename}: "
    remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
    return f"{file}{error.strerror}{remedy}"


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust, such as tokenizers, panicked. pyo3 raises an exception that is no `Exception`
    and that no module exports."""
    return type(error).__module__ == "pyo3_runtime"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, an allocator of PyTorch or oneDNN, or faiss ran out of memory."""
    signs = ("t allocate memory", "out of memory", "bad_alloc", "could not create a ")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )
