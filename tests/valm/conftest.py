import signal

import numpy as np
import pytest
from PIL import Image

from tests.valm.tiny_clip import TEXTS, make_clip
from valm.clip.clip import Clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.folder import FolderSource


@pytest.fixture(scope="session")
def tokenizer():
    return prune_tokenizer(clip_tokenizer(), TEXTS)


SHARED: list[Clip] = []


@pytest.fixture(scope="session")
def clip(tokenizer) -> Clip:
    SHARED.append(make_clip(tokenizer))
    return SHARED[0]


@pytest.fixture(scope="module", autouse=True)
def clip_forgets_where_a_module_saved_it():
    """Makes the manifests of knowledge bases independent of the order of the tests."""
    yield
    for clip in SHARED:
        clip.source = None


@pytest.fixture(autouse=True)
def clip_forgets_where_a_test_saved_it():
    before = SHARED[0].source if SHARED else None
    yield
    if SHARED:
        SHARED[0].source = before


@pytest.fixture(scope="session")
def make_kb(clip, tmp_path_factory):
    """Knowledge bases of single-colour pictures, whose vectors differ clearly."""

    def make(count):
        folder = tmp_path_factory.mktemp("colours")
        generator = np.random.default_rng(0)
        for index in range(count):
            colour = tuple(generator.integers(0, 256, 3).tolist())
            Image.new("RGB", (32, 32), colour).save(folder / f"{index:04d}.png")
        out = tmp_path_factory.mktemp("kb")
        return build(FolderSource(folder, shard_size=max(1, count // 2)), out, clip, progress=False)

    return make


@pytest.fixture
def in_front():
    """A job in the background ignores Ctrl-C, and so may its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
