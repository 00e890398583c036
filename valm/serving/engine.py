"""Generates for many requests at once: each joins the batch in its turn and leaves it at its end."""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import insort
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, TemperatureLogitsWarper, TopPLogitsWarper

from valm.clip.linear import pack_layers
from valm.errors import PANIC, ValmError
from valm.serving.batch import Batch, Seen, can_join, needs_positions
from valm.serving.errors import BusyError, StoppingError
from valm.serving.metrics import Metrics
from valm.serving.text import StreamedText

# Maximum tokens, with padding, of prompts that are read together; larger products are hardly faster. A longer prompt is
# read by itself, so that the retriever's cache finds what a conversation repeats.
PROMPT_TOKENS = 512
# Seconds that a first request waits for simultaneous requests, to be read together with them.
GATHERING = 0.01
# How many prompts may wait that are not the first of their request: as many as four of the largest requests contain.
FURTHER_PROMPTS = 512


@dataclass(frozen=True)
class Prompt:
    """What to continue, and how.

    Attributes:
        ids: the tokens.
        max_new_tokens: 0 only reads the prompt.
        temperature: 0 is greedy.
        seed: random seed for sampling.
        stop: texts before which to end.
        logprobs: return the log probability of each new token and this many likeliest tokens; None: neither.
        echo: return the prompt and its log probabilities too.
    """

    ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False

    @property
    def scores_itself(self) -> bool:
        """Whether the log probabilities of the prompt's tokens are asked for."""
        return self.echo and self.logprobs is not None


class TokenScore(NamedTuple):
    """A token, its log probability (None for a text's first token), and the likeliest tokens with log probabilities."""

    id: int
    logprob: float | None
    likeliest: list[tuple[int, float]]


class Answer:
    """The continuation of a prompt: `async for text in answer` yields its parts as they are generated.

    Attributes:
        num_tokens: number of generated tokens, with eos.
        finish_reason: "stop" after eos or a stop text, "length" after max_new_tokens; known after the last part.
        scores: of the tokens so far, if the prompt asks for `logprobs`.
        images: the ids of the images that its tokens saw, with the best score of each.
        turn: answers with a lower turn are read first.
        parts: the parts that are not read yet, then the error that ends the answer, or None at its end.
    """

    def __init__(self, prompt: Prompt, loop: asyncio.AbstractEventLoop):
        self.prompt = prompt
        self.num_tokens = 0
        self.finish_reason = "length"
        self.cancelled = False
        self.scores: list[TokenScore] = []
        self.images: dict[int, float] = {}
        self.turn = 0
        self.loop = loop
        self.begun = time.monotonic()
        self.parts: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    def put(self, part: str | Exception | None) -> None:
        """Adds a part, the error that ends the answer, or None for its end, from any thread."""
        self.loop.call_soon_threadsafe(self.parts.put_nowait, part)

    async def __aiter__(self) -> AsyncIterator[str]:
        while (part := await self.parts.get()) is not None:
            if isinstance(part, Exception):
                raise part
            yield part


@dataclass(eq=False)
class Call:
    """Other work on the model, with its result and, like an answer, a turn."""

    function: Callable[[], Any]
    result: asyncio.Future[Any]
    turn: int = 0


