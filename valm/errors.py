"""The error that the command line shows as one sentence."""

PANIC = "a tokenizer stopped; its tokenizer.json is damaged, or cannot split this text"


class ValmError(ValueError):
    """An input cannot be used. The message names it, says what was found and what to do."""


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
