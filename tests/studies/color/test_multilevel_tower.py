"""The image tower that pools several stages of an EfficientNet."""

import json
import subprocess
import sys

import pytest
import torch

from studies.color.multilevel_tower import MultilevelTower, tf_efficientnet_lite0_levels
from valm.clip.clip import Clip

MODEL_CFG = {
    "embed_dim": 16,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0_levels",
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 32,
    },
    "text_cfg": {"context_length": 8, "layers": 1, "width": 16, "heads": 2},
}


@pytest.fixture(scope="module")
def tower() -> MultilevelTower:
    torch.manual_seed(0)
    return tf_efficientnet_lite0_levels().eval()


def test_the_levels_are_pooled_states_of_the_network(tower):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    states = []
    for module in (tower.body.bn1, tower.body.blocks[0], tower.body.blocks[1]):
        module.register_forward_hook(lambda _, args, output: states.append(output.double()))
    with torch.no_grad():
        levels = tower(pixels).double().split(tower.sizes, dim=1)
        last = tower.body.forward_head(tower.body.forward_features(pixels), pre_logits=True).double()
    expected = [torch.cat((x.flatten(2).mean(2), x.flatten(2).std(2)), dim=1) for x in states[:3]] + [last]
    assert tower.num_features == sum(tower.sizes) == 64 + 32 + 48 + 1280
    for level, values in zip(levels, expected, strict=True):
        centred = values - values.mean(1, keepdim=True)
        cosine = torch.nn.functional.cosine_similarity(level, centred)
        assert cosine.min() > 0.9999
        # an equal share of the squared length; less where the level hardly varies, as layer_norm divides by more
        assert (level.square().sum(1) <= tower.num_features / 4 * 1.001).all()


def test_levels_of_one_length_whatever_their_scale(tower):
    pixels = 30 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        levels = tower(pixels).split(tower.sizes, dim=1)
    for level in levels[:3]:
        torch.testing.assert_close(level.square().sum(1), torch.full((2,), tower.num_features / 4), rtol=0.01, atol=0)


@pytest.mark.slow
def test_a_clip_with_this_tower_loads_in_another_process(tmp_path):
    torch.manual_seed(0)
    clip = Clip.create(MODEL_CFG)
    clip.save(tmp_path / "clip")
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(image, tmp_path / "image.pt")
    code = (
        "import studies.color.multilevel_tower, sys, torch; from valm.clip.clip import Clip; "
        f"image = torch.load({str(tmp_path / 'image.pt')!r}, weights_only=True); "
        f"print(Clip.load({str(tmp_path / 'clip')!r}).encode_images(image).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, clip.encode_images(image), rtol=1e-4, atol=1e-6)
