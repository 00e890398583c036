"""CLIP's tokenizer as a Hugging Face tokenizer, complete or pruned to the tokens of a corpus, and other tokenizers.

VaLM reads text in CLIP's own tokens by default, so that one position of the language model is one position of the
text tower that computes retrieval queries (the published model does the same). The vocabulary comes from the file in
the open_clip package, so nothing is downloaded. Any other fast tokenizer works too (`valm.retrieval.alignment`).
"""

import copy
import gzip
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip.tokenizer
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.store.parts import MODEL, part_of
from valm.store.pretrained import from_pretrained, library_errors
from valm_kernels.json_files import short

SOT = "<|startoftext|>"
EOT = "<|endoftext|>"

# The number of merges of the file that CLIP uses: 49,408 tokens less 2 x 256 bytes and the two special tokens.
NUM_MERGES = 49408 - 2 * 256 - 2

# A word, one digit, or a run of anything else. Blanks separate and vanish.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# How open_clip's cleaning (ftfy) changes single characters. It also repairs wrongly decoded text and HTML entities
# (`open_clip.tokenizer.basic_clean`), which needs whole strings and cannot be expressed in a tokenizer file.
CHARACTER_FIXES = [
    ("[\u2018\u2019\u201a\u201b\u02bc]", "'"),
    ("[\u201c\u201d\u201e\u201f]", '"'),
    ("\ufb00", "ff"),
    ("\ufb01", "fi"),
    ("\ufb02", "fl"),
    ("\ufb03", "ffi"),
    ("\ufb04", "ffl"),
    ("[\ufb05\ufb06]", "st"),
]


class ClipBpeTokenizer(PreTrainedTokenizerFast):
    """A tokenizer whose tokens mark the end of a word, and so the blank after it, like CLIP's.

    `decode` of a continuation (ids without bos at the start) begins with the blank before its first word, because
    transformers' pipelines and streamers append it directly to the prompt. GPT-2's tokens contain this blank.
    """

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, *args: Any, **kwargs: Any) -> str:
        ids = token_ids["input_ids"] if isinstance(token_ids, dict) else token_ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        text = super()._decode(ids, skip_special_tokens, *args, **kwargs)
        return f" {text}" if text and ids[0] != self.bos_token_id else text


