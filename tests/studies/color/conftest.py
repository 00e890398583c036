"""Pictures of objects without files: their names and colours."""

import pytest

from studies.color.pictures import Picture

COLORS = ("red", "yellow", "green", "blue")


@pytest.fixture
def pictures():
    """Two pictures of each of forty objects in no test set, ten of each colour, and two of a scene."""
    made = []
    for number in range(40):
        name, color = f"gizmo{chr(97 + number // 26)}{chr(97 + number % 26)}", COLORS[number % 4]
        for view in range(2):
            made.append(Picture(f"drawn/{name}-{view}.png", name, "drawn", name, color, color))
    scene = "A brown dog runs.\nThe tomato is red."
    return [*made, Picture("photos/00000.png", scene, "photos", None, None, None)]
