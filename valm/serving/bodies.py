"""Reads the bodies of requests, many at once, into bounded memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request

from valm.serving.errors import ApiError, BusyError

# Seconds for a request to arrive, fewer than the seconds for its answer when the server stops.
BODY_SECONDS = 5
# Maximum bytes of the bodies in memory: four of the page's largest.
MAX_BYTES = 256 << 20


@dataclass(eq=False)
class _Body:
    address: str
    content: bytearray = field(default_factory=bytearray)


class Bodies:
    """The bodies in memory. They arrive side by side, so a slow body delays no other. Beyond MAX_BYTES, the largest one
    that still arrives from the address with the most bytes is rejected."""

    def __init__(self) -> None:
        self._bodies: dict[_Body, asyncio.Task[None]] = {}
        self._bytes = 0

    @asynccontextmanager
    async def held(self, request: Request, most: int) -> AsyncIterator[bytearray]:
        """The body of a JSON request, which counts as in memory until the block ends.

        Raises:
            ApiError: the body has another type, more than `most` bytes, or is too slow; or the client has gone.
            BusyError: the body gave way.
        """
        # a browser sends another page's form without asking, but not with this type
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the request must have the header Content-Type: application/json")
        body = _Body(request.client.host if request.client else "")
        arriving = self._bodies[body] = asyncio.ensure_future(self._read(body, request, most))
        try:
            await asyncio.wait({arriving}, timeout=BODY_SECONDS)
            if not arriving.done():
                raise ApiError(408, f"the request was not complete after {BODY_SECONDS} seconds")
            if arriving.cancelled():
                raise BusyError(f"the requests in memory contain more than {MAX_BYTES:,} bytes")
            arriving.result()
            yield body.content
        finally:
            arriving.cancel()
            del self._bodies[body]
            self._bytes -= len(body.content)

    async def _read(self, body: _Body, request: Request, most: int) -> None:
        try:
            async for part in request.stream():
                body.content += part
                self._bytes += len(part)
                if len(body.content) > most:
                    raise ApiError(413, f"the request contains more than {most:,} bytes", "request_too_large")
                if self._bytes > MAX_BYTES:
                    self._reject_largest()
        except ClientDisconnect:
            raise ApiError(499, "the client has gone") from None

    def _reject_largest(self) -> None:
        of_address: Counter[str] = Counter()
        for body in self._bodies:
            of_address[body.address] += len(body.content)
        arriving = [body for body, task in self._bodies.items() if not task.done()]
        largest = max(arriving, key=lambda body: (of_address[body.address], len(body.content)))
        self._bodies[largest].cancel()
