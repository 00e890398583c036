"""A model folder in the layout of the Hugging Face cache."""

from pathlib import Path


def as_in_the_hub_cache(folder: Path, cache: Path) -> Path:
    """Moves the files of `folder` to blobs/ in `cache`, and returns a snapshot with links to them."""
    snapshot, blobs = cache / "snapshots" / "main", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot
