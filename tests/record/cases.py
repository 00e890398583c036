"""Outputs of tiny models, which must stay equal unless a change intends otherwise.

    python -m tests.record.cases    # writes tests/record/outputs.safetensors with the current code

The outputs were recorded at commit ad5fab6. At that time bos separated the documents in a row of a VaLM; `packed` gives
the positions of the same documents. To convert a folder that ad5fab6 wrote (the demo's, a study's) to today's format,
use tests/record/convert.py of the commit "Convert folders of ad5fab6 to today's format, once".
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from tests.record.drawn import draw, save
from tests.valm.model.decoders import HEADS, SIZES, SMALL, tiny_gpt2, tiny_llama, tiny_minimax, tiny_phi3_longrope
from tests.valm.models import BOS, HashRetriever, tiny_config
from valm.model.augment import augment
from valm.model.gpt2 import VaLMForCausalLM

OUTPUTS = Path(__file__).with_name("outputs.safetensors")
IMAGE_DIM, IMAGES, POOL, BATCH, LENGTH = HashRetriever.dim, HashRetriever.k, 7, 3, 11


def valm(**options: Any) -> VaLMForCausalLM:
    return VaLMForCausalLM(tiny_config(**options))


def gemma2() -> Any:
    """Softcap and sliding windows."""
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, **SIZES, **HEADS, head_dim=8, sliding_window=4))


def gpt_oss() -> Any:
    """An attention sink, and experts."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 4}
    return GptOssForCausalLM(GptOssConfig(**SMALL, **SIZES, **HEADS, **experts))


def augmented(base: Callable[[], Any], **options: Any) -> Any:
    return augment(base(), IMAGE_DIM, IMAGES, **options)


MODELS: dict[str, Callable[[], Any]] = {
    "valm": valm,
    "valm-flat": lambda: valm(fusion_scale="embed_dim", layer=-1, image_dim=32, logit_bias=-1.0),
    "valm-text": lambda: valm(num_images=0),
    "llama": lambda: augmented(tiny_llama),
    "gpt2": lambda: augmented(tiny_gpt2),
    "gemma2": lambda: augmented(gemma2),
    "gpt-oss": lambda: augmented(gpt_oss),
    "minimax": lambda: augmented(tiny_minimax),
    "phi3-longrope": lambda: augmented(tiny_phi3_longrope),
}
# Families whose padding becomes NaN in float64, even without images.
NOT_PADDED = ("gemma2",)
# Families that mix the documents of a row, or whose cache cannot be static.
NOT_PACKED, NOT_STATIC = ("minimax", "gpt-oss"), ("minimax", "phi3-longrope")


