"""The `valm` command: one file per subcommand, each a few lines over the library.

The library is imported when a command runs, so that `--help` and option errors are immediate.
"""

from __future__ import annotations

import ctypes
import io
import os
import sys

# Idle OpenMP threads spin by default, which on few cores slows down other threads and processes. Threads that sleep are
# a bit slower on an idle machine: set the variable to "active" there. The runtime reads it once, when torch is
# imported, so it is set before all other imports.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from valm.cli import (
    clip,
    evaluate,
    explain,
    generate,
    kb,
    lm_eval,
    pictures,
    retrieve,
    serve,
    train,
    verify,
)
from valm.cli.options import CommandParser, program
from valm.errors import PANIC, ValmError, is_out_of_memory, is_panic, sentence
from valm.text import printable, utf8
from valm_kernels import __version__
from valm_kernels.json_files import short

OUT_OF_MEMORY = "there is not enough memory: use smaller batches, or a machine with more memory"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` of `valm`, by default the arguments of the process; returns the exit status."""
    return run_command(build_parser(), argv)


def run_command(parser: CommandParser, argv: list[str] | None = None) -> int:
    """Runs the command that `parser` finds in `argv`, by default the arguments of the process.

    Returns:
        0, or 1 after one sentence on stderr about the wrong input.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error is
    try:
        for argument in sys.argv[1:] if argv is None else argv:
            if argument != utf8(argument):  # as Python holds bytes that are not UTF-8
                raise ValmError(
                    f"the argument {short(argument)} is not UTF-8 text; rename the file, or write the argument in UTF-8"
                )
        arguments = parser.parse_args(argv)
        arguments.command_line = sys.argv[1:] if argv is None else argv
        if arguments.quiet:
            os.environ["TQDM_DISABLE"] = "1"
        keep_freed_memory()
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe, as `| head` does. At exit Python would flush into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValmError, ImportError, OSError) as error:
        print(f"{parser.prog}: error: {printable(sentence(error))}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{parser.prog}: error: {OUT_OF_MEMORY}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"{parser.prog}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except BaseException as error:
        if not is_panic(error):
            raise
        print(f"{parser.prog}: error: {PANIC}: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


# mallopt(3), of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Makes a recent glibc reuse up to 2 GiB of memory that this process frees.

    By default glibc returns the memory of a tensor of some megabytes to the system. The next tensor then causes page
    faults, in every layer of a model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    # an older glibc rejects this M_MMAP_THRESHOLD; M_TRIM_THRESHOLD alone would make it return more memory
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, 2**30):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def build_parser() -> CommandParser:
    parser = program("valm", "Train, evaluate and serve language models that attend to retrieved images.")
    parser.add_argument("--version", action="version", version=f"valm {__version__}")
    parser.add_argument(
        "--allow-download",
        action="store_true",
        help="download what is missing: the CLIP that a knowledge base names, and evaluation sets",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    build = (pictures, clip, kb, retrieve, verify)
    use = (train, evaluate, lm_eval, generate, explain, serve)
    for module in (*build, *use):
        module.add_to(commands)
    return parser
