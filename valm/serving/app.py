"""OpenAI's API for one model: completions, chat completions, the list of models, and a check that the server lives."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from valm.clip.tokenizer import prompt_ids
from valm.errors import ValmError
from valm.model.positions import positions
from valm.serving.engine import Answer, BusyError, Engine, Prompt, StoppingError
from valm.serving.requests import ChatRequest, CompletionRequest, Message, Sampling

# Bytes of a request. A context of 131,072 tokens is about half of it in English.
MAX_BODY = 1 << 20
# Seconds for a request to come in, less than those for it to be answered when the server stops.
BODY_SECONDS = 5
# Tokens of a completion whose request does not say how many, as OpenAI's API has it. A chat's end at `max_tokens`.
COMPLETION_TOKENS = 16
# A lower temperature is greedy, as scores divided by it overflow.
MIN_TEMPERATURE = 1e-4

AnyRequest = TypeVar("AnyRequest", bound=Sampling)


class ApiError(Exception):
    """An answer with an error, in OpenAI's format."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Kind(NamedTuple):
    """How answers to completions and chats differ. id: its beginning; whole, part: what the object is called."""

    id: str
    whole: str
    part: str


COMPLETION = Kind("cmpl", "text_completion", "text_completion")
CHAT = Kind("chatcmpl", "chat.completion", "chat.completion.chunk")


