"""The image tower that pools several stages of an EfficientNet."""

import pytest
import torch

from studies.color.multilevel_tower import MultilevelTower, tf_efficientnet_lite0_levels


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
