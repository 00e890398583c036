"""Decoders in a folder that tests open quantised, and the checks of an adapter on such a base."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.valm.model.decoders import IMAGE_DIM, IMAGES, random_ids, random_images, tiny_llama
from valm.errors import ValmError
from valm.model.adapter import load_adapter, save_adapter
from valm.model.augment import augment

# Blocks of 64 numbers share a scale in 4 bits.
SIZES = {"hidden_size": 64, "intermediate_size": 128}
COARSELY = "is quantised, now or when the adapter was made, so its weights were compared only coarsely"


def save_bases(folder: Path) -> None:
    """A float base, another base of its shapes, and a base that differs only in its quantised weights."""
    base, other = (tiny_llama(seed, **SIZES) for seed in (0, 1))
    base.save_pretrained(folder / "base")
    other.save_pretrained(folder / "other")
    state = {name: weight for name, weight in base.state_dict().items() if "proj" not in name}
    other.load_state_dict(state, strict=False)
    other.save_pretrained(folder / "other-layers")


def opened(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def with_images(base):
    return augment(base, IMAGE_DIM, IMAGES, logit_bias=0.0).eval()


@torch.no_grad()
def logits(model):
    images = random_images(2, 9)
    return model(random_ids(2, 9), **images | {"image_pool": images["image_pool"].to(model.dtype)}).logits


def check_adapters(folder: Path, quantised, make_base=opened) -> None:
    """Checks an adapter on the bases that `save_bases` put into `folder`.

    quantised: makes the options that open a base quantised; made for each call, as a library may change them.
    """

    def base(name="base"):
        return make_base(folder / name, **quantised())

    save_adapter(with_images(opened(folder / "base")), folder / "of-float")
    model = with_images(base())
    expected = logits(model)
    save_adapter(model, folder / "adapter")  # also after it has run
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="tests")
        assert torch.equal(logits(load_adapter(base(), folder / "adapter").eval()), expected)
    with pytest.warns(UserWarning, match=COARSELY):
        load_adapter(opened(folder / "base"), folder / "adapter")
    with pytest.warns(UserWarning, match=COARSELY):
        loaded = load_adapter(base(), folder / "of-float")
    save_adapter(loaded, folder / "again")
    for name in ("adapter", "of-float"):
        if make_base is opened:  # its weights can be read
            with pytest.raises(ValmError, match=r"belongs to another base model.*_proj\.weight has other values"):
                load_adapter(base("other-layers"), folder / name)
        with pytest.raises(ValmError, match="belongs to another base model"):
            load_adapter(base("other"), folder / name)
        with pytest.raises(ValmError, match="belongs to another base model"):
            load_adapter(opened(folder / "other"), folder / name)
