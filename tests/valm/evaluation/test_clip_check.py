import copy
import json
import math
import random
import shutil
import sys
from dataclasses import asdict
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from PIL import Image

from tests.valm.tiny_clip import TINY
from valm.clip.clip import Clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.errors import ValmError
from valm.evaluation.clip_check import (
    RECALL_AT,
    TEMPLATES,
    check_clip,
    classify,
    held_out_of,
    linear_probe,
    note_held_out,
    ranks,
    retrieve,
)
from valm.knowledge_base.sources.folder import FolderSource

COLORS = {"red": (230, 20, 20), "dark_green": (10, 110, 20), "blue": (20, 20, 230), "yellow": (240, 230, 20)}
NAMES = [name.replace("_", " ") for name in COLORS]


def square(name, rng):
    """A picture of a colour that is never quite the same."""
    return Image.new("RGB", (32, 32), tuple(min(255, max(0, part + rng.randrange(-20, 21))) for part in COLORS[name]))


@pytest.fixture(scope="module")
def trained():
    """A tiny CLIP that has learned the colours from pictures and texts."""
    torch.manual_seed(0)
    rng = random.Random(0)
    texts = [template.format(name) for template in TEMPLATES for name in NAMES]
    clip = Clip.create(TINY, prune_tokenizer(clip_tokenizer(), texts), name="colours")
    model = clip.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(120):
        images = torch.stack([clip.transform(square(name, rng)) for name in COLORS])
        ids = clip.token_ids([rng.choice(TEMPLATES).format(name) for name in NAMES])
        features = model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True)
        optimizer.zero_grad()
        ClipLoss()(*features, model.logit_scale.exp()).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    return clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders of 10 images each, one of them broken, and captions in a table."""
    root = tmp_path_factory.mktemp("squares")
    rng = random.Random(1)
    captions = {}
    for name, words in zip(COLORS, NAMES, strict=True):
        (root / name).mkdir()
        for number in range(10):
            square(name, rng).save(root / name / f"{number}.png")
        captions[f"{name}/0.png"] = [f"a photo of a {words}.", f"a drawing of a {words}."]
    (root / "blue" / "9.png").write_bytes(b"broken")
    (root / "captions.json").write_text(json.dumps(captions))
    return root


def test_an_encoder_that_has_learned_the_classes(folder, trained):
    result = check_clip(FolderSource(folder), trained, progress=False)
    found = result.classification
    assert found.classes == ("blue", "dark_green", "red", "yellow")
    assert (found.pictures, found.chance, found.majority) == (39, 0.25, 10 / 39)
    assert found.zero_shot.low > 0.8 and found.balanced > 0.8
    assert found.linear_probe.accuracy.value > 0.8
    assert (found.linear_probe.trained_on, found.linear_probe.tested_on) == (32, 7)
    assert [entry["uri"] for entry in result.skipped] == ["blue/9.png"]
    retrieval = result.retrieval
    assert (retrieval.pictures, retrieval.captions) == (4, 8)
    for recalls in (retrieval.image_to_text, retrieval.text_to_image):
        assert [recall.at for recall in recalls] == list(RECALL_AT)
        assert recalls[0].recall.value >= 0.75 > 2 * recalls[0].chance
    assert json.loads(json.dumps(asdict(result)))["classification"]["zero_shot"]["value"] == found.zero_shot.value


def test_an_encoder_that_has_learned_nothing(folder, tokenizer):
    """Zero-shot no better than chance; a probe can still read colours off random features."""
    torch.manual_seed(1)
    found = check_clip(FolderSource(folder), Clip.create(TINY, tokenizer), progress=False).classification
    assert found.zero_shot.low <= found.chance <= found.zero_shot.high
    assert found.linear_probe.accuracy.low > found.chance


def test_zero_shot_compares_with_the_mean_of_a_classes_texts(trained):
    """With two templates that are far apart, an image that is nearest to one text of a class may be of another."""
    templates = ["a {}.", "two {} {of} }"]  # other braces are text
    texts = trained.encode_texts(
        [template.replace("{}", name) for name in ("blue", "dark green") for template in templates]
    )
    weights = torch.nn.functional.normalize(texts.unflatten(0, (2, 2)).mean(1), dim=-1)  # (2, E)
    images = torch.nn.functional.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    for number, name in enumerate(("blue", "dark_green")):
        own = images[(images @ weights.T).argmax(-1) == number]
        found = classify(own, [name] * len(own), trained, templates, classes=("blue", "dark_green"))
        assert len(own) > 5 and found.zero_shot.value == 1


def test_the_probe_tests_on_pictures_it_has_not_seen():
    """Random features of random labels: what is learned by heart does not show."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    features = random.normal(size=(200, 300)).astype(np.float32)
    probe = linear_probe(features, labels, seed=0)
    assert probe.accuracy.value < 0.5
    assert (probe.trained_on, probe.tested_on, probe.majority) == (160, 40, 0.25)
    assert linear_probe(features, labels, seed=0) == probe
    features[:, :4] += 9 * np.eye(4)[labels]
    assert linear_probe(features, labels, seed=0).accuracy.value == 1


