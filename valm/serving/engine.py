"""Generates for one request at a time, in the order in which they came.

So each has a cache and a retriever's state of its own, and the random numbers of one do not depend on others. What is
shared is the retriever's cache of whole segments, whose images depend on their text alone (`Retriever.step`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

from valm.errors import PANIC
from valm.model.sampling import keep_ends_alone, sampling_options

# A token of byte fallback. What a run of them decodes to depends on all of it.
BYTE = re.compile("<0x[0-9A-F]{2}>")


class BusyError(Exception):
    """As many requests wait as may."""


class StoppingError(Exception):
    """The server ends, and has no time left for this request."""


@dataclass(frozen=True)
class Prompt:
    """What to continue, and how. ids: the tokens; temperature 0 is greedy; stop: texts before which to end."""

    ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Answer:
    """The continuation of a prompt: `async for text in answer` yields its parts as they are generated.

    Attributes:
        num_tokens: how many were generated, with eos.
        finish_reason: "stop" after eos or a stop text, "length" after max_new_tokens; known after the last part.
    """

    def __init__(self, prompt: Prompt, loop: asyncio.AbstractEventLoop):
        self.prompt = prompt
        self.num_tokens = 0
        self.finish_reason = "length"
        self.cancelled = False
        self.loop = loop
        self._parts: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    def put(self, part: str | Exception | None) -> None:
        """Adds a part, the error that ends the answer, or None for its end, from any thread."""
        self.loop.call_soon_threadsafe(self._parts.put_nowait, part)

    async def __aiter__(self) -> AsyncIterator[str]:
        while (part := await self._parts.get()) is not None:
            if isinstance(part, Exception):
                raise part
            yield part


class Engine:
    """Owns the thread that generates. All methods are called on the event loop.

    Args:
        model, tokenizer: as `valm.load` returns them; nothing else may use the model meanwhile.
        max_waiting: requests that may wait for the one that is being answered.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, max_waiting: int):
        keep_ends_alone(model)
        self.model, self.tokenizer = model, tokenizer
        self.max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._open: set[Answer] = set()
        self._ended = False

    def submit(self, prompt: Prompt) -> Answer:
        """The answer to `prompt`, which waits its turn.

        Raises:
            BusyError: too many wait.
            StoppingError: after `end`.
        """
        if self._ended:
            raise StoppingError
        if len(self._open) > self.max_waiting:
            raise BusyError
        answer = Answer(prompt, asyncio.get_running_loop())
        self._open.add(answer)
        self._thread.submit(self._run, answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """Ends an answer that nobody reads, before its next token."""
        answer.cancelled = True
        self._open.discard(answer)

    def end(self) -> None:
        """Ends all answers: their readers get a `StoppingError`, as those of later requests do."""
        self._ended = True
        for answer in list(self._open):
            answer.put(StoppingError())
            self.cancel(answer)

    async def join(self) -> None:
        """Waits until nothing is generated."""
        await asyncio.to_thread(self._thread.shutdown)

    def _run(self, answer: Answer) -> None:
        last: Exception | None = None
        try:
            if not answer.cancelled:
                self._generate(answer)
        except Exception as error:
            last = error
        except BaseException as error:
            last = RuntimeError(f"{PANIC}: {error}")
        # before the end is read, as its reader may ask again at once
        answer.loop.call_soon_threadsafe(self._open.discard, answer)
        answer.put(last)

    def _generate(self, answer: Answer) -> None:
        prompt = answer.prompt
        sampling = sampling_options(False)
        if prompt.temperature > 0:
            sampling = sampling_options(True, prompt.temperature, prompt.top_p)
            if prompt.seed is None:
                torch.seed()
            else:
                torch.manual_seed(prompt.seed)
        ids = torch.tensor([prompt.ids], device=self.model.device)
        writer = _Writer(answer, self.tokenizer)
        tokens = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=prompt.max_new_tokens,
            num_beams=1,
            stopping_criteria=StoppingCriteriaList([writer]),
            **sampling,
        )
        answer.num_tokens = tokens.shape[1] - len(prompt.ids)
        # generate also ends at a token of the model's generation_config
        if writer.stopped or answer.num_tokens < prompt.max_new_tokens or tokens[0, -1] in self._end_ids():
            answer.finish_reason = "stop"
        writer.write_rest()

    def _end_ids(self) -> list[int]:
        ids = self.model.generation_config.eos_token_id
        return ids if isinstance(ids, list) else [ids]


class _Writer(StoppingCriteria):
    """Writes the text of an answer after each token, and ends it at a stop text or when it was cancelled.

    The last characters wait for the next token while they may belong to an incomplete character or a stop text.
    """

    def __init__(self, answer: Answer, tokenizer: PreTrainedTokenizerFast):
        self.answer, self.tokenizer = answer, tokenizer
        self.stopped = False
        self._text = ""  # of the continuation so far
        self._written = 0
        # special tokens, which the text does not have
        added = tokenizer.added_tokens_decoder.items()
        self._stop_ids = {id for id, token in added if token.special and token.content in answer.prompt.stop}
        self._begin = 0
        self._begin = len(self._decoded(answer.prompt.ids))

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if self.answer.cancelled:
            return torch.ones(1, dtype=torch.bool, device=input_ids.device)
        stop = self.answer.prompt.stop
        self._text = self._decoded(input_ids[0].tolist())
        if int(input_ids[0, -1]) in self._stop_ids:
            self.stopped = True
        ends = [place for text in stop if (place := self._text.find(text)) >= 0]
        if ends:
            self._text, self.stopped = self._text[: min(ends)], True
        elif not BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(int(input_ids[0, -1])))):
            waiting = max((n for text in stop for n in range(len(text)) if self._text.endswith(text[:n])), default=0)
            self._write(self._text[: len(self._text) - waiting].rstrip("\ufffd"))
        return torch.full((1,), self.stopped, device=input_ids.device)

    def write_rest(self) -> None:
        self._write(self._text)

    def _write(self, text: str) -> None:
        if len(text) > self._written:
            self.answer.put(text[self._written :])
            self._written = len(text)

    def _decoded(self, ids: list[int]) -> str:
        # with the prompt, as the blank before a word depends on the token before it
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))[self._begin :]
