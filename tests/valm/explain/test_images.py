import copy

import pytest
import torch
from PIL import Image

from valm.errors import ValmError
from valm.evaluation import controls
from valm.explain.images import GivenImages, ShownImage, ShownRandomImages, show_images
from valm.knowledge_base.build import build
from valm.knowledge_base.encode import Encoding
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
    first, again, other = (ShownRandomImages(model.retriever, seed, scored=False)(ids) for seed in (0, 0, 1))
    assert torch.equal(first.image_ids, again.image_ids) and not torch.equal(first.image_ids, other.image_ids)
    vectors = torch.from_numpy(kb.gather(first.image_ids.numpy())).float()
    assert torch.equal(first.image_pool, vectors)
    query = model.retriever.encoder(ids)[0, 2]
    torch.testing.assert_close(first.scores[0, 2, 1], query @ vectors[first.image_index[0, 2, 1]])
    shown = show_images(ShownRandomImages(model.retriever, 0, scored=False), first.image_ids.tolist())
    assert [image.caption for image in shown] == [kb.item(id).uri for id in first.image_ids.tolist()]


def test_given_images_take_the_place_of_the_knowledge_base(model, ids, tmp_path, clip):
    folder = paint(tmp_path / "greens", light="lightgreen", dark="darkgreen")
    files = [folder / "dark.png", folder / "light.png"]
    images = GivenImages(files, model.retriever, scored=False)
    found = images(ids)
    # the model takes 3, there are 2; the first token has none
    assert found.image_index[0].tolist() == [[-1] * 3, *[[0, 1, 0]] * 3]
    expected = clip.encode_images([Image.open(file) for file in files])
    torch.testing.assert_close(found.image_pool, expected)
    torch.testing.assert_close(found.scores[0, 2, 1], model.retriever.encoder(ids)[0, 2] @ expected[1])
    shown = show_images(images, found.image_ids.tolist())
    assert [image.caption for image in shown] == ["dark.png", "light.png"]
    assert shown[1].thumbnail.getpixel((20, 20)) == (144, 238, 144)


def test_a_model_that_uses_scores_gets_those_of_the_control(model, ids, tmp_path):
    """As in `valm eval`."""
    files = [*paint(tmp_path / "greens", light="lightgreen").iterdir()]
    retriever = model.retriever
    vectors = retriever.encoder.clip.encode_images([Image.open(files[0])])
    for shown, control in (
        (ShownRandomImages(retriever, 0, scored=True), controls.RandomImages(retriever, 0)),
        (GivenImages(files, retriever, scored=True), controls.FixedImages(retriever, vectors)),
    ):
        found, expected = shown(ids), control(ids)
        for name in ("image_pool", "image_index", "scores"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_images_in_place_of_others_are_not_cut_by_their_own_scores(model, ids):
    best = model.retriever(ids).scores.amax(-1)[0, 1:]
    cut = copy.deepcopy(model)
    cut.set_min_score(float(best.median()))
    for retriever in (cut.retriever, ShownRandomImages(cut.retriever, 0, scored=False)):
        cut.set_retriever(retriever)
        assert (cut.finder.find_images(ids, None, None, None)[1] >= 0).any(-1).sum() == (best >= best.median()).sum()


def test_only_the_first_k_are_read(model, ids, tmp_path):
    folder = paint(tmp_path / "four", a="red", b="green", c="blue")
    (folder / "d.png").write_bytes(b"no picture")
    files = sorted(folder.iterdir())
    assert GivenImages(files, model.retriever, scored=False)(ids).image_ids.tolist() == [0, 1, 2]
    with pytest.raises(ValmError, match=r"cannot read the image d.png: not a picture"):
        GivenImages(files[1:], model.retriever, scored=False)


def test_without_thumbnails_the_caption_is_all(clip, tmp_path, monkeypatch):
    """No file is read by the name that a knowledge base has for it: whoever wrote it may name any."""
    paint(tmp_path / "pictures", here="red")
    kb = build(
        FolderSource(tmp_path / "pictures"), tmp_path / "kb", clip, Encoding(thumbnails=0, workers=0), progress=False
    )
    monkeypatch.chdir(tmp_path / "pictures")

    class OfKb:
        pass

    retriever = OfKb()
    retriever.kb = kb
    assert show_images(retriever, [0]) == [ShownImage("here.png", None)]


def test_images_of_an_unknown_retriever_have_their_numbers():
    assert [image.caption for image in show_images(object(), [7, -1])] == ["image 7", "the token's own query"]
