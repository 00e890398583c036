"""Other vocabularies than the CLIP's: which CLIP tokens the text up to each token of a language model consists of.

The query of a token is that of the text so far, and how CLIP reads a text depends on how its last word goes on: "ban"
is one piece of CLIP's, and so is "banana". The CLIP token that ends where a token ends would look ahead: which ones
there are depends on what follows. Instead every prefix is cut as CLIP would cut it if the text ended there. The words
before its last one are the same in all longer texts, and only the last one, which may go on, is cut anew for each
token. Tokens that end words, most of them, lie on the cutting of the whole text; any other is a fork of it, a few CLIP
tokens that are read behind the keys and values of the text before them. A word of LONGEST_WORD characters is closed,
whatever comes.
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

from valm.errors import ValmError
from valm.retrieval.segments import Reading
from valm.tokenizer import begin_id

# Blanks behind which CLIP cuts the text independently of what stands before: no word of its goes across one, and no
# Unicode normalisation either. Other blanks are left to its tokenizer.
BLANKS = re.compile(r"[ \t\n\r]+")
# Characters after which a word that is still open is closed as if a blank followed. Each token cuts the open word anew,
# and of a text without blanks (base64, Chinese) that would be all of it: time and memory quadratic in its length. Words
# of a language are shorter, and a text tower sees 75 tokens at once anyway.
LONGEST_WORD = 64
# Words whose CLIP tokens are kept.
WORD_CACHE = 1 << 16
# What both ways of putting a text together are tried on.
PROBE = "The colour of a ripe banana isn't 12% blue: na\u00efve caf\u00e9, \u4f60\u597d \U0001f600!"


@dataclass
class TextState:
    """How far one row of a language model's tokens has been read.

    open: whether a document is open. undecoded: bytes of a character that is not whole yet.
    word: the text after the last blank, which later tokens may go on; less than LONGEST_WORD characters.
    """

    open: bool = False
    undecoded: bytes = b""
    word: str = ""

    def copy(self) -> TextState:
        return TextState(self.open, self.undecoded, self.word)


class Alignment:
    """Reads the tokens of `tokenizer` as those of `clip_tokenizer`.

    Its bos begins a document and its eos ends one; where both are one token, as GPT-2 has it, or there is no bos, that
    token begins one. Other special tokens end a word and have no text.

    Raises ValmError for a tokenizer without eos, one without a tokenizer.json, and one whose tokens have no text of
    their own (a text must be what its tokens' texts, or bytes, are one after the other).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, clip_tokenizer: PreTrainedTokenizerFast):
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValmError(
                f"the language model's tokenizer is a {type(tokenizer).__name__}, expected a fast one, which has a "
                "tokenizer.json"
            )
        self.bos, self.eos = begin_id(tokenizer), tokenizer.eos_token_id
        self.sot, self.eot = clip_tokenizer.bos_token_id, clip_tokenizer.eos_token_id
        self.bytes_of = token_bytes(tokenizer)
        self._clip = Tokenizer.from_str(clip_tokenizer.backend_tokenizer.to_str())  # whose settings nobody else changes
        self._clip.no_padding()
        self._clip.no_truncation()
        self._words: dict[str, list[int]] = {}

    def read(self, tokens: list[tuple[int, int]], text: TextState, reading: Reading) -> None:
        """Reads further tokens of a row, as (position in the input, id), into `reading`; `text` is moved on.

        What the last word is so far is read but not kept: later calls read it again with what has come to it.
        """
        closed: list[int] = []  # CLIP tokens that no later text changes
        prefixes = []  # for each token, how many of them there are, and the word that is open then
        for position, id in tokens:
            if id in (self.bos, self.eos):
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
            prefixes.append((position, len(closed), text.word))

        whole = closed + self.clip_ids(text.word)
        wanted = defaultdict(list)  # positions whose text is the first n tokens of the whole
        forks = defaultdict(list)  # and those with other tokens behind these
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
        """What CLIP's tokenizer makes of `word`."""
        ids = self._words.get(word)
        if ids is None:
            if len(self._words) == WORD_CACHE:
                self._words.clear()
            ids = self._words[word] = self._clip.encode(word, add_special_tokens=False).ids
        return ids

    def _decode(self, id: int, text: TextState) -> str:
        """The characters that token `id` completes. Bytes that are no UTF-8 become U+FFFD, as in any decoder."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        characters = decoder.decode(text.undecoded + self.bytes_of[id])
        text.undecoded = decoder.getstate()[0]
        return characters


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The UTF-8 text of each token, a blank for special tokens; of a token that is part of a character, its bytes.

    Raises ValmError where a text is not what its tokens' texts are one after the other.
    """
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    decoder = spec["decoder"] or {}
    kinds = {decoder.get("type"), *(part["type"] for part in decoder.get("decoders", []))}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()} if "ByteLevel" in kinds else {}
    suffix = spec["model"].get("end_of_word_suffix") or ""
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}

    def of(id: int, piece: str) -> bytes:
        if id in special:
            return b" "
        if id in added:
            return piece.encode()
        if "ByteLevel" in kinds:
            ends_word = suffix and piece.endswith(suffix)
            return bytes(byte_of[c] for c in piece.removesuffix(suffix)) + (b" " if ends_word else b"")
        if "ByteFallback" in kinds and (byte := re.fullmatch("<0x([0-9A-F]{2})>", piece)):
            return bytes.fromhex(byte[1])
        if backend.decoder is None:
            return f" {piece}".encode()
        # between two others, as the ends of a text may lose their blanks
        return backend.decoder.decode(["x", piece, "x"])[1:-1].encode()

    table = [b""] * len(tokenizer)
    for piece, id in tokenizer.get_vocab().items():
        table[id] = of(id, piece)

    ids = [id for id in tokenizer(PROBE, add_special_tokens=False)["input_ids"] if id not in special]
    joined = b"".join(table[id] for id in ids).decode("utf-8", errors="replace").strip()
    expected = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip()
    if joined != expected:
        raise ValmError(
            f"the language model's tokenizer reads {PROBE!r} as {expected!r}, but its tokens one after the other are "
            f"{joined!r}: pictures can be retrieved for tokenizers only whose tokens have each a text of their own"
        )
    return table