def open_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer that `save_pretrained` wrote into `folder`. Raises ValmError if its files are damaged."""
    what = f"the tokenizer in {folder}"
    tokenizer = from_pretrained(PreTrainedTokenizerFast, folder, what, local_files_only=True)
    if getattr(tokenizer.backend_tokenizer.model, "end_of_word_suffix", None):
        return from_pretrained(ClipBpeTokenizer, folder, what, local_files_only=True)
    return tokenizer


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """CLIP's tokenizer: 49,408 tokens, lower-cased text, the ids of open_clip's `SimpleTokenizer`.

    `tokenizer(text)` starts with SOT, as `generate()` needs. The caller adds EOT, which ends a document. Padding is EOT
    on the left. EOT is the largest id, because open_clip's pooling relies on that.
    """
    with gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = [(left, right) for left, right in map(str.split, lines[1 : 1 + NUM_MERGES])]
    return _build(merges)


def prune_tokenizer(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer pruned to the tokens that `texts` need and all single bytes, with new ids.

    The texts are tokenized as before. Other texts can still be tokenized, into more tokens. A merge stays if it makes a
    token of the texts or a part of one, so all merges of the texts stay, in the same order.
    """
    merges = [(left, right) for left, right in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    parts = {left + right: (left, right) for left, right in merges}
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    pending = list(tokenizer.convert_ids_to_tokens(sorted({id for ids in encoded for id in ids})))
    needed = set()
    while pending:
        token = pending.pop()
        if token in parts and token not in needed:
            needed.add(token)
            pending.extend(parts[token])
    return _build([merge for merge in merges if "".join(merge) in needed])


def load_tokenizer(source: str | os.PathLike, *, chats: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of another language model (GPT-2, Llama, ...), set up for a new VaLM.

    As with CLIP's tokenizer, `tokenizer(text)` starts with bos and pads on the left. If there is no bos, texts begin
    with eos, as GPT-2 was trained. If there is no pad token, padding is eos. The chat template is removed unless
    `chats`. Other arguments and errors are those of `own_tokenizer`.
    """
    loaded = own_tokenizer(source)
    made = beginning_with_bos(loaded)
    return PreTrainedTokenizerFast(  # its family's class would replace the beginning of texts when it is opened
        tokenizer_object=made.backend_tokenizer,
        bos_token=made.bos_token,
        eos_token=loaded.eos_token,
        pad_token=loaded.pad_token or loaded.eos_token,
        padding_side="left",
        **({"chat_template": loaded.chat_template} if chats else {}),
    )


def own_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer of another language model, unchanged, with its chat template.

    Args:
        source: a folder with its `tokenizer.json`, a folder of `valm pictures`, or its name on the Hugging Face Hub.

    Raises:
        ValmError: the tokenizer cannot be loaded, is not a fast tokenizer, or has no eos; or as in `part_of`.
    """
    source = part_of(source, MODEL) if os.path.isdir(source) else source
    loaded = from_pretrained(AutoTokenizer, source, f"the tokenizer {source}")
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise ValmError(f"the tokenizer {source} is a {type(loaded).__name__}, expected a fast one (tokenizer.json)")
    if loaded.eos_token is None:
        raise ValmError(f"the tokenizer {source} names no eos token, which ends a document")
    return loaded


def beginning_with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy whose `tokenizer(text)` begins a document (`begin_id`)."""
    made = copy.deepcopy(tokenizer)
    made.bos_token = made.bos_token or made.eos_token
    with library_errors(f"the bos token {short(made.bos_token)} of the tokenizer {tokenizer.name_or_path}"):
        made.backend_tokenizer.post_processor = _begin_with(made.bos_token, begin_id(tokenizer))
    return made


def _begin_with(bos: str, id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, id)])


def _build(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    alphabet = list(open_clip.tokenizer.bytes_to_unicode().values())  # 256 bytes, the printable ones first
    tokens = alphabet + [character + "</w>" for character in alphabet]
    tokens += ["".join(merge) for merge in merges] + [SOT, EOT]
    ids = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC()]
        + [normalizers.Replace(Regex(pattern), text) for pattern, text in CHARACTER_FIXES]
        + [normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Replace removes the last blank, because Strip panics on empty text
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Replace(Regex(r" \z"), "")]
    )
    tokenizer.post_processor = _begin_with(SOT, ids[SOT])
    return ClipBpeTokenizer(
        tokenizer_object=tokenizer, bos_token=SOT, eos_token=EOT, pad_token=EOT, padding_side="left"
    )


def begin_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of the token that begins a document: bos, or eos without bos (Qwen's). Raises ValmError without eos."""
    if tokenizer.eos_token_id is None:
        raise ValmError("the tokenizer names no eos token, which ends a document: set its eos_token")
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens of `text` as the beginning of a document: after bos (`begin_id`), unless the text begins with bos, as
    a prompt from a chat template may. Raises ValmError without eos."""
    begin = begin_id(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if ids[:1] == [begin] else [begin, *ids]


def tokenize_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Each text as a document: bos, its tokens, eos; [] for a text without tokens. Errors are those of `begin_id`."""
    begin, end = begin_id(tokenizer), tokenizer.eos_token_id
    tokens = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [[begin, *ids, end] if ids else [] for ids in tokens]


def padded(documents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, T), int64, padded on the right."""
    ids = torch.zeros(len(documents), max(map(len, documents)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document)
        mask[row, : len(document)] = 1
    return ids, mask


def batches_by_length(lengths: Sequence[int] | np.ndarray, most: int) -> list[list[int]]:
    """Indices of documents of similar length, in batches of at most `most` tokens with padding, or of one document."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > most:
            batches.append([])
        batches[-1].append(index)
    return batches