def model_of(name: str) -> Any:
    """In float64, so that the order of sums does not matter; with open images and without dropout."""
    model = MODELS[name]().double().eval()
    model.set_experts_implementation("eager")  # grouped products do not support float64
    draw(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def takes_images(model: Any) -> bool:
    return model.fusion_options.num_images > 0


def ids_of(seed: int = 0) -> Tensor:
    """(B, T) tokens; a start token stands first and nowhere else."""
    ids = torch.randint(3, BOS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    return ids


def images_of(model: Any, shape: torch.Size) -> dict[str, Tensor]:
    if not takes_images(model):
        return {}
    generator = torch.Generator().manual_seed(1)
    options = model.fusion_options
    index = torch.randint(-1, POOL, (*shape, options.num_images), generator=generator)
    return {"image_pool": torch.randn(POOL, options.image_dim, generator=generator), "image_index": index}


def packed() -> tuple[Tensor, Tensor]:
    """Ids of several documents in each row, each after a bos, and their positions."""
    ids = ids_of(2)
    for row, starts in enumerate([(4,), (1, 6, 7), ()]):
        ids[row, list(starts)] = BOS
    positions = torch.arange(LENGTH).expand_as(ids)
    starts = torch.where(ids == BOS, positions, 0).cummax(1).values
    return ids, positions - starts


def padded(side: str, name: str) -> tuple[Tensor, Tensor]:
    ids, mask = ids_of(), torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if name in NOT_PADDED:
        return ids, mask
    for row, width in enumerate((0, 3, 5)):
        where = slice(0, width) if side == "left" else slice(LENGTH - width, LENGTH)
        ids[row, where] = 0
        mask[row, where] = 0
        if side == "left":
            ids[row, width] = BOS
    return ids, mask


def outputs_of(name: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every recorded output of a model."""
    model = model_of(name)
    with torch.no_grad():
        yield from given_images(model, name)
        if name not in NOT_PACKED:
            yield from of_packed(model)
    yield from of_training(model)
    if takes_images(model) and model.fusion_options.image_dim == IMAGE_DIM:
        with torch.no_grad():
            yield from retrieved(model, name)


def given_images(model: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    ids = ids_of()
    images = images_of(model, ids.shape)
    yield "logits", model(ids, **images).logits
    for side in ("left", "right"):
        ids, mask = padded(side, name)
        logits = model(ids, attention_mask=mask, **images).logits
        yield f"logits, padded on the {side}", logits[mask.bool()]
    yield "text alone", text_alone(model, ids_of())


def text_alone(model: Any, ids: Tensor) -> Tensor:
    if not takes_images(model):
        return model(ids).logits
    options = model.fusion_options
    index = torch.full((*ids.shape, options.num_images), -1)
    return model(ids, image_pool=torch.zeros(0, options.image_dim), image_index=index).logits


def of_packed(model: Any) -> Iterator[tuple[str, Tensor]]:
    ids, positions = packed()
    yield "packed", model(ids, position_ids=positions, use_cache=False, **images_of(model, ids.shape)).logits


def of_training(model: Any) -> Iterator[tuple[str, Tensor]]:
    ids = ids_of(3)
    model.train().requires_grad_(True)
    loss = model(ids, labels=ids, use_cache=False, **images_of(model, ids.shape)).loss
    loss.backward()
    yield "loss", loss.detach()
    for name, parameter in model.named_parameters():
        if "image_fusion" in name:
            yield f"gradient of {name.partition('image_fusion.')[2].removesuffix('_delta')}", parameter.grad
    norms = [parameter.grad.norm() for _, parameter in sorted(model.named_parameters()) if parameter.grad is not None]
    yield "norms of gradients", torch.stack(norms)
    model.zero_grad()
    model.eval()


def retrieved(model: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    model.set_retriever(HashRetriever(bos=BOS if name.startswith("valm") else None))
    ids, mask = padded("left", name)
    yield "retrieved", model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    if name not in NOT_PACKED:
        ids, positions = packed()
        yield "retrieved, packed", model(ids, position_ids=positions, use_cache=False).logits
    ids, given, parts = ids_of(), {}, []
    for first, last in ((0, 4), (4, 5), (5, 6), (6, LENGTH)):
        output = model(ids[:, first:last], use_cache=True, **given)
        given = {key: output[key] for key in ("cache", "past_key_values") if output.get(key) is not None}
        parts.append(output.logits)
    yield "cached", torch.cat(parts, 1)
    model.set_min_score(0.9)
    yield "cut", model(ids, use_cache=False).logits
    model.set_min_score(None)
    ids, mask = padded("left", name)
    for kind, options in {
        "greedy": {"do_sample": False},
        "beams": {"do_sample": False, "num_beams": 3},
        "static": {"do_sample": False, "cache_implementation": "static"},
    }.items():
        if kind == "static" and name in NOT_STATIC:
            continue
        yield (
            kind,
            model.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None, pad_token_id=0, **options),
        )


def main() -> None:
    save({f"{name}/{what}": tensor for name in MODELS for what, tensor in outputs_of(name)}, OUTPUTS)


if __name__ == "__main__":
    main()
