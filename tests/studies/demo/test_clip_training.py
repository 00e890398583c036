"""The small CLIP learns, and learns the same for the same seed."""

import pytest
import torch

from studies.demo.clip_training import IMAGE_SIZE, pixels, train_demo_clip
from studies.demo.things import drawing_tensor, random_views
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer


@pytest.fixture(scope="module")
def things(all_things):
    wanted = {"tomato", "banana", "swan", "frog", "elephant", "carrot", "whale", "pig"}
    return [thing for thing in all_things if thing.name in wanted]


@pytest.fixture(scope="module")
def trained(things):
    tokenizer = prune_tokenizer(clip_tokenizer(), [thing.name for thing in things])
    return train_demo_clip(things, tokenizer, seed=0, steps=100, progress=False)


def test_it_finds_the_picture_of_a_name(things, trained):
    clip, losses = trained
    assert len(losses) == 100
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    images = random_views(drawing_tensor(things, 96), IMAGE_SIZE, torch.Generator().manual_seed(9))
    scores = clip.encode_texts([f"the {thing.name}" for thing in things]) @ clip.encode_images(pixels(images)).T
    assert (scores.argmax(1) == torch.arange(len(things))).float().mean() >= 0.75


def test_it_comes_back_ready_for_use(trained):
    clip, _ = trained
    assert clip.embed_dim == 128
    assert not clip.model.training
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert clip.model.logit_scale.exp() <= 50.01


def test_a_seed_gives_the_same_weights(things):
    tokenizer = prune_tokenizer(clip_tokenizer(), [thing.name for thing in things])
    first, again, other = (train_demo_clip(things, tokenizer, seed=s, steps=3, progress=False)[0] for s in (1, 1, 2))
    assert first.weights_hash == again.weights_hash != other.weights_hash


def test_views_go_in_as_the_transform_would_have_them(things, trained):
    clip, _ = trained
    from torchvision.transforms.functional import to_pil_image

    view = random_views(drawing_tensor(things[:1], 96), IMAGE_SIZE, torch.Generator().manual_seed(0))
    error = (clip.transform(to_pil_image(view[0])) - pixels(view)[0]).abs().max()
    assert error <= 2 / 255  # PNG's eight bits
