import json
from contextlib import nullcontext
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from tests.tolerance import assert_agree
from tests.valm.knowledge_base.inputs import png
from tests.valm.tiny_clip import TINY
from valm.clip.clip import Clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.errors import ValmError
from valm.knowledge_base.records import Record
from valm.knowledge_base.sources.dataset import DatasetSource
from valm.knowledge_base.sources.embeddings import EmbeddingSource
from valm.knowledge_base.sources.folder import FolderSource
from valm.training import clip as clip_training
from valm.training.clip import CachedImages, CaptionedImages, captioned, new_clip, shrunk, train_clip

COLORS = ["red", "lime", "blue", "yellow", "black", "white", "cyan", "magenta"]
TOKENIZER = prune_tokenizer(clip_tokenizer(), [f"a photo of {color} paint" for color in COLORS])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.json"
    file.write_text(json.dumps({"model_cfg": TINY}))
    return file


@pytest.fixture
def new(config):
    """A CLIP that has not been trained."""
    return new_clip(config, None, TOKENIZER)


def records():
    """A picture of one colour each, with two captions."""
    return [
        Record(color, f"{color} paint on a wall\na photo of {color}", Image.new("RGB", (40, 40), color))
        for color in COLORS
    ]


def trained(config, tower=None, steps=60, **options):
    torch.manual_seed(0)
    clip = new_clip(config, tower, TOKENIZER)
    images = CaptionedImages(records(), clip, seed=0)
    return clip, train_clip(clip, images.batches(8), steps=steps, lr=3e-3, progress=None, **options)


def test_it_learns_captions_and_their_beginnings(config):
    clip, losses = trained(config, steps=80)
    assert len(losses) == 80 and np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    images = clip.encode_images([record.source for record in records()])
    for texts in ([f"a photo of {color}" for color in COLORS], COLORS):  # the latter a prefix of the other caption
        assert (clip.encode_texts(texts) @ images.T).argmax(1).tolist() == list(range(8))
    assert not clip.model.training and not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_a_clip_that_trains_again_has_another_hash(config):
    clip, _ = trained(config, steps=1)
    before = clip.weights_hash
    clip.model.requires_grad_(True)
    images = CaptionedImages(records(), clip, seed=0)
    train_clip(clip, images.batches(8), steps=1, lr=3e-3, progress=None)
    assert clip.weights_hash != before


def test_a_seed_gives_the_same_weights_whatever_decodes(config, new):
    first, again = (trained(config, steps=3)[0].weights_hash for _ in range(2))
    assert first == again
    images = CaptionedImages(records(), new, seed=5)
    here, there = (list(islice(images.batches(3, workers=workers), 6)) for workers in (0, 2))
    for (pixels, texts), (others, other_texts) in zip(here, there, strict=True):
        assert torch.equal(pixels, others) and texts == other_texts
    assert next(CaptionedImages(records(), new, seed=6).batches(3))[1] != here[0][1]


def test_a_frozen_image_tower_stays_as_it_is(config):
    tower = trained(config, steps=5)[0]
    before = {name: value.clone() for name, value in tower.model.visual.state_dict().items()}
    clip, losses = trained(None, tower, steps=20)
    for name, value in clip.model.visual.state_dict().items():
        assert torch.equal(value, before[name])
    assert losses[-1] < losses[0]
    assert clip.preprocess_cfg() == tower.preprocess_cfg()
    assert not torch.equal(clip.model.token_embedding.weight, tower.model.token_embedding.weight)


def test_every_image_comes_once_with_a_whole_or_cut_caption(new):
    for prefixes in (0.0, 1.0):
        images = CaptionedImages(records(), new, seed=1, prefixes=prefixes)
        batches = list(islice(images.batches(3), 200))
        assert all(pixels.shape == (3, 3, 32, 32) for pixels, _ in batches)
        # two batches of three are an epoch of eight
        for start in range(0, 200, 2):
            colors = [color for _, texts in batches[start : start + 2] for color in map(color_of, texts) if color]
            assert len(set(colors)) == len(colors)
        texts = {text for _, batch in batches for text in batch}
        whole = {caption for record in records() for caption in record.caption.split("\n")}
        cut = {" ".join(caption.split()[:n]) for caption in whole for n in range(1, len(caption.split()) + 1)}
        assert texts == (cut if prefixes else whole)


def color_of(text):
    return next((color for color in COLORS if color in text.split()), None)


def test_the_temperature_stops(config):
    clip, _ = trained(config, steps=10, max_logit_scale=14.0)
    assert clip.model.logit_scale.exp() <= 14.001


