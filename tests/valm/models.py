"""Tiny models, batches, and a retriever whose images depend on the text alone, for the tests of valm."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from valm.model.config import FusionOptions, ValmConfig
from valm.model.gpt2 import VaLMForCausalLM
from valm.retrieval.retriever import Retrieved

BOS, EOS, VOCAB = 62, 63, 64


def tiny_config(**arguments) -> ValmConfig:
    defaults = {"n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4, "image_dim": 24, "num_images": 3}
    tokens = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    return ValmConfig(**(defaults | tokens | arguments))


def tiny_model(seed: int = 0, **arguments) -> VaLMForCausalLM:
    """A tiny model in eval mode, with weights and biases large enough that everything matters."""
    torch.manual_seed(seed)
    model = VaLMForCausalLM(tiny_config(**arguments)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 or "bias" in name else 0.1))
    return model


def model_of(tokenizer: PreTrainedTokenizerFast, **arguments) -> VaLMForCausalLM:
    """A `tiny_model` for the tokens of `tokenizer`."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tiny_model(vocab_size=len(tokenizer), **special, **arguments)


def model_for(retriever, **arguments) -> VaLMForCausalLM:
    """A `model_of` the retriever's tokenizer, for its number and width of images."""
    return model_of(retriever.encoder.tokenizer, image_dim=retriever.dim, num_images=retriever.k, **arguments)


def llama_of(tokenizer: PreTrainedTokenizerFast, **more) -> LlamaForCausalLM:
    """A decoder of transformers with three layers, for the tokens of `tokenizer`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **more))


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """(batch, length) ordinary tokens, SOT first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, BOS, (batch, length), generator=generator)
    ids[:, 0] = BOS
    return ids


def random_images(config: ValmConfig, batch: int, length: int, pool: int = 10, seed: int = 0):
    """image_pool (pool, E) and image_index (batch, length, K), some slots empty."""
    generator = torch.Generator().manual_seed(seed)
    options = FusionOptions(**config.fusion)
    index = torch.randint(-1, pool, (batch, length, options.num_images), generator=generator)
    return torch.randn(pool, options.image_dim, generator=generator), index


def again_from_the_start(model, ids: torch.Tensor, steps: int = 8) -> torch.Tensor:
    """`ids` and the likeliest tokens after them; the model reads the whole text again for each."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


class HashRetriever:
    """Finds images that depend on the last two tokens, in one call or token by token."""

    k, dim, size = 3, 24, 50

    def __init__(self, bos=None):
        """bos: begins a document; tokens do not see beyond it."""
        self.bos = bos
        self.pool = torch.randn(self.size, self.dim, generator=torch.Generator().manual_seed(1))

    def _find(self, ids, previous, mask):  # (B, t), (B,)
        before = torch.cat([previous[:, None], ids[:, :-1]], 1)
        if self.bos is not None:
            before = before.masked_fill(ids == self.bos, 0)
        if mask is not None:  # padding is no text
            before = before * torch.cat([(previous > 0).long()[:, None], mask[:, :-1]], 1)
        index = ((ids * 7 + before * 3)[..., None] + torch.arange(self.k)) % self.size
        if mask is not None:
            index = index.masked_fill(mask[..., None] == 0, -1)
        scores = torch.cos(index.float()).masked_fill(index < 0, -torch.inf)
        return Retrieved(self.pool, index, torch.arange(self.size), scores)

    def __call__(self, ids, attention_mask=None):
        return self._find(ids, torch.zeros_like(ids[:, 0]), attention_mask)

    def start(self, batch):
        return HashState(torch.zeros(batch, dtype=torch.int64))

    def step(self, ids, state, attention_mask=None):
        found = self._find(ids, state.previous, attention_mask)
        state.previous = ids[:, -1]
        return found


class WholeTextRetriever(HashRetriever):
    """Finds images that depend on all of a row's text so far; reads only whole rows."""

    def _find(self, ids, previous, mask):
        text = ids if mask is None else ids * mask
        return super()._find(text.cumsum(1), previous, mask)


class HashState:
    def __init__(self, previous):
        self.previous = previous

    def reorder(self, beam_idx):
        self.previous = self.previous[beam_idx]
