"""Serves the app over HTTP until a signal ends it."""

from __future__ import annotations

import asyncio
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from transformers import PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.serving.app import Api, build_app
from valm.serving.engine import Engine

LOCAL_HOSTS = ["127.0.0.1", "localhost"]
# Seconds after the first signal in which requests are still answered. Docker kills ten seconds after it.
GRACE = 8


class _Server(uvicorn.Server):
    """On the first signal no more connections are accepted, and those waiting for an answer have `GRACE` seconds to
    get it. Then, or on the next signal, they are told that the server stops."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.loop.call_later, 0 if self.should_exit else GRACE, self.engine.end)
        self.should_exit = True


def serve(
    name: str,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_tokens: int = 512,
    max_waiting: int = 64,
) -> None:
    """Serves a model until SIGTERM or Ctrl-C.

    Args:
        name: the model's name in requests.
        model, tokenizer: as `valm.load` returns them.
        host: the address to listen on. At 127.0.0.1 and localhost only requests to these two are answered.
        port: 0 for any free one.
        max_tokens: the most that a request may ask for.
        max_waiting: requests that may wait for the one that is being answered.

    Raises:
        ValmError: it cannot listen there.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:  # the latter of a port above 65535
        raise ValmError(f"the model cannot be served at {host}, port {port}: {error}; give another --port") from error
    with listening:
        engine = Engine(model, tokenizer, max_waiting)
        hosts = LOCAL_HOSTS if host in LOCAL_HOSTS else ["*"]
        app = build_app(Api(name, engine, max_tokens), hosts)
        config = uvicorn.Config(
            app, http="h11", ws="none", log_level="warning", timeout_graceful_shutdown=GRACE + 2, server_header=False
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {name} at http://{shown}:{listening.getsockname()[1]}/v1  (Ctrl-C ends it)", flush=True)
        _Server(config, engine).run(sockets=[listening])
    print("stopped", file=sys.stderr)
