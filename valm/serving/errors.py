"""The errors that the server answers, in OpenAI's format."""

from __future__ import annotations

from starlette.responses import JSONResponse

# Seconds after which a rejected client may ask again.
RETRY_AFTER = 1


class BusyError(Exception):
    """Too many requests wait; the message says how many."""


class StoppingError(Exception):
    """The server stops before it has answered this request."""


class ApiError(Exception):
    """An answer with an error, in OpenAI's format."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"Retry-After": str(RETRY_AFTER)} if status == 429 else None
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping: ask again when it is back", "server_stopping")


def failed() -> ApiError:
    return ApiError(500, "the server failed to answer this request; its log says why", "internal_error")