def test_a_loss_that_is_not_finite_stops(new):
    broken = [(torch.full((2, 3, 32, 32), torch.nan), ["red", "blue"])]
    with pytest.raises(ValmError, match=r"the loss is nan at step 1: .*a lower learning rate"):
        train_clip(new, broken, steps=1, lr=1e-3, progress=None)


def test_a_batch_is_contrasted_whole_beside_several_gpus(config, monkeypatch):
    """DataParallel would contrast each GPU's part of it."""
    expected = trained(config, steps=2)[1]
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: 1 if arguments._n_gpu == 1 else 2))
    made: list[object] = []
    monkeypatch.setattr(torch.nn.DataParallel, "__init__", lambda parallel, *_: made.append(parallel))
    assert trained(config, steps=2)[1] == expected and not made


def test_another_gpu_than_the_first_is_refused(new, monkeypatch):
    monkeypatch.setattr(Clip, "device", torch.device("cuda:1"))
    with pytest.raises(ValmError, match=r"on the first GPU, got cuda:1: choose a GPU with CUDA_VISIBLE_DEVICES"):
        train_clip(new, [], steps=1, lr=1e-3, progress=None)


def test_the_random_numbers_of_others_stay(new):
    """So a model's own dropout goes on with those that its seed began."""
    images = CaptionedImages(records(), new, seed=0)
    state = torch.get_rng_state()
    train_clip(new, images.batches(4), steps=1, lr=1e-3, progress=None)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("steps", [1, 39, 40, 300])
def test_a_kill_costs_a_twentieth_of_the_steps_at_most(new, tmp_path, steps):
    assert clip_training._arguments(tmp_path, new, steps, 1e-3, save=True).save_steps <= max(1, steps / 20)


def test_skipped_batches_leave_the_others_as_they_are(new):
    images = CaptionedImages(records(), new, seed=1)
    whole = list(islice(images.batches(3), 9))
    for (pixels, texts), (others, other_texts) in zip(whole[5:], islice(images.batches(3, skip=5), 4), strict=True):
        assert torch.equal(pixels, others) and texts == other_texts


def test_images_are_decoded_and_shrunk_once(new, tmp_path, monkeypatch):
    """To 48 pixels, as its views have 32."""
    sizes = {"wide": (300, 100), "tall": (50, 200), "small": (20, 30)}
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    files = [Record(name, "red", tmp_path / f"{name}.png") for name in sizes]
    for workers in (0, 2):
        found = shrunk(files, new, workers=workers, progress=None)
        assert [record.read().size for record in found] == [(144, 48), (48, 192), (20, 30)]
    for file in tmp_path.iterdir():
        file.unlink()
    pixels, texts = next(CaptionedImages(found, new, seed=0).batches(3))
    assert pixels.shape == (3, 3, 32, 32) and texts == ["red"] * 3
    monkeypatch.setattr(clip_training, "SHRUNK_BYTES", 3 * 48 * 48 * 5)
    assert shrunk(files, new, progress=None) is files


def test_images_that_cannot_be_read_are_left_out(new, monkeypatch, caplog):
    damaged = Record("broken", "red", b"no picture")
    assert len(shrunk([damaged, *records()], new, progress=None)) == len(records())
    assert "1 of 9 images cannot be read and are skipped, such as broken (not a picture" in caplog.text
    with pytest.raises(ValmError, match="hardly any image of the source can be read"):
        shrunk([damaged] * 3, new, progress=None)
    monkeypatch.setattr(Record, "read", lambda record: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ValmError, match=r"cannot read secret: .*Permission denied"):
        shrunk([Record("secret", "red", b"")], new, progress=None)


def test_a_batch_of_damaged_images_ends_the_training(new):
    """Passed over, it would not be among the batches that a resumed training skips."""
    damaged = [Record(f"{number}", "red", b"no picture") for number in range(9)]
    images = CaptionedImages([*records(), damaged[0]], new, seed=0)
    assert [len(pixels) for pixels, _ in islice(images.batches(9), 3)] == [8, 8, 8]
    with pytest.raises(ValmError, match="batches of two images or more, got 1"):
        next(images.batches(1))
    with pytest.raises(ValmError, match=r"fewer of a batch of 2 can be read: .* larger batch size \(--batch-size\)"):
        list(islice(images.batches(2), 9))  # the eight pictures and the damaged one


