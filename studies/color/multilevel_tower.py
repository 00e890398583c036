"""An image tower for CLIP that pools early stages of an EfficientNet next to its last stage.

The last stage of a network trained on ImageNet tells what a picture shows, but little about its colours. The first
stages tell the colours. Importing this module registers the tower with timm and open_clip as
`tf_efficientnet_lite0_levels`. Import it before you open such a CLIP.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

EARLY_BLOCKS = 2


class MultilevelTower(nn.Module):
    """Mean and standard deviation over the pixels of the stem and the first EARLY_BLOCKS blocks, and the pooled output.

    Each level is normalised and contributes the same share of the squared length of the features.

    Args:
        body: an EfficientNet of timm, without its classifier.
    """

    def __init__(self, body: Any):
        super().__init__()
        self.body = body
        early = [body.conv_stem.out_channels, *(info["num_chs"] for info in body.feature_info[:EARLY_BLOCKS])]
        self.sizes = [*(2 * channels for channels in early), body.num_features]
        self.num_features = sum(self.sizes)
        self.default_cfg = {"pool_size": None}  # open_clip reads it: the features have no height and width

    def reset_classifier(self, num_classes: int) -> None:
        """Does nothing: there is no classifier, but open_clip asks for its removal."""

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, num_features)."""
        states = self.body.bn1(self.body.conv_stem(pixels))
        levels = [_mean_and_std(states)]
        for number, block in enumerate(self.body.blocks):
            states = block(states)
            if number < EARLY_BLOCKS:
                levels.append(_mean_and_std(states))
        levels.append(self.body.global_pool(self.body.bn2(self.body.conv_head(states))))
        share = self.num_features / len(levels)
        return torch.cat([F.layer_norm(x, x.shape[1:]) * (share / x.shape[1]) ** 0.5 for x in levels], dim=1)


def _mean_and_std(states: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 2 C)."""
    return torch.cat((states.mean((2, 3)), states.std((2, 3))), dim=1)


@register_model
def tf_efficientnet_lite0_levels(pretrained: bool = False, **options: Any) -> MultilevelTower:
    return MultilevelTower(timm.create_model("tf_efficientnet_lite0", pretrained=pretrained, num_classes=0, **options))
