"""Small models with a real knowledge base."""

import pytest
import torch

from valm.model.config import ValmConfig
from valm.model.gpt2 import VaLMForCausalLM
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever, Retriever

NUM_IMAGES = 3


@pytest.fixture(scope="session")
def kb(make_kb):
    return make_kb(8)


@pytest.fixture(scope="session")
def make_model(tokenizer, clip, kb):
    """A VaLM whose images matter, with its retriever; num_images=0 is GPT-2*."""

    def make(num_images=NUM_IMAGES, **arguments):
        torch.manual_seed(1)
        sizes = {"n_layer": 3, "n_embd": 32, "n_head": 4, "image_dim": clip.embed_dim}
        model = VaLMForCausalLM(
            ValmConfig(
                **({"n_positions": 24} | sizes | arguments),
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                num_images=num_images,
            )
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        if num_images:
            encoder, blind = ContextEncoder(clip), model.fusion_options.blind
            model.set_retriever(BlindRetriever(encoder) if blind else Retriever(encoder, kb, num_images))
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()
