"""The errors that the command line shows as one sentence: ValmError, and those of the system."""

import errno

PANIC = "a tokenizer stopped; its tokenizer.json is damaged, or cannot split this text"


class ValmError(ValueError):
    """An input cannot be used. The message names it, says what was found and what to do."""


# What to do about an error of the system that does not say so itself.
REMEDIES = {
    errno.ENOSPC: "make room there, and run the same command again",
    errno.EDQUOT: "make room there, and run the same command again",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EEXIST: "choose another name",
    errno.ENOTDIR: "a folder is needed there",
}


def sentence(error: BaseException) -> str:
    """What an error says; of one of the system its file, the reason, and what to do."""
    if not isinstance(error, OSError):
        return str(error)
    if error.strerror is None:  # of a library, with a text of its own
        return " ".join(str(error).split()) or type(error).__name__
    file = "" if error.filename is None else f"{error.filename}: "
    remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
    return f"{file}{error.strerror}{remedy}"


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust, such as tokenizers, panicked. pyo3 raises an exception that is no `Exception`
    and that no module exports."""
    return type(error).__module__ == "pyo3_runtime"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory: Python, an allocator of PyTorch or oneDNN, or faiss says so."""
    signs = ("t allocate memory", "out of memory", "bad_alloc", "could not create a ")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )
