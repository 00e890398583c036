"""Augments a tiny model of every causal family of transformers, and checks what it computes.

`python -m tests.checks.families` writes docs/reference/families.md; the tests hold the code to that page.
"""

from __future__ import annotations

import copy
import gc
import inspect
import re
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from valm.errors import ValmError
from valm.model import attention as fusion
from valm.model.augment import augment, fusion_module
from valm.model.probe import attention_path, decoder_layers
from valm.store.pretrained import quiet_transformers

TABLE = Path(__file__).parents[2] / "docs" / "reference" / "families.md"
NAME = re.compile(r"`([\w-]+)`")

# In every family of transformers that has an argument of this name; layer_types are cycled through besides.
TINY = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "d_model": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 5, "attention_dropout": 0.0},
    **{"moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_num_experts": 4, "n_shared_experts": 1},
    **{"num_shared_experts": 1, "shared_intermediate_size": 64, "shared_expert_intermediate_size": 32},
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"qk_head_dim": 16, "word_embed_proj_dim": 64, "ffn_dim": 128, "n_inner": 128, "rotary_dim": 8},
    **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "query_pre_attn_scalar": 16},
    **{"decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 128, "num_hash_layers": 0},
    **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128, "ffn_hidden_size": 128},
    **{"is_decoder": True, "num_kv_shared_layers": 2, "no_rope_layers": [1, 1, 0, 1]},
    **{"global_head_dim": 16},
    **{"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 8, "n_mamba_heads": 8, "chunk_size": 8},
    # changes at a position happen within the few tokens of a test
    **{"original_max_position_embeddings": 4, "floor_scale": 3, "attention_chunk_size": 256},
}
HALF = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
# Of one family, besides or instead.
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HALF, "position_embedding_type": "rope"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 4, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mistral4": {"head_dim": 16},
    "qwen2_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlnet": {"d_head": 16},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
}
# Wrappers with a vision tower of as many layers as the text model has.
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
VISION: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": TOWER | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}},
    "internvl": {"vision_config": TOWER | {"image_size": [28, 28], "patch_size": [14, 14]}},
    "qwen2_vl": {"vision_config": {"depth": 4, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}},
    "smolvlm": {"vision_config": TOWER | {"image_size": 28, "patch_size": 14}},
}
FAMILIES = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "mistral4", *VISION)
MOST_PARAMETERS = 20_000_000
# Relative to the largest output of the attention, for float32 sums in different orders.
TOLERANCE = 2e-5
BATCH, LENGTH, IMAGE_DIM, IMAGES, POOL = 2, 9, 32, 3, 7
# The first position of a text at far positions, and the lengths of the parts that fill a cache.
FAR, PARTS = 240, (4, 1, 1, 3)


class NotTiny(Exception):
    """No tiny model of the family runs here, so nothing is known about the family."""


def tiny_config(family: str) -> PreTrainedConfig:
    """A text configuration of the family with four layers; for a wrapper, with a vision tower of four layers."""
    config_class = CONFIG_MAPPING[family]
    text = config_class().get_text_config()
    names = set(text.to_dict()) | set(text.attribute_map)
    arguments = {name: value for name, value in TINY.items() if name in names}
    if getattr(text, "layer_types", None):
        kinds = list(dict.fromkeys(text.layer_types))
        name = text.attribute_map.get("layer_types", "layer_types")
        arguments[name] = [(kinds * 4)[layer] for layer in range(4)]
    if "kv_lora_rank" in names:
        arguments |= {"head_dim": 8, "num_key_value_heads": 4}
    if getattr(text, "rope_parameters", None):
        arguments["rope_parameters"] = with_near_threshold(text.rope_parameters)
    arguments |= MORE.get(family, {})
    arguments = {name: value for name, value in arguments.items() if not read_only(type(text), name)}
    if family not in VISION:
        return type(text)(**arguments)
    return config_class(text_config=arguments, **VISION[family])


def with_near_threshold(rope_parameters: dict) -> dict:
    """With the `original_max_position_embeddings` of TINY, also in those of each type of layer."""
    name = "original_max_position_embeddings"
    changed = {
        key: with_near_threshold(value) if isinstance(value, dict) else value for key, value in rope_parameters.items()
    }
    return changed | ({name: TINY[name]} if name in changed else {})


def read_only(config_class: type, name: str) -> bool:
    found = getattr(config_class, config_class.attribute_map.get(name, name), None)
    return isinstance(found, property) and found.fset is None


def tiny(family: str) -> PreTrainedModel:
    """A model of the family with four layers, in eval mode, in which everything matters."""
    config = tiny_config(family)
    if family in VISION:
        model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    elif family == "mistral4":  # the Auto classes have it among those with images only
        model_class = transformers.Mistral4ForCausalLM
    else:
        known = type(config) if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else CONFIG_MAPPING[family]
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[known]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise NotTiny(f"its smallest configuration here has {size / 1e6:.0f} M parameters")
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def token_ids() -> Tensor:
    return torch.randint(3, 128, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))


def left_padding() -> Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, :3] = 0
    return mask


def random_images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pool = torch.randn(POOL, IMAGE_DIM, generator=generator)
    return {
        "image_pool": pool,
        "image_index": torch.randint(-1, POOL, (BATCH, LENGTH, IMAGES), generator=generator),
    }


def open_images(model: PreTrainedModel, logit_bias: float = 0.0) -> None:
    """Images that matter: an input projection of their size, and no biases except on the scores."""
    module = fusion_module(model)
    with torch.no_grad():
        if module.proj is not None:
            module.proj.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
        module.logit_bias_delta.fill_(logit_bias - module.initial_logit_bias)


@dataclass
class Findings:
    """The errors of an augmented family, relative to the largest logit or output.

    Attributes:
        text, text_padded: logits without images, compared with the original's.
        closed: logits with closed images, compared with the original's.
        moved: how far open images move the logits.
        reference, reference_padded, reference_far: the fusion attention's output with open images, compared with the
            family's own attention over the text and the token's images, at the token's position. "far" is beyond all
            thresholds; None if the family takes no positions.
        cached: logits with open images and a cache, compared with no cache; None if the original's differ.
        saved: logits of the model saved whole and opened again; None if the original's differ.
        weights: how far the attention weights of a token, over text and images, exceed 1.
        route: "kernel", or the reason for the eager joint attention.
    """

    layer: int
    text: float
    text_padded: float
    closed: float
    moved: float
    reference: float
    reference_padded: float
    reference_far: float | None
    cached: float | None
    saved: float | None
    weights: float
    route: str

    def wrong(self) -> list[str]:
        """The names of the errors above rounding, or above 0 in a text without images."""
        names = ("text", "text_padded", "closed", "reference", "reference_padded", "reference_far", "cached", "saved")
        errors = {name: error for name in (*names, "weights") if (error := getattr(self, name)) is not None}
        exact = ("text", "text_padded")  # the base's own logits
        limits = {name: 0.0 if name in exact else TOLERANCE for name in errors}
        wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= limits[name]]
        return wrong + ([] if self.moved > 1e-3 else [f"moved {self.moved:.1e}"])


def distance(logits: Tensor, reference: Tensor) -> float:
    return ((logits - reference).abs().max() / reference.abs().max()).item()


def in_parts(
    model: PreTrainedModel, ids: Tensor, image_pool: Tensor | None = None, image_index: Any = None
) -> Tensor | None:
    """Logits (B, T, V) with a cache that is filled in parts; None for a model without a cache."""
    found, cache, start = [], None, 0
    for length in PARTS:
        part = slice(start, start := start + length)
        images = {} if image_pool is None else {"image_pool": image_pool, "image_index": image_index[:, part]}
        out = model(ids[:, part], use_cache=True, **({} if cache is None else {"cache": cache}), **images)
        found.append(out.logits)
        if (cache := out.get("cache")) is None:
            return None
    return torch.cat(found, 1)


def opened_again(model: PreTrainedModel, door: Any) -> PreTrainedModel:
    """The model saved into a folder and opened by the class `door`."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        model.save_pretrained(folder)
        return door.from_pretrained(folder).eval()


def running(family: str) -> tuple[PreTrainedModel, Tensor]:
    """A tiny model of the family and its logits. Raises NotTiny if the family's own code raises."""
    try:
        model = tiny(family).requires_grad_(False)  # PyTorch may sum in another order with weights that train
        return model, model(token_ids(), use_cache=False).logits
    except NotTiny:
        raise
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise NotTiny(f"its tiny model does not run here ({type(error).__name__}: {first_line[:80]})") from error


@torch.no_grad()
def check(family: str, layer: int | None = None) -> Findings:
    """Augments the family. Raises ValmError if valm rejects it."""
    model, expected = running(family)
    ids, mask, images = token_ids(), left_padding(), random_images()
    present = mask.bool()
    far = {"position_ids": torch.arange(FAR, FAR + LENGTH).expand(BATCH, -1)}
    padded = model(ids, attention_mask=mask, use_cache=False).logits[present]
    original = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        augment(model, IMAGE_DIM, IMAGES, layer)
    layer = model.fusion_options.layer
    none = {"image_pool": torch.zeros(0, IMAGE_DIM), "image_index": torch.full((BATCH, LENGTH, IMAGES), -1)}
    text = distance(model(ids, use_cache=False, **none).logits, expected)
    text_padded = distance(model(ids, attention_mask=mask, use_cache=False, **none).logits[present], padded)
    open_images(model, -1e4)
    closed = distance(model(ids, use_cache=False, **images).logits, expected)
    open_images(model)
    path = attention_path(original, layer)
    attention, own = (decoder_layers(of)[layer].get_submodule(path) for of in (model, original))
    embedded = fusion_module(model)(images["image_pool"]).hidden_states[0]
    reasons: list[str | None] = []

    def route(*arguments):
        reasons.append(why(*arguments))
        return reasons[-1]

    def reference(**inputs: Tensor) -> tuple[Tensor, float]:
        """The logits with open images, and the errors of the attention's calls against the family's own attention."""
        calls = []
        hook = attention.register_forward_hook(
            lambda module, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
        )
        with mock.patch.object(fusion, "why_joint_eager", route):
            logits = model(ids, use_cache=False, **images, **inputs).logits
        hook.remove()
        # some families go through their layers several times
        return logits, max(eager_reference(own, call, embedded, images["image_index"]) for call in calls)

    why = fusion.why_joint_eager
    opened, near = reference()
    takes_positions = "position_ids" in inspect.signature(type(original).forward).parameters
    of_original = in_parts(original, ids)
    cached = None
    if of_original is not None and distance(of_original, expected) <= TOLERANCE:
        cached = distance(in_parts(model, ids, **images), opened)
    saved = distance(opened_again(model, AutoModelForCausalLM)(ids, use_cache=False, **images).logits, opened)
    if saved > TOLERANCE:
        own_saved = distance(opened_again(original, type(original))(ids, use_cache=False).logits, expected)
        saved = saved if own_saved <= TOLERANCE else None
    text_weights, image_weights = model.fusion_attention(ids, **images)
    return Findings(
        layer,
        text,
        text_padded,
        closed,
        distance(opened, expected),
        near,
        reference(attention_mask=mask)[1],
        reference(**far)[1] if takes_positions else None,
        cached,
        saved,
        (text_weights.sum(-1) + image_weights.sum(-1) - 1).max().item(),
        next((r for r in reasons if r is not None), "kernel"),
    )


def eager_reference(own: nn.Module, call: tuple, embedded: Tensor, image_index: Tensor) -> float:
    """The error of a call of the fusion attention against the family's own attention. The latter runs token by token
    over the text so far and the token's images, at the token's position."""
    args, kwargs, output = call
    names = list(inspect.signature(type(own).forward).parameters)[1:]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    mask = arguments.get("attention_mask")
    worst = 0.0
    for row in range(BATCH):

        def select_row(tensor: Tensor, dim: int, row: int = row) -> Tensor:
            return tensor.select(dim, min(row, tensor.shape[dim] - 1))

        for token in range(LENGTH):
            seen = torch.ones(token + 1, dtype=torch.bool)
            if mask is not None:
                of_row = mask[min(row, len(mask) - 1), 0, token, : token + 1]
                seen = of_row if of_row.dtype == torch.bool else of_row >= 0
            if not seen.any():
                continue
            index = image_index[row, token]
            found = embedded[index[index >= 0]]
            at = torch.tensor([*range(token + 1), *[token] * len(found)])
            size = len(at)
            visible = torch.eye(size, dtype=torch.bool)
            visible[token] = torch.cat([seen, torch.ones(len(found), dtype=torch.bool)])
            changed = {}
            for name, value in arguments.items():
                if name == "hidden_states":
                    value = torch.cat([value[row, : token + 1], found])[None]
                elif name == "attention_mask":
                    value = visible[None, None]
                    if own.config._attn_implementation == "eager" or (mask is not None and mask.dtype != torch.bool):
                        value = torch.zeros(value.shape).masked_fill(~value, torch.finfo(torch.float32).min)
                elif name in fusion.CACHE_ARGUMENTS:
                    value = None
                elif name == "use_cache":
                    value = False
                elif name == "position_ids" and value is not None:
                    value = select_row(value, -2)[..., at].unsqueeze(-2)
                elif name == "position_embeddings" and value is not None:
                    tables = [value] if isinstance(value, Tensor) else value
                    tables = [select_row(table, -3)[..., at, :].unsqueeze(-3) for table in tables]
                    value = tables[0] if isinstance(value, Tensor) else tuple(tables)
                elif isinstance(value, Tensor) and LENGTH in value.shape[1:]:  # one value per token
                    value = select_row(value, 0)[None].index_select(value.shape.index(LENGTH, 1), at)
                changed[name] = value
            expected = own(**changed)[0][0, token]
            worst = max(worst, (expected - output[row, token]).abs().max().item())
    return worst / output.abs().max().item()


