"""Drawings in colours that are drawn at random, by which a CLIP learns colours and not which things have them."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

from studies.demo.things import COLORS, pixel_colors

# A shade of each colour, (hue in degrees, saturation, value), well inside of what `pixel_colors` calls so.
SHADES = {
    "white": (0, 0.02, 0.97),
    "yellow": (52, 0.8, 0.95),
    "green": (120, 0.6, 0.65),
    "red": (0, 0.85, 0.85),
    "grey": (0, 0.05, 0.6),
    "brown": (25, 0.6, 0.5),
    "black": (0, 0.1, 0.15),
    "blue": (210, 0.75, 0.85),
    "purple": (280, 0.6, 0.75),
    "pink": (335, 0.38, 0.95),
    "orange": (26, 0.85, 0.95),
}
# Of a pixel's distance from the mean saturation and value of its colour, what stays: shades, but of the same word.
CONTRAST = 0.25
# What a black pixel counts for: black lines surround what is drawn in another colour.
LINES = 0.2


def recolored(drawing: Image.Image, draw: random.Random) -> Image.Image:
    """A drawing (RGBA) with a random one of COLORS, perhaps its own, in place of the colour that most of its pixels
    have. All hues are turned by the same random angle first, so that no other part keeps its own."""
    rgba = np.asarray(drawing.convert("RGBA"))
    turn, target = draw.randrange(256), SHADES[draw.choice(COLORS)]
    solid = rgba[..., 3] > 200
    color = pixel_colors(np.ascontiguousarray(rgba[..., :3]))
    counts = np.bincount(color[solid & (color >= 0)], minlength=len(COLORS)).astype(float)
    counts[COLORS.index("black")] *= LINES
    chosen = color == counts.argmax()
    hsv = np.array(Image.fromarray(np.ascontiguousarray(rgba[..., :3])).convert("HSV"))
    hsv[..., 0] += np.uint8(turn)  # of 256, in a circle
    if (chosen & solid).any():
        for channel, value in ((1, target[1]), (2, target[2])):
            old = hsv[..., channel].astype(np.float32)
            new = 255 * value + CONTRAST * (old - old[chosen & solid].mean())
            hsv[..., channel] = np.where(chosen, new.clip(0, 255), old).astype(np.uint8)
        hsv[..., 0][chosen] = round(target[0] / 360 * 256) % 256
    image = Image.merge("HSV", [Image.fromarray(hsv[..., channel]) for channel in range(3)]).convert("RGBA")
    image.putalpha(Image.fromarray(rgba[..., 3]))
    return image
