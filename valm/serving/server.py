"""Serves the app over HTTP until a signal ends it."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from transformers import PreTrainedTokenizerFast
from uvicorn.protocols.http.h11_impl import H11Protocol

from valm.errors import ValmError
from valm.serving.api import Api
from valm.serving.app import build_app
from valm.serving.bodies import BODY_SECONDS
from valm.serving.engine import Engine
from valm.serving.page import Page

LOCAL_HOSTS = ["127.0.0.1", "localhost"]
# Seconds after the first signal in which requests are still answered, and further seconds in which the rest are told
# that the server stops. Docker kills the process after ten.
GRACE, FAREWELL = 6, 1
# Simultaneous connections, and file descriptors reserved for everything else.
MAX_CONNECTIONS, SPARE_FILES = 1000, 24


class _Protocol(H11Protocol):
    """Closes a connection whose request line and headers do not arrive within BODY_SECONDS, and connections beyond
    `most`, which would use up the file descriptors."""

    most = MAX_CONNECTIONS
    _waits: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _wait(self) -> None:
        """Starts to wait for the rest of an incomplete head."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._waits is None and self.timeout_keep_alive_task is None:
            self._waits = self.loop.call_later(BODY_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None


class _Server(uvicorn.Server):
    """After the first signal the server accepts no connections, and has `GRACE` seconds to answer the waiting requests.
    Then, or after the next signal, it tells the rest that it stops."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine
        self.loop: asyncio.AbstractEventLoop | None = None
        self._has_told = False

    async def startup(self, sockets: Any = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self._failed)
        await super().startup(sockets)

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Prints once that no connection can be accepted; asyncio would print it for each connection every second."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif not self._has_told:
            self._has_told = True
            print(f"connections wait: {error.strerror}; allow more open files (ulimit -n)", file=sys.stderr)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._end_after, 0 if self.should_exit else GRACE)
        self.should_exit = True

    def _end_after(self, seconds: int) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, self.engine.end)
        loop.call_later(seconds + FAREWELL, self._hang_up)

    def _hang_up(self) -> None:
        """Closes the connections of clients that neither finish their request nor read their answer."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def most_connections() -> int:
    """The number of connections for which the process has file descriptors."""
    try:
        import resource  # not on Windows
    except ImportError:
        return MAX_CONNECTIONS
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    used = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 64
    return max(1, min(MAX_CONNECTIONS, limit - used - SPARE_FILES))


def serve(
    name: str,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_tokens: int = 512,
    max_waiting: int = 64,
    max_batch: int = 8,
    page: bool | None = None,
    other: tuple[str, Any, Any] | None = None,
) -> None:
    """Serves a model until SIGTERM or Ctrl-C. The thread that uses the model may then still be in its last step.

    Args:
        name: the model's name in requests.
        model, tokenizer: as `valm.load` returns them.
        host: the address to listen on. At 127.0.0.1 and localhost, only requests to these two are answered.
        port: 0 for any free port.
        max_tokens: the most tokens that a request may ask for.
        max_waiting: how many requests may wait.
        max_batch: how many requests are answered together.
        page: whether to serve a page, which accepts uploaded images, and a search of the knowledge base; by default
            only at 127.0.0.1 and localhost.
        other: a second model for the page to compare, as (name, model, tokenizer).

    Raises:
        ValmError: the server cannot listen there; or as in `Engine`.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:  # OverflowError: a port above 65535
        raise ValmError(f"the model cannot be served at {host}, port {port}: {error}; give another --port") from error
    with listening:
        engine = Engine(model, tokenizer, max_waiting, max_batch)
        if engine.max_batch < max_batch:
            print(
                f"one request at a time: the cache of {type(model).__name__} cannot hold texts of several lengths",
                file=sys.stderr,
            )
        gc.freeze()  # a garbage collection that walks through all libraries delays every answer by 0.2 seconds
        local = host in LOCAL_HOSTS
        api = Api(name, engine, max_tokens)
        shows_page = local if page is None else page
        app = build_app(api, LOCAL_HOSTS if local else ["*"], Page(api, other) if shows_page else None)
        protocol = type("Protocol", (_Protocol,), {"most": most_connections()})
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            log_level="warning",
            timeout_graceful_shutdown=GRACE + FAREWELL + 1,
            server_header=False,
        )
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        print(f"serving {name} at {address}/v1  (Ctrl-C ends it)", flush=True)
        if shows_page:
            print(f"page: {address}/", flush=True)
        _Server(config, engine).run(sockets=[listening])
    print("stopped", file=sys.stderr)
