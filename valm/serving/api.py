"""OpenAI's API for one model: completions, chat completions, the list of models, and a search of the images."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

from jinja2 import TemplateError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from valm.clip.tokenizer import prompt_ids
from valm.errors import ValmError
from valm.knowledge_base.format import StoredImage
from valm.model.positions import positions
from valm.retrieval.retriever import Retriever
from valm.serving.bodies import Bodies
from valm.serving.engine import Answer, Engine, Prompt, TokenScore
from valm.serving.errors import ApiError, StoppingError, failed, stopping
from valm.serving.requests import AnyRequest, ChatRequest, CompletionRequest, FieldError, Message, Sampling, read
from valm_kernels.json_files import short

# Maximum bytes of a request. A context of 131,072 tokens takes about half of it in English.
MAX_BODY = 1 << 20
# Default tokens of a completion, as in OpenAI's API. The default of a chat is `max_tokens`.
COMPLETION_TOKENS = 16
# Lower temperatures are greedy, because scores divided by them overflow.
MIN_TEMPERATURE = 1e-4
# Images that a search finds by default and at most; and the most images that an answer lists, best first.
SEARCHED, MAX_SEARCHED, MAX_SEEN = 8, 64, 16


class Kind(NamedTuple):
    """How answers to completions and chats differ. id: its prefix. whole, part: names of the objects."""

    id: str
    whole: str
    part: str


COMPLETION = Kind("cmpl", "text_completion", "text_completion")
CHAT = Kind("chatcmpl", "chat.completion", "chat.completion.chunk")


class Api:
    """The API's handlers.

    Args:
        name: the model's name in requests.
        engine: generates the answers.
        max_tokens: the most tokens that a request may ask for.
    """

    def __init__(self, name: str, engine: Engine, max_tokens: int):
        self.name, self.engine, self.max_tokens = name, engine, max_tokens
        self._bodies = Bodies()
        self.context = positions(engine.model)
        added = engine.tokenizer.added_tokens_decoder.items()
        self._special = {id for id, token in added if token.special}
        # cached, because with `echo` decoding took most of a request's time
        self._shown = cache(lambda id: str(engine.tokenizer.decode([id])))

    async def completions(self, request: Request) -> Response:
        asked = await self._asked(request, CompletionRequest)
        prompts = [await self._prompt(asked, prompt, COMPLETION_TOKENS, bool(asked.echo)) for prompt in asked.prompts]
        return await self._answered(request, COMPLETION, asked, prompts)

    async def chat(self, request: Request) -> Response:
        asked = await self._asked(request, ChatRequest)
        prompt = await self._prompt(asked, self._conversation(asked.messages), self.max_tokens)
        return await self._answered(request, CHAT, asked, [prompt])

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def search(self, request: Request) -> Response:
        """The `k` images of the knowledge base that are nearest to the text `q`."""
        retriever, query = self.engine.model.retriever, request.query_params.get("q", "").strip()
        if not isinstance(retriever, Retriever):
            raise ApiError(404, f"the model {self.name!r} has no knowledge base to search")
        if not query:
            raise ApiError(
                400, "q is missing: expected a text to search for, as in /v1/images/search?q=a+red+boat", param="q"
            )
        count = request.query_params.get("k", str(SEARCHED))
        if count not in map(str, range(1, MAX_SEARCHED + 1)):  # Python refuses to convert 5,000 digits
            raise ApiError(422, f"k: expected a whole number from 1 to {MAX_SEARCHED}, got {short(count)}", param="k")
        k = min(int(count), len(retriever.kb))
        hits = await self.engine.call(lambda: retriever.search(query, k))
        return JSONResponse({"object": "list", "data": [_image(item, score) for score, item in hits]})

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                404, f"the model {name!r} is not served here: ask for {self.name!r}", "model_not_found", "model"
            )

    async def _asked(self, request: Request, kind: type[AnyRequest]) -> AnyRequest:
        """The request's body. Raises ApiError if the body is no JSON, too large or too slow, or a field is invalid."""
        async with self._bodies.held(request, MAX_BODY) as body:
            try:
                asked = read(body, kind)
            except FieldError as error:
                raise ApiError(400, str(error), param=error.field) from None
        self._check_name(asked.model)
        return asked

    def _conversation(self, messages: list[Message]) -> str:
        """The prompt of a chat: by the tokenizer's chat template, or else each message's text on a line."""
        tokenizer = self.engine.tokenizer
        if tokenizer.chat_template is None:
            return "\n".join(message.text for message in messages)
        role = {"developer": "system"}  # its newer name
        turns = [{"role": role.get(message.role, message.role), "content": message.text} for message in messages]
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ApiError(
                400, f"the model's chat template rejects this conversation: {error}", None, "messages"
            ) from None

    async def _prompt(self, asked: Sampling, given: str | list[int], default_tokens: int, echo: bool = False) -> Prompt:
        """The prompt of a request, a text or token ids. Raises ApiError if the prompt or the requested tokens exceed
        what the model or the server allows."""
        if isinstance(given, str):
            try:
                ids = await asyncio.to_thread(prompt_ids, self.engine.tokenizer, given)
            except ValmError as error:
                raise ApiError(400, str(error)) from None
        else:
            ids, tokens = given, len(self.engine.tokenizer)
            if max(ids) >= tokens:
                raise ApiError(400, f"prompt: the model has {tokens:,} tokens, but no token {max(ids)}", param="prompt")
        limit = self._limit(asked.limit, len(ids), default_tokens)
        temperature = asked.temperature or 0.0
        if temperature < MIN_TEMPERATURE:
            temperature = 0.0
        top_p = 1.0 if asked.top_p is None else asked.top_p
        stop = tuple(asked.stop or ())
        return Prompt(ids, limit, temperature, top_p, asked.seed, stop, logprobs=asked.likeliest, echo=echo)

    def _limit(self, limit: int | None, length: int, default: int) -> int:
        """The maximum number of tokens to generate after a prompt of `length` tokens."""
        code, context = "context_length_exceeded", self.context or length + self.max_tokens
        room = context - length
        sizes = f"the model reads {context:,} tokens, and the prompt has {length:,}"
        if room < (limit != 0):
            raise ApiError(400, f"{sizes}: shorten it", code)
        if limit is None:
            return min(default, self.max_tokens, room)
        if limit > self.max_tokens:
            raise ApiError(400, f"max_tokens is {limit:,}, but this server generates {self.max_tokens:,} at most", code)
        if limit > room:
            raise ApiError(400, f"{sizes}: max_tokens must be {room:,} at most, got {limit:,}", code)
        return limit

    async def _answered(self, request: Request, kind: Kind, asked: Sampling, prompts: Sequence[Prompt]) -> Response:
        answers = self.engine.submit(*prompts)
        head = {"id": f"{kind.id}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
        if asked.stream:
            usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            events = self._events(answers, kind, head, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        try:
            texts = await unless_gone(request, asyncio.gather(*map(_joined, answers)))
        finally:
            for answer in answers:
                self.engine.cancel(answer)
        return await asyncio.to_thread(self._written, kind, head, answers, texts)

    def _written(self, kind: Kind, head: dict[str, Any], answers: Sequence[Answer], texts: Sequence[str]) -> Response:
        """The whole answers. Each becomes JSON separately, because the interpreter runs nothing else meanwhile."""
        choices = []
        for index, (answer, text) in enumerate(zip(answers, texts, strict=True)):
            message = {"message": {"role": "assistant", "content": text}}
            choice = {
                "index": index,
                **(message if kind is CHAT else {"text": self._echoed(answer) + text}),
                "logprobs": self._logprobs(kind, answer.prompt, answer.scores, 0),
                "finish_reason": answer.finish_reason,
                "images": self._images(answer),
            }
            choices.append(_json(choice))
        rest = _json({**head, "object": kind.whole, "usage": _usage(answers)})
        return Response(f'{rest[:-1]}, "choices": [{", ".join(choices)}]}}', media_type="application/json")

    def _echoed(self, answer: Answer) -> str:
        prompt = answer.prompt
        return str(self.engine.tokenizer.decode(prompt.ids, skip_special_tokens=True)) if prompt.echo else ""

    def _images(self, answer: Answer) -> list[dict[str, Any]]:
        """The images that the answer's tokens saw, best first."""
        retriever = self.engine.model.retriever
        if not isinstance(retriever, Retriever):
            return []
        best = sorted(answer.images.items(), key=lambda image: -image[1])[:MAX_SEEN]
        return [_image(retriever.kb.item(id), score) for id, score in best]

    def _logprobs(self, kind: Kind, prompt: Prompt, scores: Sequence[TokenScore], offset: int) -> dict[str, Any] | None:
        """The log probabilities of tokens in the format of `kind`. offset: number of characters before them."""
        if prompt.logprobs is None:
            return None
        shown = [self._shown(score.id) for score in scores]
        if kind is CHAT:
            return {
                "content": [
                    _chat_logprob(text, score.logprob)
                    | {"top_logprobs": [_chat_logprob(self._shown(id), value) for id, value in score.likeliest]}
                    for text, score in zip(shown, scores, strict=True)
                ]
            }
        # the text omits special tokens
        lengths = [0 if score.id in self._special else len(text) for text, score in zip(shown, scores, strict=True)]
        return {
            "tokens": shown,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [
                # if tokens look alike, the likeliest, which comes last here
                None if score.logprob is None else {self._shown(id): value for id, value in reversed(score.likeliest)}
                for score in scores
            ],
            "text_offset": list(accumulate(lengths, initial=offset))[:-1],
        }

    async def _events(
        self, answers: Sequence[Answer], kind: Kind, head: dict[str, Any], usage: bool
    ) -> AsyncIterator[str]:
        """The server-sent events of streamed answers."""
        chat = kind is CHAT
        told = [0] * len(answers)  # scores of tokens
        lengths = [0] * len(answers)  # characters
        echoing = {index for index, answer in enumerate(answers) if answer.prompt.echo}

        def event(index: int, text: str | None, more: dict[str, Any], last: int | None = None) -> str:
            """A part of an answer, with the scores of its tokens up to `last`."""
            answer = answers[index]
            what: dict[str, Any] = {"text": text or ""}
            if chat:
                what = {"delta": {} if text is None else {"content": text}}
            scores = answer.scores[told[index] : last]
            logprobs = self._logprobs(kind, answer.prompt, scores, lengths[index])
            told[index] += len(scores)
            lengths[index] += len(text or "")
            choice = {"index": index, **what, "logprobs": logprobs, "finish_reason": None, **more}
            return _event({**head, "object": kind.part, "choices": [choice]})

        def echo(index: int) -> str:
            answer = answers[index]
            return event(index, self._echoed(answer), {}, last=len(answer.prompt.ids))

        try:
            if chat:
                yield event(0, "", {"delta": {"role": "assistant", "content": ""}})
            async for index, text in _merged(answers):
                answer = answers[index]
                if index in echoing:  # the prompt's tokens are scored now
                    echoing.remove(index)
                    yield await asyncio.to_thread(echo, index)
                if text is None:
                    yield event(index, None, {"finish_reason": answer.finish_reason, "images": self._images(answer)})
                else:
                    yield event(index, text, {})
            if usage:
                yield _event({**head, "object": kind.part, "choices": [], "usage": _usage(answers)})
            yield "data: [DONE]\n\n"
        except StoppingError:
            yield _event(stopping().content)
        except Exception:
            logging.getLogger("uvicorn.error").exception("a streamed answer failed")
            yield _event(failed().content)
        finally:
            for answer in answers:
                self.engine.cancel(answer)


async def _joined(answer: Answer) -> str:
    return "".join([text async for text in answer])


async def _merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, str | None]]:
    """The parts of all answers as they arrive, each with the number of its answer; None at an answer's end."""
    parts: asyncio.Queue[tuple[int, str | Exception | None]] = asyncio.Queue()

    async def pass_on(index: int, answer: Answer) -> None:
        part: str | Exception | None = ""
        while isinstance(part, str):
            part = await answer.parts.get()
            parts.put_nowait((index, part))

    tasks = [asyncio.ensure_future(pass_on(index, answer)) for index, answer in enumerate(answers)]
    try:
        ended = 0
        while ended < len(answers):
            index, part = await parts.get()
            if isinstance(part, Exception):
                raise part
            ended += part is None
            yield index, part
    finally:
        for task in tasks:
            task.cancel()


async def unless_gone(request: Request, answering: Any) -> Any:
    """Returns what `answering` returns; ends it if the client disconnects. Raises ApiError if the client has
    disconnected, and will not read the error."""
    answer, gone = asyncio.ensure_future(answering), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ApiError(499, "the client has gone")
        return answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def _usage(answers: Iterable[Answer]) -> dict[str, int]:
    sizes = [(len(answer.prompt.ids), answer.num_tokens) for answer in answers]
    prompt, new = (sum(column) for column in zip(*sizes, strict=True))
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _image(item: StoredImage, score: float) -> dict[str, Any]:
    return {"id": item.id, "score": round(score, 4), "uri": item.uri, "caption": item.caption}


def _chat_logprob(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _event(content: dict[str, Any]) -> str:
    return f"data: {_json(content)}\n\n"


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False)