def test_the_parts_of_the_probe_have_the_shares_of_the_classes():
    """The smallest class is in both parts; and a class of three images is enough."""
    features = np.eye(4, dtype=np.float32)[np.repeat(np.arange(4), [100, 40, 10, 5])]
    probe = linear_probe(features, features.argmax(-1), seed=0)
    assert (probe.trained_on, probe.tested_on, probe.accuracy.value) == (124, 31, 1)
    assert probe.majority == 20 / 31
    few = np.eye(4, dtype=np.float32)[np.repeat(np.arange(4), 3)]
    probe = linear_probe(few, few.argmax(-1), seed=0)
    assert (probe.trained_on, probe.tested_on, probe.majority) == (8, 4, 0.25)


def test_a_probe_without_scikit_learn_is_one_sentence(folder, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("valm.evaluation.clip_check.encode_records", lambda *_: pytest.fail("encoded"))
    with pytest.raises(ImportError, match=r"^a linear probe needs scikit-learn: pip install -e '.\[eval\]'$"):
        check_clip(FolderSource(folder), trained, progress=False)


def test_a_class_too_small_for_a_probe(trained):
    features = torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)
    assert classify(features, ["a", "a", "a", "b", "b"], trained).linear_probe is None
    with pytest.raises(ValmError, match="5 readable images of 1 classes, expected at least one image and two"):
        classify(features, ["a"] * 5, trained)


@pytest.mark.parametrize("block", [1, 10**6])
def test_ranks(monkeypatch, block):
    monkeypatch.setattr("valm.evaluation.clip_check.BLOCK_SCORES", block)
    generator = torch.Generator().manual_seed(0)
    # small whole numbers, so that there are equals, exactly
    images, texts = (torch.randint(-2, 3, (n, 3), generator=generator).float() for n in (6, 15))
    image_of = np.sort(np.array([*range(6), 0, 0, 2, 3, 3, 3, 5, 5, 5]))
    to_text, to_image = ranks(images, texts, image_of)
    scores = (images @ texts.T).tolist()
    for image in range(6):
        best = max(scores[image][text] for text in range(15) if image_of[text] == image)
        assert to_text[image] == sum(scores[image][text] >= best for text in range(15) if image_of[text] != image)
    for text in range(15):
        own = scores[image_of[text]][text]
        assert to_image[text] == sum(scores[image][text] >= own for image in range(6) if image != image_of[text])


def test_chance_of_a_random_order():
    """Counted over all draws: three pictures with 1, 2 and 3 captions."""
    same_text = SimpleNamespace(encode_texts=lambda texts: torch.ones(len(texts), 16) / 4)
    retrieval = retrieve(torch.eye(3, 16), [["a"], ["b", "c"], ["d", "e", "f"]], same_text)
    owner = [0, 1, 1, 2, 2, 2]
    for recall in retrieval.image_to_text[:2]:
        draws = list(combinations(range(6), recall.at))
        hits = [sum(any(owner[text] == image for text in draw) for draw in draws) for image in range(3)]
        assert math.isclose(recall.chance, np.mean(hits) / len(draws))
    assert [recall.chance for recall in retrieval.text_to_image] == [1 / 3, 1, 1]
    # all texts are equal, and equals count against
    assert retrieval.image_to_text[0].recall.value == 0


def test_what_cannot_be_checked(tmp_path, trained):
    def fails(message, **options):
        with pytest.raises(ValmError, match=message):
            check_clip(FolderSource(tmp_path), trained, progress=False, **options)

    fails("no images in")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    fails("there is nothing to check a CLIP by: the 1 images, such as x.png, have no captions")
    (tmp_path / "x.txt").write_text("a square")
    fails("there are 1 readable images with captions, expected at least two")
    for templates in (["a {}", "a photo"], []):
        fails("each prompt template needs {} for the name of the class, got", templates=templates)


def test_where_the_training_held_images_out_these_are_looked_at(folder, trained, tmp_path):
    source = FolderSource(folder)
    copy.copy(trained).save(tmp_path)  # whose folder is noted in it
    clip = Clip.load(tmp_path)
    held_out = [record for record in source.records if "/0" in record.uri or "/1" in record.uri]
    note_held_out(tmp_path, clip, held_out)
    result = check_clip(source, clip, progress=False)
    assert (result.held_out, result.images, result.classification.pictures) == (8, 40, 8)
    assert held_out_of(clip, source.records[:20]) == ([], 8)  # half of them are not there
    assert len(held_out_of(clip, source.records[:21])[0]) == 5
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert len(held_out_of(clip, FolderSource(tmp_path / "elsewhere").records)[0]) == 8
    (tmp_path / "elsewhere" / "blue" / "0.png").write_bytes(b"another")
    assert len(held_out_of(clip, FolderSource(tmp_path / "elsewhere").records)[0]) == 7
    clip.model.logit_scale.data += 1
    clip.save(tmp_path)  # and one that came into the folder afterwards
    assert held_out_of(Clip.load(tmp_path), source.records) == ([], 0)


@pytest.mark.parametrize("held_out", [("blue", "red"), ("red",)])
def test_images_that_were_held_out_are_told_from_all_classes(folder, trained, tmp_path, held_out):
    """Fewer classes would be an easier task."""
    copy.copy(trained).save(tmp_path)
    clip, source = Clip.load(tmp_path), FolderSource(folder)
    note_held_out(tmp_path, clip, [record for record in source.records if record.uri.startswith(held_out)][:20])
    result = check_clip(source, clip, progress=False)
    found = result.classification
    assert (result.retrieval is None) == (held_out == ("red",))  # one image with captions is not enough
    assert (found.classes, found.chance) == (("blue", "dark_green", "red", "yellow"), 0.25)
    assert found.linear_probe is None and 0 <= found.balanced <= 1
