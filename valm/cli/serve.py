"""valm serve."""

from __future__ import annotations

import argparse
from pathlib import Path

from valm.cli.options import (
    Commands,
    add_clip,
    add_device,
    add_query_dtype,
    add_ray,
    chosen_device,
    chosen_query_dtype,
    command,
)


def add_to(commands: Commands) -> None:
    serve = command(
        commands,
        "serve",
        run_serve,
        "hold a knowledge base with its CLIP and index for the other commands of this machine, which name it --kb "
        "ray:NAME",
    )
    serve.add_argument("kb", type=Path, help="knowledge base")
    serve.add_argument("--name", help="of the server (default: that of the folder)")
    add_clip(serve)
    add_query_dtype(serve)
    add_device(serve, "the text is encoded and the images are searched")
    add_ray(serve)
    serve.set_defaults(ray="local")


def run_serve(arguments: argparse.Namespace) -> None:
    import torch

    from valm.retrieval.ray_server import PREFIX, RetrievalServer

    name = arguments.name or arguments.kb.absolute().name
    server = RetrievalServer.start(
        arguments.kb,
        name,
        arguments.ray,
        clip=arguments.clip,
        allow_download=arguments.allow_download,
        device=chosen_device(arguments),
        dtype=chosen_query_dtype(arguments) or torch.float32,
        cpus=arguments.cpus,
        gpus=arguments.gpus,
    )
    print(f"{server.about.path} is served: give other commands --kb {PREFIX}{name}  (Ctrl-C ends it)", flush=True)
    server.wait()
