"""valm app."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from valm.cli.options import Commands, add_opening, command, opening, port
from valm.store.files import name_of


def add_to(commands: Commands) -> None:
    app = command(commands, "app", run_app, "try a model in the browser, on this machine alone")
    app.add_argument("model", type=Path, help="checkpoint folder")
    app.add_argument("--compare", type=Path, metavar="MODEL2", help="another checkpoint, to show beside it")
    app.add_argument("--port", type=port, help="by default the first free one from 7860 on")
    add_opening(app)


def run_app(arguments: argparse.Namespace) -> None:
    from valm.explain.app import App, launch

    name, other = name_of(arguments.model), None
    opened = opening(arguments)
    model, tokenizer = opened.load(arguments.model)
    if arguments.compare:
        other = (name_of(arguments.compare, unlike=[name]), *opened.load_other(arguments.compare))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which removes the uploaded images, as Ctrl-C does
    served = launch(App(name, model, tokenizer, other), arguments.port)
    print(f"app: {served.local_url}  (Ctrl-C ends it)", flush=True)
    served.block_thread()
