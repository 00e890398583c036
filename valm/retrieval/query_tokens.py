"""Which tokens ask for images: every one, as published, or those that end a word of content.

A token that does not ask has the images of the token before. The rule looks at a token's own text alone, so it is the
same for a prefix, a batch and token by token.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.retrieval.alignment import token_bytes

RULES = ("every", "content")
# Articles, pronouns, prepositions, conjunctions, auxiliary verbs and the like of English, and what contractions
# leave of them.
FUNCTION_WORDS = frozenset(Path(__file__).with_name("function_words.txt").read_text(encoding="utf-8").split())


def asks(text: str) -> bool:
    """Whether a token of this text asks: not one of blanks and punctuation alone, nor a function word."""
    word = text.strip().lower()
    return word not in FUNCTION_WORDS and any(unicodedata.category(character)[0] not in "PZC" for character in word)


def asking_tokens(tokenizer: PreTrainedTokenizerFast) -> list[bool]:
    """Of each id, whether it asks. Where the tokenizer marks the ends of words, as CLIP's does, only these do.

    Raises:
        ValmError: as `token_bytes`.
    """
    marks_ends = bool(json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("end_of_word_suffix"))
    texts = [token.decode(errors="replace") for token in token_bytes(tokenizer)]  # a part of a character asks
    return [asks(text) and (not marks_ends or text.endswith(" ")) for text in texts]


def noted(rule: str) -> str:
    """The rule as models, corpora and indexes note it: its name, with the hash of the words."""
    words = hashlib.sha256(" ".join(sorted(FUNCTION_WORDS)).encode()).hexdigest()
    return rule if rule == "every" else f"{rule} {words[:12]}"


def read_note(note: str) -> str:
    """The rule of a note.

    Raises:
        ValmError: it is none of this version.
    """
    for rule in RULES:
        if noted(rule) == note:
            return rule
    raise ValmError(f"its images are of the tokens of the rule {note!r}, which this version does not have")
