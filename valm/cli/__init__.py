"""The `valm` command: one file per subcommand, each a few lines over the library.

The library is imported when a command runs, so that `--help` and wrong options answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys

# Idle OpenMP threads spin by default, and on few cores keep any other process's work, and so each other, from running.
# Sleeping costs some speed where the cores are all ours; set the variable to "active" for that. The runtime reads it
# once, when torch is imported, so it stands before everything else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from valm.cli import demo, encoder, evaluate, generate, kb, retrieve, train
from valm.errors import ValmError


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own). Returns the exit status: 0, or 1 after one sentence
    on stderr that says what was wrong with the input."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValmError, ImportError, OSError) as error:
        print(f"valm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("valm: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="valm", description="A language model that looks at pictures while it reads.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (demo, encoder, kb, retrieve, train, evaluate, generate):
        module.add_to(commands)
    return parser
