"""The model card: README.md in a model's folder, which the Hugging Face Hub shows.

It says what the model is, what it needs besides its weights, what was measured, and how to load it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.note import RetrievalNote
from valm.store.files import atomic_path
from valm_kernels import __version__

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
        command: the command that made the model.
        with_base: whether the folder has all weights; those of an adapter were added to its base model.

    Raises:
        ValmError: the folder's note is damaged, or the card cannot be written.
    """
    file = Path(folder) / CARD_FILE
    if os.path.lexists(file) and not (file.is_file() and MARKER in file.read_text("utf-8", errors="replace")):
        return None
    note = RetrievalNote.read(folder)
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
    lines += [*_needs(model, note, with_base), "## How to load it", _how(model, note)]
    if numbers:
        rows = [f"| {name} | {value:.4g} |" for name, value in numbers.items()]
        lines += ["## Numbers", "\n".join(["| | |", "| --- | --- |", *rows])]
    if command:
        lines += ["## How it was made", f"```bash\n{command}\n```"]
    with atomic_path(file) as temporary:
        ModelCard("\n\n".join(lines) + "\n").save(temporary)
    return file


def base_name(model: Any) -> str | None:
    """The Hugging Face name of the model that was augmented; None for a VaLM, and for a base in a folder, whose path is
    private."""
    name = getattr(model.config, "name_or_path", "")
    augmented = getattr(model.config, "valm", None) is not None
    return name if augmented and name and not os.path.isdir(name) and name.count("/") <= 1 else None


def _architecture(model: Any) -> str | None:
    """The class of the model that was augmented; None for a VaLM."""
    return getattr(model.config, "valm", {}).get("architecture")


def _what(model: Any) -> str:
    options = model.image_options
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


def _needs(model: Any, note: RetrievalNote | None, with_base: bool) -> list[str]:
    needs = []
    if not with_base:
        named = base_name(model)
        needs.append(f"- The base model `{named}`." if named else f"- The {_architecture(model)} that it was made of.")
    if model.image_options.num_images == 0:
        needs = needs or ["Nothing beside this folder."]
    elif note is None:
        given = "`image_pool` and `image_index`"
        if model.image_options.scored:
            given = "`image_pool`, `image_index` and `image_scores`"
        needs.append(f"- Images, given in each call as {given}, or found by a retriever.")
    else:
        needs += _needs_of_retrieval(note)
    return ["\n".join(needs)]


def _needs_of_retrieval(note: RetrievalNote) -> list[str]:
    needs = []
    if note.knowledge_base is not None:
        name = note.knowledge_base.name
        try:
            kb = ImageKnowledgeBase.open(note.knowledge_base)
        except ValmError:
            needs.append(f"- The knowledge base `{name}`.")
        else:
            clip = kb.manifest["clip"]
            needs.append(f"- The knowledge base `{name}` of {len(kb):,} images, SHA-256 `{kb.fingerprint}`.")
            name, sha256 = Path(clip["name"]).name, clip["weights_hash"]
            needs.append(f"- Its CLIP `{name}`, whose weights have SHA-256 `{sha256}`.")
    if note.clip is not None:
        needs.append(f"- The CLIP `{Path(note.clip).name if os.path.isabs(note.clip) else note.clip}`.")
    return [*needs, f"- Queries of kind `{note.query}`."]


def _how(model: Any, note: RetrievalNote | None) -> str:
    with_kb = note is not None and note.knowledge_base is not None and model.image_options.num_images > 0
    arguments = ', kb="KNOWLEDGE_BASE"' if with_kb else ""
    return f'```python\nimport valm\n\nmodel, tokenizer = valm.load("FOLDER"{arguments})\n```'
