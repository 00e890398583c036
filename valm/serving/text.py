"""Decodes an answer token by token, in time proportional to the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast


class StreamedText:
    """Decodes the tokens after a prompt one by one, and ends before the first stop text.

    Text is held back while it may belong to an incomplete character or to a stop text. Special tokens produce no text,
    but may be stop texts.

    Attributes:
        stopped: whether a stop text was found; no token may follow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        # tokenizers' own DecodeStream raises if an invalid byte changes the characters before it
        self._context = list(prompt)  # the blank before a word depends on the token before it
        self._new: list[int] = []  # tokens of an incomplete character
        self._waiting = ""  # the beginning of a stop text
        added = tokenizer.added_tokens_decoder.items()
        self._stop_ids = {id for id, token in added if token.special and token.content in stop}

    def add(self, id: int) -> str:
        """The further text that is now certain to be in the answer."""
        self._new.append(id)
        new = self._decoded()
        if new.endswith("\ufffd"):
            new = ""
        elif new:
            self._context, self._new = self._new, []
        found = self._until_stop(new)
        if id in self._stop_ids:
            found, self.stopped = found + self._waiting, True
        return found

    def rest(self) -> str:
        """The text that was held back, at the end of an answer that no stop text ended."""
        if self.stopped:
            return ""
        found = self._until_stop(self._decoded())
        return found if self.stopped else found + self._waiting

    def _decoded(self) -> str:
        """The new tokens as text, decoded after the context."""
        before, both = (
            str(self.tokenizer.decode(ids, skip_special_tokens=True))
            for ids in (self._context, self._context + self._new)
        )
        return both[len(before) :]

    def _until_stop(self, new: str) -> str:
        text = self._waiting + new
        ends = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)]
        waiting = max((n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        self._waiting = text[len(text) - waiting :]
        return text[: len(text) - waiting]
