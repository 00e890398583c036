"""Pictures in other colours, with captions that name these colours, for training the CLIP of a study.

The layer that sees images reads their vectors linearly. A CLIP that sees one object in several colours, each named,
puts the colour where a linear layer finds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from studies.color.pictures import DRAWINGS, Picture
from studies.color.text import COLOR_CAPTION_TEMPLATES, article
from studies.demo.things import label_color
from valm.progress import progress_bar
from valm.store.files import read_json, write_json

RECOLORED_FILE = "recolored.json"
# The exchanges of an image's channels.
PERMUTATIONS = [order for order in itertools.permutations(range(3)) if order != (0, 1, 2)]
# {x} is the object, {c} its new colour, {a} the article of the colour. Every caption names the colour: captions of the
# object alone would teach that its colour does not matter.
TEMPLATES = (*COLOR_CAPTION_TEMPLATES, "a picture of {a} {c} {x}", "something {c}", "here is the {c} {x}")


@dataclass(frozen=True)
class Recolored:
    """A picture of an object in another colour. file: path below the folder of the pictures."""

    file: str
    thing: str
    color: str


def write_recolored(
    sources: Mapping[str, Mapping[str, Any]], pictures: Sequence[Picture], out: Path, *, progress: bool = True
) -> None:
    """Writes recoloured pictures below `out`, and RECOLORED_FILE at the end.

    Each picture of a drawing with a colour is written once in each other colour that PERMUTATIONS give it.

    Args:
        sources: as in `collect_pictures`, which wrote `pictures` into `out`. Pictures of folders are not recoloured.
    """
    colors = {}
    for source in sources.keys() & DRAWINGS.keys():
        for thing in DRAWINGS[source](sources[source].get("limit"), progress):
            colors[source, thing.name] = [label_color(exchanged(thing.drawing, order)) for order in PERMUTATIONS]
    written = []
    for picture in progress_bar(pictures, desc="recolour", unit="picture", shown=progress, leave=False):
        if picture.color is None or picture.thing is None or (picture.source, picture.thing) not in colors:
            continue
        found = {picture.color}
        with Image.open(out / picture.file) as opened:
            image = opened.convert("RGB")
        for number, color in enumerate(colors[picture.source, picture.thing]):
            if color is not None and color not in found:
                found.add(color)
                file = f"{picture.file.removesuffix('.png')}-recolored-{number}.png"
                exchanged(image, PERMUTATIONS[number]).save(out / file, compress_level=1)
                written.append(Recolored(file, picture.thing, color))
    write_json(out / RECOLORED_FILE, [asdict(one) for one in written])


def exchanged(image: Image.Image, order: Sequence[int]) -> Image.Image:
    """An RGB or RGBA image whose colour channels are in another order."""
    channels = image.split()
    return Image.merge(image.mode, (*(channels[number] for number in order), *channels[3:]))


def recolored_captions(folder: Path, spoken: Mapping[str, str]) -> dict[str, list[str]]:
    """The captions of the recoloured pictures in `folder` that show an object in `spoken`."""
    rows = read_json(folder / RECOLORED_FILE, "the recoloured pictures", list[Recolored])
    found = [Recolored(**row) for row in rows]
    return {
        one.file: [template.format(x=one.thing, c=one.color, a=article(one.color)) for template in TEMPLATES]
        for one in found
        if one.thing in spoken
    }
