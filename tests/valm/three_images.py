"""A knowledge base of three single-colour images, and its CLIP."""

from pathlib import Path

from PIL import Image

from valm.clip.clip import Clip
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.folder import FolderSource
from valm.retrieval.retriever import Retriever
from valm.retrieval.source import open_encoder


def retriever_in(folder: Path, clip: Clip) -> Retriever:
    """Writes `clip`, `images` and `kb` into `folder`; the retriever finds two images per token.

    It is opened as `load` opens a retriever.
    """
    clip.save(folder / "clip")
    (folder / "images").mkdir()
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (32, 32), colour).save(folder / "images" / f"{name}.png")
    kb = build(FolderSource(folder / "images"), folder / "kb", Clip.load(folder / "clip"), progress=False)
    return Retriever(open_encoder(kb, query="state"), kb, 2)
