"""valm serve."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from valm.cli.options import Commands, add_opening, command, not_negative, opening, port, positive
from valm.errors import ValmError
from valm.store.files import name_of
from valm.store.parts import control_of

EXAMPLE = "valm serve model --port 8000"


def add_to(commands: Commands) -> None:
    help = "serve a model over HTTP: OpenAI's API, and a page for the browser"
    serve = command(commands, "serve", run_serve, help, EXAMPLE)
    serve.add_argument("model", type=Path, help="folder of the checkpoint, or of `valm pictures`")
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; with any other than this machine's own, everyone who reaches it can use the model",
    )
    serve.add_argument("--port", type=port, default=8000, help="port to listen on; 0 chooses a free port")
    serve.add_argument("--max-tokens", type=positive, default=512, help="largest number of tokens per request")
    serve.add_argument(
        "--max-waiting", type=not_negative, default=64, help="requests that may wait while others are answered"
    )
    serve.add_argument("--max-batch", type=positive, default=8, help="requests answered together")
    serve.add_argument(
        "--compare", type=Path, metavar="MODEL2", help="another checkpoint, to show on the page next to the model"
    )
    serve.add_argument(
        "--page",
        action="store_true",
        help="serve the page, which accepts images, and the search of the knowledge base with another --host too",
    )
    add_opening(serve)


def run_serve(arguments: argparse.Namespace) -> None:
    try:
        from valm.serving.server import serve
    except ModuleNotFoundError as error:
        raise ValmError(f"valm serve needs the package {error.name}: pip install -e '.[serve]'") from error

    opened, name = opening(arguments), name_of(arguments.model)
    model, tokenizer = opened.load(arguments.model)
    other = None
    if compare := arguments.compare or control_of(arguments.model):
        other = (name_of(compare, unlike=[name]), *opened.load_other(compare))
    serve(
        name,
        model,
        tokenizer,
        host=arguments.host,
        port=arguments.port,
        max_tokens=arguments.max_tokens,
        max_waiting=arguments.max_waiting,
        max_batch=arguments.max_batch,
        page=True if arguments.page else None,
        other=other,
    )
    # All requests are answered. The interpreter would still wait for images to be decoded, and Triton 3.9 would print
    # what `gc.freeze` keeps.
    sys.stdout.flush()
    os._exit(0)
