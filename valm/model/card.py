"""The model card: README.md in a model's folder, which the Hugging Face Hub shows.

The card states what the model is, what it needs besides its weights, what was measured, and how to load it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from valm.text import markdown_table
from valm_kernels import __version__
from valm_kernels.atomic_files import atomic_path

CARD_FILE = "README.md"
# Marks cards that valm wrote. A card without the marker is the user's and is not replaced.
MARKER = "<!-- written by valm; without this line the card is left as it is -->"
TEMPLATE = """---
{data}
---

{marker}

# A language model that sees images

{what}

## What it needs

{needs}

## How to load it

```python
import valm

model, tokenizer = valm.load("FOLDER"{kb})
```
"""


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
        model: a model that takes images (`ImageModel`).
        numbers: measurements by name.
        command: the command that made the model; the card shows only the last part of each path in it.
        with_base: whether the folder contains all weights; False for an adapter.

    Raises:
        OSError: the card cannot be written.
    """
    file = Path(folder) / CARD_FILE
    if os.path.lexists(file) and not (file.is_file() and MARKER in file.read_text("utf-8", errors="replace")):
        return None
    tags = ["valm", "visually-augmented-language-model"]
    data = ModelCardData(library_name="valm", pipeline_tag="text-generation", base_model=base_name(model), tags=tags)
    needs = "\n".join(f"- {need}" for need in _needs(model, with_base)) or "Only this folder."
    kb = ', kb="KNOWLEDGE_BASE"' if getattr(model.finder.source, "knowledge_base_sha256", None) else ""
    text = TEMPLATE.format(data=data.to_yaml(), marker=MARKER, what=_what(model), needs=needs, kb=kb)
    if numbers:
        rows = [(name, f"{value:.4g}") for name, value in numbers.items()]
        text += f"\n## Numbers\n\n{markdown_table(['', ''], rows)}\n"
    if command:
        text += f"\n## How it was made\n\n```bash\n{_without_folders(command)}\n```\n"
    with atomic_path(file) as temporary:
        ModelCard(text).save(temporary)
    return file


def base_name(model: Any) -> str | None:
    """The Hugging Face name of the model that was augmented. None for a VaLM, and for a base in a folder, since its
    path is private."""
    name = model.config.base_place
    return name if _architecture(model) and name and not os.path.isdir(name) and name.count("/") <= 1 else None


def _without_folders(command: str) -> str:
    """The command with only the last part of each path."""
    return shlex.join(re.sub(r"[^=]*/(?=[^/=])", "", word.rstrip("/")) for word in shlex.split(command))


def _architecture(model: Any) -> str | None:
    """The class of the model that was augmented; None for a VaLM."""
    name = model.fusion_options.architecture
    return None if name == "VaLMForCausalLM" else name


def _what(model: Any) -> str:
    options, base = model.fusion_options, _architecture(model)
    made = f"`valm.augment` of a {base}" if base else "A VaLM (Wang et al. 2022)"
    sees = f"{options.num_images} retrieved images of dimension {options.image_dim}"
    if options.blind:
        sees = "its own retrieval query instead of images"
    if options.num_images == 0:
        sees = "no images, as in the text-only baseline"
    if options.min_score is not None:
        where = "if its best image has" if options.blind else "with"
        sees += f" {where} a retrieval score from {options.min_score:.4g}, or none"
    return f"{made} by [valm](https://github.com/valm-kernels/valm) {__version__}. Each token sees {sees}."


def _needs(model: Any, with_base: bool) -> list[str]:
    options, named, source = model.fusion_options, base_name(model), model.finder.source
    needs = []
    if not with_base:
        needs.append(f"The base model `{named}`." if named else f"The {_architecture(model)} that was augmented.")
    if options.num_images == 0:
        return needs
    if source is None:
        return [*needs, "Images: the arguments `image_pool`, `image_index` of each call, or a retriever."]
    if source.knowledge_base_sha256 is not None:
        needs.append(f"The knowledge base `{source.knowledge_base_name}`, SHA-256 `{source.knowledge_base_sha256}`.")
    clip = Path(source.clip_name or "").name
    return [
        *needs,
        f"The CLIP `{clip}`, whose weights have SHA-256 `{source.clip_sha256}`.",
        f"Queries of kind `{source.query}`.",
    ]
