"""The routes and the middleware of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from valm.serving.api import Api
from valm.serving.errors import ApiError, BusyError, StoppingError, failed, stopping
from valm.serving.metrics import Metrics
from valm.serving.page import Page

SEARCH = "/v1/images/search"


def build_app(api: Api, hosts: list[str], page: Page | None = None) -> Starlette:
    """The app of `api`, only for requests to `hosts`. With a `page`, it also searches the knowledge base."""

    async def internal_error(request: Request, error: Exception) -> Response:
        _count(api.engine.metrics, request.scope, 500)  # the middleware does not see it
        return failed().response()

    @asynccontextmanager
    async def ended(app: Starlette) -> AsyncIterator[None]:
        yield
        api.engine.end()

    routes = [
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/health", api.health),
        Route("/metrics", api.engine.metrics.page),
    ]
    if page is not None:
        routes += [
            Route("/", page.show),
            Route("/explain", page.explain, methods=["POST"]),
            Route(SEARCH, api.search),
        ]
    return Starlette(
        routes=routes,
        # another site's name can be resolved to this machine (DNS rebinding)
        middleware=[
            Middleware(_Counted, metrics=api.engine.metrics),
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
            Middleware(_OwnPages),
        ],
        exception_handlers={
            ApiError: _api_error,
            BusyError: _busy,
            StoppingError: _stopping,
            HTTPException: _http_error,
            Exception: internal_error,
        },
        lifespan=ended,
    )


class _Counted:
    """ASGI middleware that counts the answered requests of each endpoint."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                _count(self.metrics, scope, message["status"])
            await send(message)

        await self.app(scope, receive, counted)


def _count(metrics: Metrics, scope: Any, status: int) -> None:
    metrics.requests.labels(getattr(scope.get("endpoint"), "__name__", "none"), status).inc()


class _OwnPages:
    """ASGI middleware that rejects requests from pages of other addresses."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin")
        elsewhere = origin is not None and origin.partition("://")[2] != headers.get("host")
        site = headers.get("sec-fetch-site", "none")
        if scope.get("path") == SEARCH:  # its answer's size or time would reveal what is in the knowledge base
            elsewhere |= site not in ("same-origin", "none")
        elif headers.get("sec-fetch-mode") != "navigate":  # "navigate" is a link
            elsewhere |= site == "cross-site"
        if elsewhere:
            error = ApiError(403, "a page of another address may not ask this server")
            await error.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)


async def _api_error(request: Request, error: Any) -> Response:
    return error.response()


async def _busy(request: Request, error: Any) -> Response:
    return ApiError(429, f"{error}: try again later", "rate_limit_exceeded").response()


async def _stopping(request: Request, error: Any) -> Response:
    return stopping().response()


async def _http_error(request: Request, error: Any) -> Response:
    return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
