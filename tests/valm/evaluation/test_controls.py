"""The controls exchange the images and nothing else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.valm.models import model_for, random_ids, tiny_model
from valm.errors import ValmError
from valm.evaluation.controls import (
    GivenImages,
    RandomImages,
    Replaced,
    images_fingerprint,
    named_images,
    switch_images,
)
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever, Retrieved, Retriever


class FakeBase:
    def __len__(self) -> int:
        return 10

    def gather(self, ids) -> np.ndarray:
        return np.arange(40, dtype=np.float16).reshape(10, 4)[ids]


class FakeRetriever:
    k, dim, kb = 2, 4, FakeBase()

    def __call__(self, input_ids, attention_mask=None) -> Retrieved:
        pool = torch.zeros(2, 4)
        return Retrieved(pool, torch.tensor([[[0, 1]]]), torch.tensor([3, 7]), torch.zeros(1, 1, 2))

    def start(self, batch):
        return [batch]

    def step(self, input_ids, state, attention_mask=None) -> Retrieved:
        state.append(input_ids)
        return self(input_ids, attention_mask)


def test_replaced_finds_the_same_and_returns_other_vectors():
    vectors = torch.randn(10, 4)
    replaced = Replaced(FakeRetriever(), vectors)
    plain, other = FakeRetriever()(torch.zeros(1, 1)), replaced(torch.zeros(1, 1))
    assert (replaced.k, replaced.dim) == (2, 4)
    assert torch.equal(other.image_pool, vectors[[3, 7]])
    assert torch.equal(other.image_index, plain.image_index) and torch.equal(other.image_ids, plain.image_ids)
    state, ids = replaced.start(1), torch.zeros(1, 1)
    assert torch.equal(replaced.step(ids, state).image_pool, other.image_pool)
    assert state == [1, ids]  # the retriever's own state, and it moved on


def test_random_images_are_a_permutation_by_seed():
    class FindsAll(FakeRetriever):
        def __call__(self, input_ids, attention_mask=None) -> Retrieved:
            return super().__call__(input_ids)._replace(image_ids=torch.arange(10))

    first, again, other = (RandomImages(FindsAll(), seed)(torch.zeros(1, 1)) for seed in (0, 0, 1))
    assert torch.equal(first.image_ids, again.image_ids) and not torch.equal(first.image_ids, other.image_ids)
    assert first.image_ids.sort().values.tolist() == list(range(10))
    assert torch.equal(first.image_pool, torch.arange(40.0).reshape(10, 4)[first.image_ids])


def test_given_images_are_the_same_for_every_token_that_has_some(tmp_path):
    class Encodes:
        def encode_images(self, images):
            return torch.randn(len(images), 4)

    class FindsSome(FakeRetriever):
        k, encoder = 3, SimpleNamespace(clip=Encodes())

        def __call__(self, input_ids, attention_mask=None) -> Retrieved:
            index = torch.tensor([[[-1, -1, -1], [0, -1, -1], [0, 0, 0]]])
            return Retrieved(torch.zeros(1, 4), index, torch.tensor([5]), torch.zeros(1, 3, 3))

    files = [tmp_path / f"{name}.png" for name in "abcde"]
    for file in files:
        Image.new("RGB", (8, 8)).save(file)

    def named(files):
        return named_images((file.name, file) for file in files)

    given = GivenImages(FindsSome(), named(files[:2]))
    found = given(torch.zeros(1, 3))
    assert [name for name, _ in given.images] == ["a.png", "b.png"] and found.image_ids.tolist() == [0, 1]
    assert found.image_pool.shape == (2, 4)
    assert found.image_index.tolist() == [[[-1, -1, -1], [0, 1, 0], [0, 1, 0]]]
    assert torch.equal(found.scores == -torch.inf, found.image_index < 0)
    assert len(GivenImages(FindsSome(), named(files))(torch.zeros(1, 3)).image_pool) == 3
    files[4].write_bytes(b"no image")
    with pytest.raises(ValmError, match=r"cannot read the image e\.png"):
        named(files[2:])


@pytest.fixture
def seeing(clip, make_kb):
    """A model with a retriever, and ids that it reads."""
    retriever = Retriever(ContextEncoder(clip), make_kb(8), 3)
    model = model_for(retriever)
    model.set_retriever(retriever)
    return model, random_ids(2, 6)


def test_switched_off_the_model_reads_the_text_alone(seeing, clip):
    model, ids = seeing
    index = torch.full((2, 6, 3), -1)
    alone = model(ids, image_pool=torch.empty(0, clip.embed_dim), image_index=index).logits
    assert not torch.allclose(model(ids).logits, alone)
    switch_images(model, "off")
    torch.testing.assert_close(model(ids).logits, alone)
    generated = model.generate(ids, max_new_tokens=2, num_beams=2)
    assert generated.shape == (2, 8)


def test_random_and_replaced_images_change_what_a_model_says(seeing, tmp_path):
    model, ids = seeing
    own = model.retriever
    plain = model(ids).logits
    switch_images(model, "random")
    assert not torch.allclose(model(ids).logits, plain)
    model.set_retriever(own)
    Image.new("RGB", (32, 32), "green").save(tmp_path / "green.png")
    switch_images(model, replace=tmp_path)
    pool = own.encoder.clip.encode_images([Image.open(tmp_path / "green.png")])
    index = torch.zeros(2, 6, 3, dtype=torch.int64).index_fill(1, torch.tensor([0]), -1)
    expected = model(ids, image_pool=pool, image_index=index).logits
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_blind_model_can_be_switched_off_only(clip):
    retriever = BlindRetriever(ContextEncoder(clip))
    model = model_for(retriever, blind=True)
    model.set_retriever(retriever)
    ids = random_ids(1, 5)
    plain = model(ids).logits
    with pytest.raises(ValmError, match="a blind model has no knowledge base"):
        switch_images(model, "random")
    switch_images(model, "off")
    assert not torch.allclose(model(ids).logits, plain)


def test_an_image_that_no_token_sees_may_be_damaged(tmp_path):
    Image.new("RGB", (32, 32), "green").save(tmp_path / "a.png")
    one = images_fingerprint(tmp_path)
    (tmp_path / "z.png").symlink_to(tmp_path / "nowhere.png")
    assert images_fingerprint(tmp_path) != one
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (tmp_path / "z.png").unlink()
    assert images_fingerprint(tmp_path) != one


def test_wrong_switches_are_named(tmp_path):
    seeing, text_only = tiny_model(), tiny_model(num_images=0)
    for model, retrieval, replace, message in [
        (seeing, "none", None, "must be one of on, off, random, got 'none'"),
        (seeing, "off", tmp_path, "exclude each other"),
        (text_only, "random", None, "sees no images"),
        (seeing, "on", None, r"has no retriever: give a knowledge base as kb \(--kb\)$"),
    ]:
        with pytest.raises(ValmError, match=message):
            switch_images(model, retrieval, replace=replace)
