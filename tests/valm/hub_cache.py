"""A model folder as the Hugging Face cache has it."""

from pathlib import Path


def as_in_the_hub_cache(folder: Path, cache: Path) -> Path:
    """The snapshot of `folder` in `cache`, whose files are moved to blobs/ and linked from there."""
    snapshot, blobs = cache / "snapshots" / "main", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot
