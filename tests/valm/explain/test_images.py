from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from valm.evaluation.controls import GivenImages, RandomImages, named_images
from valm.explain.explanation import explain
from valm.explain.images import ShownImage, show_images
from valm.knowledge_base.build import build
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.folder import FolderSource


@pytest.fixture
def ids(tokenizer):
    return tokenizer("a red apple", return_tensors="pt").input_ids


def paint(folder, **colors):
    folder.mkdir()
    for name, color in colors.items():
        Image.new("RGB", (40, 40), color).save(folder / f"{name}.png")
    return folder


def test_random_images_are_those_of_the_seed(model, ids, kb):
    random = RandomImages(model.retriever, 0)
    found = random(ids)
    vectors = torch.from_numpy(kb.gather(found.image_ids.numpy())).float()
    assert torch.equal(found.image_pool, vectors)
    query = model.retriever.encoder(ids)[0, 2]
    own = random.own_scores(ids, found)
    torch.testing.assert_close(own[0, 2, 1], query @ vectors[found.image_index[0, 2, 1]])
    assert torch.equal(own == -torch.inf, found.image_index < 0)
    shown = show_images(random, found.image_ids.tolist())
    assert [image.caption for image in shown] == [kb.item(id).uri for id in found.image_ids.tolist()]


def test_given_images_take_the_place_of_the_knowledge_base(model, ids, tmp_path, clip):
    folder = paint(tmp_path / "greens", light="lightgreen", dark="darkgreen")
    files = [folder / "dark.png", folder / "light.png"]
    images = GivenImages(model.retriever, named_images((file.name, file) for file in files))
    found = images(ids)
    # the model takes 3, there are 2; the first token has none
    assert found.image_index[0].tolist() == [[-1] * 3, *[[0, 1, 0]] * 3]
    expected = clip.encode_images([Image.open(file) for file in files])
    torch.testing.assert_close(found.image_pool, expected)
    torch.testing.assert_close(images.own_scores(ids, found)[0, 2, 1], model.retriever.encoder(ids)[0, 2] @ expected[1])
    shown = show_images(images, found.image_ids.tolist())
    assert [image.caption for image in shown] == ["dark.png", "light.png"]
    assert shown[1].thumbnail.getpixel((20, 20)) == (144, 238, 144)


def test_images_in_place_of_others_are_seen_by_the_same_tokens(make_model, tokenizer, tmp_path):
    """The page shows their own scores, by which none is cut."""
    model = make_model()
    own = explain(model, tokenizer, "a red apple").scores.max(-1)[1:]
    model.set_min_score(float(np.median(own)))
    files = paint(tmp_path / "greens", light="lightgreen").iterdir()
    given = GivenImages(model.retriever, named_images((file.name, file) for file in files))
    for retriever in (None, RandomImages(model.retriever, 0), given):
        page = explain(model, tokenizer, "a red apple", retriever=retriever)
        assert ((page.image_index >= 0).any(-1)[1:] == (own >= np.median(own))).all()
    assert page.scores.max() < own.max()


def test_without_thumbnails_the_caption_is_all(clip, tmp_path, monkeypatch):
    """No file is read by the name that a knowledge base has for it: whoever wrote it may name any."""
    source = FolderSource(paint(tmp_path / "pictures", here="red"))
    kb = build(source, tmp_path / "kb", clip, Encoding(thumbnails=0, workers=0), progress=False)
    monkeypatch.chdir(tmp_path / "pictures")
    assert show_images(SimpleNamespace(kb=kb), [0]) == [ShownImage("here.png", None)]


def test_images_of_an_unknown_retriever_have_their_numbers():
    assert [image.caption for image in show_images(object(), [7, -1])] == ["image 7", "the token's own query"]
