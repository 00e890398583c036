"""`valm kb add` of one image, to a knowledge base of one image, of some, and with `--full` of a million.

The vectors are random. If the large knowledge base is missing, it is made in the folder `--scratch` (0.6 GB).
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.sizes import sized
from benchmarks.valm.inputs import PICTURES, clip, knowledge_base_of
from valm.cli import main
from valm.knowledge_base.store import ImageKnowledgeBase

TOWER = "half of ViT-B/32"
SHARD = 16_384  # images, as in `valm kb build`

pytestmark = pytest.mark.timeout(1800)


def random_knowledge_base(out: Path, images: int) -> ImageKnowledgeBase:
    if (out / "manifest.json").exists():
        return ImageKnowledgeBase.open(out)

    def shards() -> Iterator[np.ndarray]:
        for number, start in enumerate(range(0, images, SHARD)):
            rows = min(SHARD, images - start)
            yield np.random.default_rng(number).standard_normal((rows, clip(TOWER).embed_dim), np.float32)

    return knowledge_base_of(shards(), out, clip(TOWER), {"random": images})


@pytest.mark.parametrize("images", [1, sized(20_000, 200), pytest.param(PICTURES, marks=pytest.mark.full)])
def bench_add(measure, pytestconfig, request, tmp_path, images):
    kb = random_knowledge_base(pytestconfig.getoption("--scratch") / f"random-{images}", images)
    clip(TOWER).save(tmp_path / "clip")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (224, 224), "orange").save(tmp_path / "more" / "orange.png")
    numbers = count()
    beside = tempfile.mkdtemp(dir=kb.path.parent)  # links need the same file system
    request.addfinalizer(lambda: shutil.rmtree(beside))

    def add() -> ImageKnowledgeBase:
        out = Path(beside, str(next(numbers)))
        arguments = ["kb", "add", kb.path, tmp_path / "more", "--clip", tmp_path / "clip", "--out", out]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(list(map(str, arguments))) == 0
        return ImageKnowledgeBase.open(out)

    def check(joined: ImageKnowledgeBase) -> None:
        assert len(joined) == images + 1 and joined.item(images).uri == "orange.png"
        assert joined.verify(progress=False) == []
        assert np.array_equal(joined.gather(np.arange(images)[-5:]), kb.gather(np.arange(images)[-5:]))

    measure(
        group="valm kb add of one image",
        name=f"to {images:,} vectors of {kb.dim}",
        function=add,
        check=check,
    )