def describe(family: str) -> tuple[str, str]:
    """Route and reason, as in the table."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = check(family)
    except (ValmError, NotTiny) as error:
        return "refused" if isinstance(error, ValmError) else "not tried", str(error)
    if found.wrong():
        return "differs", ", ".join(found.wrong())
    return ("kernel", f"layer {found.layer}") if found.route == "kernel" else ("eager joint", found.route)


def read_table() -> dict[str, tuple[str, str]]:
    """family -> (route, why) of docs/reference/families.md."""
    lines = TABLE.read_text().splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| `")]
    return {name: (route, why.strip()) for names, route, why in rows for name in NAME.findall(names)}


def write_table(families: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = {}

    def too_slow(*_):
        raise TimeoutError("more than a minute of processor time")

    signal.signal(signal.SIGPROF, too_slow)
    for family in families:
        signal.setitimer(signal.ITIMER_PROF, 60)  # of processor time
        rows[family] = describe(family)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(family, *rows[family], sep="\t", flush=True)
        gc.collect()
    TABLE.write_text(rendered(rows))


def rendered(rows: dict[str, tuple[str, str]]) -> str:
    """docs/reference/families.md, of family -> (route, why)."""
    counts = [sum(row[0] == route for row in rows.values()) for route in ("kernel", "eager joint")]
    wrappers = ", ".join(f"`{family}`" for family in VISION)
    head = HEAD.format(version=transformers.__version__, kernel=counts[0], eager=counts[1], wrappers=wrappers)
    families: dict[tuple[str, str], list[str]] = {}
    for name, row in sorted(rows.items()):
        families.setdefault(row, []).append(f"`{name}`")
    lines = [f"| {', '.join(names)} | {route} | {why.replace('|', '/')} |" for (route, why), names in families.items()]
    return head + "\n".join(lines) + "\n" + TAIL


HEAD = """# Model families

Find out whether `augment` can give your model images. Its family is the `model_type` in its `config.json`
(SmolLM2: `llama`). The table contains every causal family of transformers {version}, and these with a vision tower:
{wrappers}. {kernel} families run on `visual_fusion_attn`, {eager} on eager joint attention, which stores all scores.

| Route | Meaning |
|---|---|
| kernel | runs on `visual_fusion_attn` in the layer named here: -2, unless that layer computes no keys itself |
| eager joint | runs on eager joint attention, for the reason given |
| refused | `augment` raises `ValmError` with the reason given |
| differs | runs, but its attention over images deviates from the family's own by the amount shown; read it before use |
| not tried | not tested: no tiny model of the family runs here |

| Family | Route | Layer or reason |
|---|---|---|
"""

TAIL = """
Each family was tested as a tiny random model, with a tolerance of {tolerance} of the largest value:

- Without images, and with images closed by their bias, logits equal the logits of the original model, with and without
  left padding.
- With open images, attention equals the family's own attention over the text and the token's images, which stand at the
  token's position. The test covers the first positions, left padding, and positions from which the config changes the
  computation.
- Logits stay the same with a KV cache filled in parts, and after saving and loading, if the original's do.
- The image weights of `fusion_attention` sum to at most 1 for each token.

The command `python -m tests.checks.families` writes this page, and `make check` compares it with the code.
""".replace("{tolerance}", f"{TOLERANCE:.0e}")


if __name__ == "__main__":
    write_table(sys.argv[1:] or list(FAMILIES))
