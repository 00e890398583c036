"""Vocabularies other than CLIP's: for each LM token, the CLIP tokens of the text up to and including the LM token.

CLIP's tokens for a text depend on how its last word continues: "ban" is one CLIP token, and "banana" is one too. So the
tokenization of the whole text would look ahead. Instead every prefix is tokenized as if the text ended there. The words
before the last word have the same tokens in all longer texts; only the last word is tokenized again for each LM token.
Most LM tokens end a word and lie on the tokenization of the whole text. Any other LM token is a fork: a few CLIP tokens
that are read after the keys and values of the text before them. A word is closed after LONGEST_WORD characters.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import defaultdict
from dataclasses import dataclass

from open_clip.tokenizer import bytes_to_unicode
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from valm.clip.tokenizer import begin_id
from valm.errors import ValmError
from valm.retrieval.segments import Reading

# Blanks after which CLIP's tokens do not depend on the text before: neither words nor Unicode normalisation cross them.
# CLIP's tokenizer handles other blanks.
BLANKS = re.compile(r"[ \t\n\r]+")
# Characters after which an open word is closed as if a blank followed. Each token tokenizes the open word again, so for
# a text without blanks (base64, Chinese) time and memory would be quadratic in its length. Real words are shorter, and
# a text tower sees only 75 tokens at once.
LONGEST_WORD = 64
# Words whose CLIP tokens are cached.
WORD_CACHE = 1 << 16
# The text that checks `token_bytes`.
PROBE = "The colour of a ripe banana isn't 12% blue: na\u00efve caf\u00e9, \u4f60\u597d \U0001f600!"


@dataclass
class TextState:
    """State of reading one row of a language model's tokens.

    open: whether a document is open. undecoded: bytes of an incomplete character.
    word: the text after the last blank, which later tokens may continue; shorter than LONGEST_WORD.
    """

    open: bool = False
    undecoded: bytes = b""
    word: str = ""

    def copy(self) -> TextState:
        return TextState(self.open, self.undecoded, self.word)


class Alignment:
    """Reads the tokens of `tokenizer` as tokens of `clip_tokenizer`.

    bos begins a document and eos ends it. If bos is missing or equals eos (GPT-2), eos begins a document. Other special
    tokens end a word and have no text.

    If the tokenizer has a chat template, bos and eos may begin and end a turn (SmolLM2-Instruct, Qwen, Llama 3), and an
    answer's images should depend on the question. So a row is then one document, in which bos and eos are like other
    special tokens.

    Raises:
        ValmError: the tokenizer has no eos or no tokenizer.json, or a text is not the concatenation of its tokens'
            texts or bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, clip_tokenizer: PreTrainedTokenizerFast):
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValmError(
                f"the language model's tokenizer is a {type(tokenizer).__name__}, expected a fast tokenizer (with a "
                "tokenizer.json)"
            )
        self.bos, self.eos = begin_id(tokenizer), tokenizer.eos_token_id
        self.one_document = tokenizer.chat_template is not None
        self.sot, self.eot = clip_tokenizer.bos_token_id, clip_tokenizer.eos_token_id
        self.bytes_of = token_bytes(tokenizer)
        self._clip = Tokenizer.from_str(clip_tokenizer.backend_tokenizer.to_str())  # a copy: its settings change
        self._clip.no_padding()
        self._clip.no_truncation()
        self._words: dict[str, list[int]] = {}

    def read(self, tokens: list[tuple[int, int]], text: TextState, reading: Reading) -> None:
        """Reads further tokens of a row, as (position in the input, id), into `reading`, and advances `text`.

        The last word is read but not stored: later calls read it again with its continuation.
        """
        closed: list[int] = []  # CLIP tokens that later text cannot change
        # for each token except the first of a document: its position, the number of closed tokens, the open word
        prefixes = []
        for position, id in tokens:
            separates = id in (self.bos, self.eos) and not self.one_document
            first = not text.open or (separates and id == self.bos)
            if separates:
                closed += self.clip_ids(text.word)
                closed.append(self.sot if id == self.bos else self.eot)
                text.open, text.undecoded, text.word = id == self.bos, b"", ""
            else:
                if not text.open:
                    closed.append(self.sot)
                    text.open = True
                *words, text.word = BLANKS.split(text.word + self._decode(id, text))
                if len(text.word) >= LONGEST_WORD:
                    words.append(text.word)
                    text.word = ""
                for word in words:
                    closed += self.clip_ids(word)
            if not first:
                prefixes.append((position, len(closed), text.word))

        whole = closed + self.clip_ids(text.word)
        wanted = defaultdict(list)  # positions whose text is the first n tokens of the whole text
        forks = defaultdict(list)  # positions whose text continues with other tokens
        for position, begin, word in prefixes:
            ids = self.clip_ids(word)
            shared = 0
            while shared < len(ids) and begin + shared < len(whole) and ids[shared] == whole[begin + shared]:
                shared += 1
            if shared == len(ids):
                wanted[begin + shared].append(position)
            else:
                forks[begin + shared, tuple(ids[shared:])].append(position)
        forks_at = defaultdict(list)
        for (n, others), positions in forks.items():
            forks_at[n].append((list(others), positions))
        for n in range(len(whole) + 1):
            if n:
                reading.add(whole[n - 1])
            if n == len(closed):
                reading.keep()
            for position in wanted[n]:
                reading.want(position)
            for ids, positions in forks_at[n]:
                reading.fork(ids, positions)

    def clip_ids(self, word: str) -> list[int]:
        """CLIP's tokens of `word`."""
        ids = self._words.get(word)
        if ids is None:
            if len(self._words) >= WORD_CACHE:
                self._words.clear()
            ids = self._words[word] = self._clip.encode(word, add_special_tokens=False).ids
        return ids

    def _decode(self, id: int, text: TextState) -> str:
        """The characters that token `id` completes. Invalid UTF-8 becomes U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        characters = decoder.decode(text.undecoded + self.bytes_of[id])
        text.undecoded = decoder.getstate()[0]
        return characters


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The UTF-8 bytes of each id, which may be a part of a character; a blank for special tokens.

    Raises:
        ValmError: a text is not the concatenation of its tokens' texts.
    """
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    decoder = spec["decoder"] or {}
    kinds = {decoder.get("type"), *(part["type"] for part in decoder.get("decoders", []))}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()} if "ByteLevel" in kinds else {}
    suffix = spec["model"].get("end_of_word_suffix") or ""
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}

    def of(id: int, token: str) -> bytes:
        if id in special:
            return b" "
        if id in added:
            return token.encode()
        if "ByteLevel" in kinds:
            ends_word = suffix and token.endswith(suffix)
            return bytes(byte_of[c] for c in token.removesuffix(suffix)) + (b" " if ends_word else b"")
        if "ByteFallback" in kinds and (byte := re.fullmatch("<0x([0-9A-F]{2})>", token)):
            return bytes.fromhex(byte[1])
        if backend.decoder is None:
            return f" {token}".encode()
        # between two other tokens, because the decoder may strip blanks at the ends of a text
        return backend.decoder.decode(["x", token, "x"])[1:-1].encode()

    vocabulary = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values()) + 1)  # some ids may be unused
    for token, id in vocabulary.items():
        table[id] = of(id, token)

    ids = [id for id in tokenizer(PROBE, add_special_tokens=False)["input_ids"] if id not in special]
    joined = b"".join(table[id] for id in ids).decode("utf-8", errors="replace").strip()
    expected = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip()
    if joined != expected:
        raise ValmError(
            f"the language model's tokenizer reads {PROBE!r} as {expected!r}, but its tokens joined are {joined!r}: "
            "images can be retrieved only for tokenizers in which each token has a text of its own"
        )
    return table
