"""The operators' namespace: one for each copy of this package in a process.

torch defines an operator once, and a kernel hub loads several versions of a package side by side, each under a module
name of its own. The hub's builder replaces this file by its own, with the same two names.
"""

from __future__ import annotations

import re

import torch

# "valm_kernels" where pip installs it: saved graphs hold that name. Compiled graphs need an identifier.
ops = getattr(torch.ops, re.sub(r"\W|^(?=\d)", "_", __package__))


def add_op_namespace_prefix(name: str) -> str:
    """The full name "namespace::name" of an operator of this copy."""
    return f"{ops.name}::{name}"
