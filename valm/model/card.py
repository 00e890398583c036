"""The model card: README.md in a model's folder, which the Hugging Face Hub shows.

It says what the model is, what it needs besides its weights, what was measured, and how to load it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from valm.retrieval.source import ImageSource
from valm.text import markdown_table
from valm_kernels import __version__
from valm_kernels.atomic_files import atomic_path

CARD_FILE = "README.md"
# Marks the cards written here. A card without it is the user's own and is not replaced.
MARKER = "<!-- written by valm; without this line the card is left as it is -->"


def write_card(
    model: Any,
    folder: str | os.PathLike,
    *,
    numbers: Mapping[str, float] | None = None,
    command: str | None = None,
    with_base: bool = True,
) -> Path | None:
    """Writes the model card into `folder`, unless the user has written one; returns its path, or None.

    Args:
        model: one that takes images (`ImageModel`).
        numbers: measurements by name.
        command: the command that made the model; of each path in it the card has the last part.
        with_base: whether the folder has all weights; those of an adapter were added to its base model.

    Raises:
        OSError: the card cannot be written.
    """
    file = Path(folder) / CARD_FILE
    if os.path.lexists(file) and not (file.is_file() and MARKER in file.read_text("utf-8", errors="replace")):
        return None
    source = model.finder.source
    data = ModelCardData(
        library_name="valm",
        pipeline_tag="text-generation",
        base_model=base_name(model),
        tags=["valm", "visually-augmented-language-model"],
    )
    lines = [
        f"---\n{data.to_yaml()}\n---",
        MARKER,
        "# A language model that sees images",
        _what(model),
        "## What it needs",
    ]
    lines += [*_needs(model, source, with_base), "## How to load it", _how(source)]
    if numbers:
        rows = [(name, f"{value:.4g}") for name, value in numbers.items()]
        lines += ["## Numbers", markdown_table(["", ""], rows)]
    if command:
        lines += ["## How it was made", f"```bash\n{_without_folders(command)}\n```"]
    with atomic_path(file) as temporary:
        ModelCard("\n\n".join(lines) + "\n").save(temporary)
    return file


def base_name(model: Any) -> str | None:
    """The Hugging Face name of the model that was augmented; None for a VaLM, and for a base in a folder, whose path is
    private."""
    name = getattr(model.config, "name_or_path", "")
    return name if _architecture(model) and name and not os.path.isdir(name) and name.count("/") <= 1 else None


def _without_folders(command: str) -> str:
    """The command with the last part of each path."""
    return shlex.join(re.sub(r"[^=]*/(?=[^/=])", "", word.rstrip("/")) for word in shlex.split(command))


def _architecture(model: Any) -> str | None:
    """The class of the model that was augmented; None for a VaLM."""
    name = model.fusion_options.architecture
    return None if name == "VaLMForCausalLM" else name


def _what(model: Any) -> str:
    options = model.fusion_options
    base = _architecture(model)
    if options.num_images == 0:
        kind = f"{base}, trained" if base else "GPT-2"
        twin = "the text-only twin of an augmented model" if base else "the baseline GPT-2*"
        return f"A {kind} by [valm](https://github.com/valm-kernels/valm), which sees no images: {twin}."
    kind = "its own retrieval query as one image" if options.blind else f"{options.num_images} retrieved images"
    if options.min_score is not None:
        kind += f" with a retrieval score from {options.min_score:.4g}, or none"
    made = f"`valm.augment` of a {base}" if base else "A VaLM (Wang et al. 2022)"
    return (
        f"{made} by [valm](https://github.com/valm-kernels/valm) {__version__}: each token sees {kind}, of dimension "
        f"{options.image_dim}."
    )


def _needs(model: Any, source: ImageSource | None, with_base: bool) -> list[str]:
    needs = []
    if not with_base:
        named = base_name(model)
        needs.append(f"- The base model `{named}`." if named else f"- The {_architecture(model)} that it was made of.")
    if model.fusion_options.num_images == 0:
        needs = needs or ["Nothing beside this folder."]
    elif source is None:
        given = "`image_pool` and `image_index`"
        if model.fusion_options.scored:
            given = "`image_pool`, `image_index` and `image_scores`"
        needs.append(f"- Images, given in each call as {given}, or found by a retriever.")
    else:
        if source.knowledge_base_sha256 is not None:
            name, sha256 = source.knowledge_base_name, source.knowledge_base_sha256
            needs.append(f"- The knowledge base `{name}`, SHA-256 `{sha256}`.")
        clip = Path(source.clip_name or "").name
        needs.append(f"- Its CLIP `{clip}`, whose weights have SHA-256 `{source.clip_sha256}`.")
        needs.append(f"- Queries of kind `{source.query}`.")
    return ["\n".join(needs)]


def _how(source: ImageSource | None) -> str:
    arguments = ', kb="KNOWLEDGE_BASE"' if source is not None and source.knowledge_base_sha256 is not None else ""
    return f'```python\nimport valm\n\nmodel, tokenizer = valm.load("FOLDER"{arguments})\n```'