def test_wrong_models_are_named(clip, tmp_path):
    with pytest.raises(ValmError, match="give a model, an image tower, or both"):
        new_clip(None)
    with pytest.raises(ValmError, match="there is no CLIP architecture ViT-Z: give small"):
        new_clip("ViT-Z")
    vision = TINY["vision_cfg"]
    function = r"the image tower of tiny differs from .*x\.json in its heads"
    for content, tower, message in (
        ({"embed_dim": 8, "text_cfg": {}, "vision_cfg": {"colour": 1}}, None, r"open_clip cannot make .*x\.json: "),
        ({"model_cfg": TINY, "preprocess_cfg": {"image_mean": [0, 0, 0]}}, None, "argument 'image_mean'"),
        (TINY | {"vision_cfg": vision | {"width": 64}}, clip, r"of tiny does not fit .*x\.json: size mismatch"),
        # of equal weights, but another function
        (TINY | {"vision_cfg": vision | {"head_width": vision["width"]}}, clip, function),
        (TINY | {"vision_cfg": vision | {"pool_type": "avg"}}, clip, function),
    ):
        (tmp_path / "x.json").write_text(json.dumps(content))
        with pytest.raises(ValmError, match=message):
            new_clip(tmp_path / "x.json", tower)


def test_sources_without_captioned_images_are_named(tmp_path):
    with pytest.raises(ValmError, match="the source contains 1 images with captions"):
        captioned(DatasetSource([{"image": png(0), "caption": "one"}, {"image": png(1), "caption": " "}]))
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", np.zeros((2, 4), np.float16))
    (tmp_path / "metadata" / "metadata_0.parquet").write_bytes(b"")
    with pytest.raises(ValmError, match="embeddings contain no images"):
        captioned(EmbeddingSource(tmp_path))


def test_what_is_left_out_is_said(tmp_path, caplog):
    rows = [{"image": png(number), "caption": "one"} for number in range(2)]
    rows += [{"image": None, "caption": "two"}, {"image": png(2), "caption": None}]
    assert len(captioned(DatasetSource(rows))) == 2
    assert caplog.messages == [
        "1 images or captions of the source could not be read and are skipped, such as 2 (there is no picture)",
        "1 of 3 images have no caption and are skipped",
    ]
    caplog.clear()
    for name, caption in (("a", "one"), ("b", "two"), ("c", "")):
        (tmp_path / f"{name}.png").write_bytes(png(0))
        (tmp_path / f"{name}.txt").write_text(caption)
    (tmp_path / "c.json").write_text("cut")
    source = FolderSource(tmp_path)
    assert len(captioned(source)) == 2
    (message,) = caplog.messages  # how many have no caption is among the folder's remarks
    assert "1 images or captions" in message and "such as c.json (a caption file that is not JSON" in message
    assert source.remarks == ["1 of 3 images have no caption"]


def test_cached_images_train_as_images_without_views_do(config, caplog):
    tower = new_clip(config, None, TOKENIZER)
    damaged = Record("damaged", "no picture", b"none")
    losses = []
    for cache in (False, True):
        torch.manual_seed(0)
        clip = new_clip(None, tower, TOKENIZER)
        images = CachedImages([*records(), damaged], clip, 0) if cache else CaptionedImages(records(), clip, 0)
        images.transform = clip.transform
        with images.cached() if cache else nullcontext():
            losses.append(train_clip(clip, images.batches(4), steps=8, lr=1e-3, progress=None))
        assert torch.equal(clip.model.visual.proj, tower.model.visual.proj)
    assert caplog.messages == ["1 of 9 images cannot be read and are skipped, such as damaged"]
    assert len(images) == len(images.features) == 8 and images.features[0].shape == (TINY["embed_dim"],)
    assert_agree(losses[0], losses[1])
    assert len(set(losses[0])) == 8


def test_a_tower_of_timms_stays_as_it_is_and_its_projection_learns():
    cnn = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    torch.manual_seed(0)
    tower = Clip.create({**TINY, "vision_cfg": cnn}, TOKENIZER)
    for cache in (False, True):
        clip = new_clip(None, tower, TOKENIZER)
        images = (CachedImages if cache else CaptionedImages)(records(), clip, seed=0)
        projection = clip.model.visual.head.proj.weight.clone()
        with images.cached() if cache else nullcontext():
            train_clip(clip, images.batches(4), steps=2, lr=1e-2, progress=None)
        assert not torch.equal(clip.model.visual.head.proj.weight, projection)
        seen = torch.randn(2, 3, 32, 32)
        assert torch.equal(clip.model.visual.trunk(seen), tower.model.visual.trunk(seen))
        assert clip.model.visual.trunk.state_dict().keys() == tower.model.visual.trunk.state_dict().keys()