class Engine:
    """Owns the thread that uses the model. All methods are called on the event loop.

    Args:
        model, tokenizer: as `valm.load` returns them; nothing else may use the model meanwhile. Its linear layers are
            packed (`pack_layers`).
        max_waiting: how many requests may wait.
        max_batch: how many requests are answered together; 1 if the model's cache cannot be padded (`can_join`).

    Raises:
        ValmError: the model takes images but has no retriever, or cannot read token by token (`needs_positions`).
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, max_waiting: int, max_batch: int = 8):
        self.model, self.tokenizer = model, tokenizer
        self.max_waiting = max_waiting
        if (images := model.fusion_options.num_images) and model.retriever is None:
            raise ValmError(
                f"the model takes {images} images a token, but has no retriever: give it a knowledge base (--kb)"
            )
        pack_layers(model)
        self.positions = needs_positions(model)
        self.max_batch = max_batch if max_batch == 1 or can_join(model, self.positions) else 1
        # the ids that the retriever's encoder can read; a vocabulary may contain unused rows
        self.num_ids: int | None = getattr(getattr(model.retriever, "encoder", None), "num_ids", None)
        self.metrics = Metrics()
        self.metrics.waiting.set_function(lambda: len(self._waiting))
        self._rows: list[_Row] = []
        self._batch = Batch(model, self.positions)
        self._waiting: list[Answer | Call] = []  # in their turn
        self._open: dict[Answer | Call, object] = {}  # with its request
        self.ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    def submit(self, *prompts: Prompt) -> list[Answer]:
        """The answers to the prompts of a request. Waiting requests take turns, prompt by prompt.

        Raises:
            BusyError: too many requests wait, or too many further prompts of requests.
            StoppingError: after `end`.
        """
        answers = [Answer(prompt, asyncio.get_running_loop()) for prompt in prompts]
        self._add(*answers)
        return answers

    async def call(self, function: Callable[[], Any]) -> Any:
        """Calls `function`, which may use the model, in its turn between two tokens of the answers, and returns its
        result. It may be cancelled before.

        Raises:
            BusyError, StoppingError: as in `submit`; and what `function` raises.
        """
        call = Call(function, asyncio.get_running_loop().create_future())
        self._add(call)
        try:
            return await call.result
        finally:
            self._forget(call)

    def cancel(self, answer: Answer) -> None:
        """Ends an answer that nobody reads any more, before its next token."""
        answer.cancelled = True
        self._forget(answer)
        answer.put(None)

    def end(self) -> None:
        """Ends all answers; their readers and later requests get a `StoppingError`."""
        with self._changed:
            self.ended = True
            self._changed.notify()
        for one in list(self._open):
            if isinstance(one, Answer):
                one.put(StoppingError())
                self.cancel(one)
            elif not one.result.done():
                one.result.set_exception(StoppingError())

    def _add(self, *new: Answer | Call) -> None:
        requests = len(set(self._open.values()))
        further = len(self._open) - requests
        with self._changed:
            if self.ended:
                raise StoppingError
            if requests >= self.max_batch + self.max_waiting:
                raise BusyError(f"{self.max_waiting:,} requests are already waiting")
            if further + len(new) - 1 > FURTHER_PROMPTS:
                raise BusyError(f"{further:,} further prompts of requests are already waiting")
            self._open.update(dict.fromkeys(new, object()))
            turn = self._waiting[0].turn + 1 if self._waiting else 0
            for one in new:
                one.turn, turn = turn, turn + 1
                insort(self._waiting, one, key=lambda each: each.turn)
            self._changed.notify()

    def _forget(self, one: Answer | Call) -> None:
        self._open.pop(one, None)
        with self._changed, suppress(ValueError):
            self._waiting.remove(one)

    # ---- on the thread ----

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._rows or self.ended)
                if not self._rows and self._waiting and isinstance(self._waiting[0], Answer):
                    self._changed.wait_for(lambda: len(self._waiting) >= self.max_batch or self.ended, GATHERING)
                if self.ended:
                    return
                first = self._waiting[0] if self._waiting else None
                call = first if isinstance(first, Call) else None
                if call is not None:
                    self._waiting.pop(0)
                new = self._next_answers()
            try:
                if call is not None:
                    self._call(call)
                if new:
                    self._begin(new)
                if self._rows:
                    self._step()
            except BaseException as error:  # the batch may be half changed
                rows, self._rows, self._batch = self._rows, [], Batch(self.model, self.positions)
                for row in rows:
                    row.end(error)

    def _next_answers(self) -> list[Answer]:
        """Takes the answers whose turn it is, and whose prompts are read together now."""
        new: list[Answer] = []
        longest = 0
        while self._waiting and len(self._rows) + len(new) < self.max_batch:
            answer = self._waiting[0]
            if isinstance(answer, Call):
                break
            longest = max(longest, len(answer.prompt.ids))
            if new and longest * (len(new) + 1) > PROMPT_TOKENS:
                break
            self._waiting.pop(0)
            new.append(answer)
        return new

    def _call(self, call: Call) -> None:
        loop = call.result.get_loop()
        try:
            set_result, value = call.result.set_result, call.function()
        except BaseException as error:
            set_result, value = call.result.set_exception, _raised(error)
        loop.call_soon_threadsafe(lambda: None if call.result.done() else set_result(value))

    def _begin(self, answers: list[Answer]) -> None:
        """Reads the prompts, and puts answers longer than a token into the batch."""
        read = Batch(self.model, self.positions)
        try:
            rows = [_Row(answer, self) for answer in answers]
            prompts = [torch.tensor(answer.prompt.ids, device=self.model.device) for answer in answers]
            seen = read.begin(prompts, all_logits=any(answer.prompt.scores_itself for answer in answers))
        except BaseException as error:
            if len(answers) == 1:
                self._end(answers[0], error)
            else:  # the error may be due to one of them
                for answer in answers:
                    self._begin([answer])
            return
        tokens = sum(map(len, prompts))
        self.metrics.prompt_tokens.inc(tokens)
        self._count(seen, tokens)
        for place, row in enumerate(rows):
            row.take(seen, place)
            self.metrics.first_token.observe(time.monotonic() - row.answer.begun)
        going_on = [place for place, row in enumerate(rows) if row.goes_on]
        try:
            if len(going_on) < len(rows):
                read.keep(going_on)
            if going_on:
                self._batch.join(read)
        except BaseException as error:
            for place in going_on:
                rows[place].end(error)
        self._rows += [row for row in rows if row.goes_on]

    def _end(self, answer: Answer, error: BaseException | None = None) -> None:
        """Tells the answer's reader that it ends."""
        # before the reader sees the end, because it may ask again immediately
        answer.loop.call_soon_threadsafe(self._open.pop, answer, None)
        answer.put(None if error is None else _raised(error))

    def _step(self) -> None:
        """Adds a token to each row."""
        self._keep([not row.answer.cancelled for row in self._rows])
        if not self._rows:
            return
        begin = time.monotonic()
        seen = self._batch.read(torch.tensor([[row.last] for row in self._rows], device=self.model.device))
        self._count(seen, len(self._rows))
        for place, row in enumerate(self._rows):
            row.take(seen, place)
            self.metrics.token.observe(time.monotonic() - begin)
        self.metrics.batch.observe(len(self._rows))
        self._keep([row.goes_on for row in self._rows])

    def _count(self, seen: Seen, tokens: int) -> None:
        if seen.image_ids is not None:
            self.metrics.searches.inc(tokens)

    def _keep(self, kept: list[bool]) -> None:
        if not all(kept):
            places = [place for place, keep in enumerate(kept) if keep]
            self._rows = [self._rows[place] for place in places]
            self._batch.keep(places)


