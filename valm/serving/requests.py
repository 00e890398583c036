"""The requests of OpenAI's API that the server answers, checked by pydantic."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from valm.errors import ValmError
from valm.text import nearest
from valm_kernels.json_files import short

MAX_STOP, MAX_STOPS = 256, 16  # characters of a stop text, and how many
MAX_PROMPTS = 128
# What OpenAI's clients send for fields without effect here, besides null, false, 0, "" and empty containers.
DEFAULTS: dict[str, list[Any]] = {
    "best_of": [1],
    "modalities": [["text"]],
    "parallel_tool_calls": [True],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "tool_choice": ["none", "auto"],
}

AnyRequest = TypeVar("AnyRequest", bound="Sampling")


class _Checked(BaseModel):
    # further fields are allowed here, and `read` checks them
    model_config = ConfigDict(strict=True, extra="allow")


def _texts(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
TokenId = Annotated[int, Field(ge=0)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class StreamOptions(_Checked):
    include_usage: bool | None = None


class Sampling(_Checked):
    """The fields that both kinds of request share. Temperature 0 is greedy.

    Attributes:
        EXPECTED: the valid values of each field, for error messages.
    """

    EXPECTED: ClassVar[dict[str, str]] = {
        "model": "a text",
        "stream": "true or false",
        "stream_options": "an object with include_usage",
        "max_tokens": "a whole number",
        "temperature": "a number from 0 to 2",
        "top_p": "a number above 0 and at most 1",
        "seed": f"a whole number from 0 to {(1 << 32) - 1}",
        "stop": f"a text, or a list of {MAX_STOPS} texts at most, of 1 to {MAX_STOP} characters",
        "n": "1",
        "user": "a text",
    }

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_texts)] | None = None
    n: Literal[1] | None = None
    user: str | None = None

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens to generate, if the request sets it."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to return with each token; None for no log probabilities at all."""
        raise NotImplementedError


class CompletionRequest(Sampling):
    """A request to /v1/completions."""

    EXPECTED: ClassVar[dict[str, str]] = Sampling.EXPECTED | {
        "prompt": f"a text, a list of token ids, or a list of up to {MAX_PROMPTS} of either",
        "echo": "true or false",
        "logprobs": "a whole number from 0 to 5",
    }

    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class TextPart(_Checked):
    type: Literal["text"]
    text: str


class Message(_Checked):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts)]
    name: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """A request to /v1/chat/completions."""

    EXPECTED: ClassVar[dict[str, str]] = Sampling.EXPECTED | {
        "messages": "a list of messages, each with a role (system, developer, user or assistant) and a text as content",
        "max_completion_tokens": "a whole number",
        "logprobs": "true or false",
        "top_logprobs": "a whole number from 0 to 20",
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class FieldError(ValmError):
    """A field of a request is invalid; `field` is None if the request is no JSON object."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def read(body: bytes | bytearray, kind: type[AnyRequest]) -> AnyRequest:
    """The request in `body`. Raises FieldError if the body is no JSON object, or a field is invalid or unknown."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            reason = first["msg"].removeprefix("Invalid JSON: ")
            raise FieldError(f"the request is no JSON: {reason}") from None
        if not first["loc"]:
            raise FieldError(f"the request is {short(first['input'])}, expected a JSON object") from None
        field = str(first["loc"][0])
        expected = f"expected {kind.EXPECTED[field]}"
        if first["type"] == "missing" and len(first["loc"]) == 1:
            raise FieldError(f"{field} is missing: {expected}", field) from None
        raise FieldError(f"{field}: {expected}, got {short(first['input'])}", field) from None
    _check_others(asked, "")
    return asked


def _check_others(asked: _Checked, place: str) -> None:
    """Checks unknown fields: they must be empty or what OpenAI's clients send by default."""
    known = sorted(type(asked).model_fields)
    for name, value in (asked.model_extra or {}).items():
        if value and value not in DEFAULTS.get(name, []):
            remedy = nearest(name, known) or ": leave it out"
            raise FieldError(f"this server has no {name!r}{place}{remedy}", name)
    for name in known:
        value = getattr(asked, name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, _Checked):
                _check_others(one, f" in {name}")
