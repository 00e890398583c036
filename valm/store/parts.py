"""The folder that `valm pictures` makes: a file names its parts, and every command finds its part by that file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.store.files import read_json, writable_folder, write_json
from valm.store.settings import check_same
from valm_kernels.json_files import check_own

PARTS_FILE, STAGES_FILE = "pictures.json", "stages.json"
OTHER = "choose another folder, or repeat the options"
# The parts that commands look for.
MODEL, CONTROL, KB, RETRIEVAL, BASE = "model", "control", "kb", "retrieval", "base"


class Parts(TypedDict):
    """The content of PARTS_FILE. parts: the name of each part's folder. settings: what decides the content."""

    format: Literal["valm pictures"]
    version: Literal[1]
    parts: dict[str, Annotated[str, Field(pattern=r"^[\w-]+$")]]  # no part is outside of the folder
    settings: dict[str, Any]


def read_parts(folder: str | os.PathLike) -> Parts | None:
    """The parts of `folder`; None if it is no folder of `valm pictures`.

    Raises:
        OSError: the file cannot be read, is a link out of the folder or not a regular file.
        ValmError: the file is damaged.
    """
    file = Path(folder) / PARTS_FILE
    if not os.path.lexists(file):
        return None
    check_own(file)
    return read_json(file, "the list of parts", Parts, "run `valm pictures` again in another folder")


def claim_folder(folder: str | os.PathLike, parts: dict[str, str], settings: dict[str, Any]) -> Path:
    """Creates `folder` and its list of parts, or compares the settings with those that its parts were begun with.

    Raises:
        OSError: the folder cannot be written.
        ValmError: it contains something else, or parts of other settings.
    """
    out = writable_folder(folder)
    before = read_parts(out)
    # a converted decoder alone is of no settings: a wrong --clip or --model is found before the first part is begun
    if before is not None and any((out / name).exists() for part, name in before["parts"].items() if part != BASE):
        check_same(f"{out} was begun otherwise", before["settings"], settings, OTHER)
    elif before is None and (held := next(out.iterdir(), None)):
        raise ValmError(f"the output folder {out} is not empty (it contains {held.name}): choose another folder")
    else:
        write_json(out / PARTS_FILE, Parts(format="valm pictures", version=1, parts=parts, settings=settings))
    return out


def part_of(folder: str | os.PathLike, part: str) -> Path:
    """The folder of `part` if `valm pictures` made `folder`, otherwise `folder` itself.

    Raises:
        ValmError: the part is not finished, or as in `read_parts`.
    """
    found = read_parts(folder)
    if found is None:
        return Path(folder)
    finished = read_json(Path(folder) / STAGES_FILE, "the finished stages", dict[str, float]) if _begun(folder) else {}
    if part not in finished or part not in found["parts"]:
        raise ValmError(f"{folder} has no finished {part}: run its `valm pictures` command again, which continues")
    return Path(folder) / found["parts"][part]


def control_of(folder: str | os.PathLike) -> Path | None:
    """The control in `folder` if `valm pictures` made it, otherwise None. Raises what `part_of` raises."""
    return None if read_parts(folder) is None else part_of(folder, CONTROL)


def base_of(folder: str | os.PathLike) -> str | None:
    """Folder or name of the decoder in `folder` without what sees pictures; None if `valm pictures` did not make
    `folder`. Raises what `read_parts` raises."""
    found = read_parts(folder)
    if found is None:
        return None
    own = found["parts"].get(BASE)
    return str(found["settings"].get("--model")) if own is None else str(Path(folder) / own)


def _begun(folder: str | os.PathLike) -> bool:
    return (Path(folder) / STAGES_FILE).is_file()