class _Row:
    """An answer that is being generated."""

    def __init__(self, answer: Answer, engine: Engine):
        self.answer, self.engine = answer, engine
        prompt = answer.prompt
        self.goes_on = True  # until its last token
        self.last = -1
        self._text: StreamedText | None = None
        self._generator: torch.Generator | None = None
        self._processors = LogitsProcessorList()
        if prompt.temperature > 0:
            self._generator = torch.Generator(engine.model.device)
            if prompt.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(prompt.seed)
            self._processors.append(TemperatureLogitsWarper(prompt.temperature))
            if prompt.top_p < 1:
                self._processors.append(TopPLogitsWarper(prompt.top_p))

    def end(self, error: BaseException | None = None) -> None:
        self.goes_on = False
        self.engine._end(self.answer, error)

    def take(self, seen: Seen, row: int) -> None:
        """Chooses the next token after the last token that `row` of the batch has read. An error ends only this row."""
        try:
            self._take(seen, row)
        except BaseException as error:
            self.end(error)

    def _take(self, seen: Seen, row: int) -> None:
        answer, prompt = self.answer, self.answer.prompt
        if seen.image_ids is not None and seen.scores is not None:
            _note_images(answer.images, seen.image_ids[row], seen.scores[row])
        if self._text is None and prompt.scores_itself:
            self._score_prompt(seen.logits[row])
        if answer.num_tokens == prompt.max_new_tokens:  # 0
            self.end()
            return
        logits = seen.logits[row, -1]
        self.last = self._chosen(logits)
        answer.num_tokens += 1
        self.engine.metrics.generated_tokens.inc()
        if prompt.logprobs is not None:
            answer.scores.append(_score(self.last, logits, prompt.logprobs))
        if self._text is None:
            self._text = StreamedText(self.engine.tokenizer, prompt.ids, prompt.stop)
        if part := self._text.add(self.last):
            answer.put(part)
        ended = self._text.stopped or self.last in _end_ids(self.engine.model)
        if ended:
            answer.finish_reason = "stop"
        if not ended and self.engine.num_ids is not None and self.last >= self.engine.num_ids:
            raise ValueError(f"the model wrote token {self.last}, which its tokenizer does not know")
        if ended or answer.num_tokens == prompt.max_new_tokens:
            if part := self._text.rest():
                answer.put(part)
            self.end()

    def _score_prompt(self, logits: Tensor) -> None:
        """Notes the log probabilities of the prompt's tokens. logits: (T, V), padding first."""
        ids, count = self.answer.prompt.ids, self.answer.prompt.logprobs or 0
        self.answer.scores.append(TokenScore(ids[0], None, []))
        self.answer.scores += [_score(id, of, count) for id, of in zip(ids[1:], logits[-len(ids) :], strict=False)]

    def _chosen(self, logits: Tensor) -> int:
        if self._generator is None:
            return int(logits.argmax())
        ids: Any = torch.empty(1, 0, dtype=torch.int64, device=logits.device)  # these processors do not read it
        probabilities = self._processors(ids, logits[None]).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _raised(error: BaseException) -> Exception:
    """The exception that the reader of a result gets."""
    return error if isinstance(error, Exception) else ValmError(f"{PANIC}: {error}")


def _score(id: int, logits: Tensor, count: int) -> TokenScore:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(count)
    return TokenScore(id, float(logprobs[id]), list(zip(ids.tolist(), values.tolist(), strict=True)))


def _note_images(images: dict[int, float], ids: Tensor, scores: Tensor) -> None:
    """Adds the images of tokens; ids and scores are (T, K)."""
    for id, score in zip(ids.flatten().tolist(), scores.flatten().tolist(), strict=True):
        if id >= 0 and score > images.get(id, float("-inf")):
            images[id] = score


def _end_ids(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]