class Api:
    """The API's handlers.

    Args:
        name: the model's name in requests.
        engine: what generates.
        max_tokens: the most that a request may ask for.
    """

    def __init__(self, name: str, engine: Engine, max_tokens: int):
        self.name, self.engine, self.max_tokens = name, engine, max_tokens
        self.context = positions(engine.model)

    async def completions(self, request: Request) -> Response:
        asked = await self._asked(request, CompletionRequest)
        prompt = await self._prompt(asked, asked.prompt, COMPLETION_TOKENS)
        return await self._answered(request, COMPLETION, asked, prompt)

    async def chat(self, request: Request) -> Response:
        asked = await self._asked(request, ChatRequest)
        prompt = await self._prompt(asked, self._conversation(asked.messages), self.max_tokens)
        return await self._answered(request, CHAT, asked, prompt)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                404, f"the model {name!r} is not served here: ask for {self.name!r}", "model_not_found", "model"
            )

    async def _asked(self, request: Request, kind: type[AnyRequest]) -> AnyRequest:
        """The request's body.

        Raises:
            ApiError: it is no JSON, too large or too slow, or has a field that does not fit.
        """
        # a form of another page, which a browser sends without asking, cannot have this type
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the request must have the header Content-Type: application/json")
        try:
            body = await asyncio.wait_for(_body(request), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request was not complete after {BODY_SECONDS} seconds") from None
        try:
            asked = kind.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"])) or None
            said = first["msg"].removeprefix("Value error, ")
            message = said if field is None else f"{field}: {said}"
            raise ApiError(400, message, param=field) from None
        self._check_name(asked.model)
        return asked

    def _conversation(self, messages: list[Message]) -> str:
        """The text of a chat's prompt: by the tokenizer's chat template, or else each message's text on a line."""
        tokenizer = self.engine.tokenizer
        if tokenizer.chat_template is None:
            return "\n".join(message.text for message in messages)
        role = {"developer": "system"}  # its newer name
        turns = [{"role": role.get(message.role, message.role), "content": message.text} for message in messages]
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ApiError(
                400, f"the model's chat template has no such conversation: {error}", None, "messages"
            ) from None

    async def _prompt(self, asked: Sampling, text: str, default_tokens: int) -> Prompt:
        """The prompt of a request.

        Raises:
            ApiError: the prompt and the tokens that are asked for are more than the model or the server takes.
        """
        try:
            ids = await asyncio.to_thread(prompt_ids, self.engine.tokenizer, text)
        except ValmError as error:
            raise ApiError(400, str(error)) from None
        code = "context_length_exceeded"
        room = self.max_tokens if self.context is None else self.context - len(ids)
        if room < 1:
            raise ApiError(
                400, f"the model reads {self.context:,} tokens, and the prompt has {len(ids):,}: shorten it", code
            )
        limit = asked.limit
        if limit is None:
            limit = min(default_tokens, self.max_tokens, room)
        elif limit > self.max_tokens:
            raise ApiError(400, f"max_tokens is {limit:,}, and this server generates {self.max_tokens:,} at most", code)
        elif limit > room:
            sizes = f"the model reads {self.context:,} tokens, and the prompt has {len(ids):,}"
            raise ApiError(400, f"{sizes}: max_tokens must be {room:,} at most, got {limit:,}", code)
        temperature = asked.temperature or 0.0
        if temperature < MIN_TEMPERATURE:
            temperature = 0.0
        top_p = 1.0 if asked.top_p is None else asked.top_p
        return Prompt(ids, limit, temperature, top_p, asked.seed, tuple(asked.stop or ()))

    async def _answered(self, request: Request, kind: Kind, asked: Sampling, prompt: Prompt) -> Response:
        try:
            answer = self.engine.submit(prompt)
        except BusyError:
            waiting = f"{self.engine.max_waiting:,} requests wait already: try again later"
            raise ApiError(429, waiting, "rate_limit_exceeded") from None
        except StoppingError:
            raise _stopping() from None
        head = {"id": f"{kind.id}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
        if asked.stream:
            usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            events = self._events(answer, kind, head, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        try:
            text = await _unless_gone(request, _joined(answer))
        except StoppingError:
            raise _stopping() from None
        finally:
            self.engine.cancel(answer)
        what: dict[str, Any] = {"text": text}
        if kind is CHAT:
            what = {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **what, "logprobs": None, "finish_reason": answer.finish_reason}
        return JSONResponse({**head, "object": kind.whole, "choices": [choice], "usage": _usage(answer)})

    async def _events(self, answer: Answer, kind: Kind, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
        """The server-sent events of a streamed answer."""

        def event(what: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": 0, **what, "logprobs": None, "finish_reason": reason}
            return _event({**head, "object": kind.part, "choices": [choice]})

        chat = kind is CHAT
        try:
            if chat:
                yield event({"delta": {"role": "assistant", "content": ""}})
            async for text in answer:
                yield event({"delta": {"content": text}} if chat else {"text": text})
            yield event({"delta": {}} if chat else {"text": ""}, answer.finish_reason)
            if usage:
                yield _event({**head, "object": kind.part, "choices": [], "usage": _usage(answer)})
            yield "data: [DONE]\n\n"
        except StoppingError:
            yield _event(_stopping().content)
        except Exception:
            logging.getLogger("uvicorn.error").exception("a streamed answer failed")
            yield _event(_failed().content)
        finally:
            self.engine.cancel(answer)


def build_app(api: Api, hosts: list[str]) -> Starlette:
    """The app of `api`, which answers requests to `hosts` only."""

    @asynccontextmanager
    async def ended(app: Starlette) -> AsyncIterator[None]:
        yield
        api.engine.end()
        await api.engine.join()

    return Starlette(
        routes=[
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/health", api.health),
        ],
        # a page elsewhere can have its own name resolved to this machine (DNS rebinding)
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _internal_error},
        lifespan=ended,
    )


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise ApiError(413, f"the request has more than {MAX_BODY:,} bytes", "request_too_large")
    except ClientDisconnect:
        raise ApiError(499, "the client has gone") from None
    return bytes(body)


async def _joined(answer: Answer) -> str:
    return "".join([text async for text in answer])


async def _unless_gone(request: Request, answering: Any) -> str:
    """What `answering` returns. Ends it when the client has gone.

    Raises:
        ApiError: the client has gone, and will not read this.
    """
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


def _usage(answer: Answer) -> dict[str, int]:
    prompt, new = len(answer.prompt.ids), answer.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping: ask again when it is back", "server_stopping")


def _failed() -> ApiError:
    return ApiError(500, "the server failed to answer this request; its log says why", "internal_error")


async def _api_error(request: Request, error: Any) -> Response:
    return JSONResponse(error.content, error.status)


async def _http_error(request: Request, error: Any) -> Response:
    return await _api_error(
        request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    )


async def _internal_error(request: Request, error: Exception) -> Response:
    return await _api_error(request, _failed())
