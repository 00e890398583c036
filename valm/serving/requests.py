"""The requests of OpenAI's API that are answered here, as pydantic checks them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_STOP = 256  # characters of a stop text


class _Checked(BaseModel):
    """Fields that OpenAI's API has and this server does not may be empty: null, false, 0, "" or a container."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="after")
    def _has_no_others(self) -> Any:
        for name, value in (self.model_extra or {}).items():
            if value:
                raise ValueError(f"this server has no {name!r}: leave it out")
        return self


def _texts(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]


class Sampling(_Checked):
    """What both kinds of request have. Temperature 0 is greedy."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    stop: Annotated[list[Stop], Field(max_length=4), BeforeValidator(_texts)] | None = None
    n: Literal[1] | None = None
    user: str | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens to generate, if the request says so."""
        return self.max_tokens


class StreamOptions(_Checked):
    include_usage: bool | None = None


class CompletionRequest(Sampling):
    """Of /v1/completions."""

    prompt: str


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
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
