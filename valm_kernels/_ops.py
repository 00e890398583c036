"""The operators' namespace: each copy of this package in a process uses its own.

torch defines an operator only once, and a kernel hub may load several versions of a package under different module
names. The hub's builder replaces this file with one that defines the same two names.
"""

from __future__ import annotations

import re

import torch

# "valm_kernels" where pip installs it: saved graphs hold that name. Compiled graphs need an identifier.
ops = getattr(torch.ops, re.sub(r"\W|^(?=\d)", "_", __package__))


def add_op_namespace_prefix(name: str) -> str:
    """The full name "namespace::name" of an operator of this copy."""
    return f"{ops.name}::{name}"
