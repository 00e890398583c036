"""SmolLM2-135M reads two long texts with a memory (Memorizing Transformers, Wu et al. 2022).

In one layer each token also attends to the K best keys of all earlier segments, head by head. Text and memory share one
softmax.

python examples/memory.py smollm2 moby-dick.txt sotu.txt   # docs/how-to/memory.md has the texts
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from valm_kernels import ip_topk, visual_fusion_attn

SEGMENT, ENTRIES, POOL = 512, 32, 65_536  # tokens per segment; memory entries per token (K); most entries
SINKS = 4  # first tokens of a segment, which attract attention regardless of content: they would fill all K entries
LAYER, TOKENS, TRAINED = 24, 200_000, 100_000  # tokens of each text; tokens trained on, in both texts


class MemoryAttention(nn.Module):
    """The attention of a Llama layer with a memory of keys before rotation and values, (2, Hkv, N, D)."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own, self.memory = own, None
        kv_heads, heads = (projection.out_features // own.head_dim for projection in (own.k_proj, own.q_proj))
        shapes = {"k_bias": (kv_heads, own.head_dim), "v_bias": (kv_heads, own.head_dim), "logit_bias": (heads,)}
        self.biases = nn.ParameterDict({f"image_{name}": torch.zeros(shape) for name, shape in shapes.items()})

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object) -> tuple:
        states = [p(hidden_states) for p in (self.own.q_proj, self.own.k_proj, self.own.v_proj)]
        q, k, v = (x.unflatten(-1, (-1, self.own.head_dim)).transpose(1, 2) for x in states)
        self.seen = torch.stack([k[0], v[0]])[:, :, SINKS:].detach()  # (2, Hkv, T - SINKS, D)
        pools, options = (None, None), {}
        if self.memory is not None:
            pools = self.memory
            far = (x[:, -1:] for x in position_embeddings)  # all entries at the distance of one segment
            far_q = apply_rotary_pos_emb(q, q, *far)[0]
            queries = far_q[0].unflatten(0, (len(pools[0]), -1)).sum(1)  # (Hkv, T, D): a group of heads shares entries
            entries = ip_topk(queries, pools[0], min(ENTRIES, pools[0].shape[1])).indices
            options = {"image_q": far_q, "image_index": entries[None], **self.biases}  # (1, Hkv, T, K)
        rotated = apply_rotary_pos_emb(q, k, *position_embeddings)
        out = visual_fusion_attn(*rotated, v, *pools, scale=self.own.scaling, **options)
        return self.own.o_proj(out.transpose(1, 2).flatten(2)), None


def run(model: nn.Module, states: Tensor, layers: slice) -> Tensor:
    positions = model.model.rotary_emb(states, torch.arange(states.shape[1])[None])
    for layer in model.model.layers[layers]:
        states = layer(states, attention_mask=None, position_embeddings=positions)
    return states


def losses(model: nn.Module, ids: Tensor, below: Tensor, start: int, memory: Tensor | None) -> Tensor:
    """Losses of the segment that begins at `start`, without its first token.

    Args:
        below: states of all tokens below the layer with the memory, (1, T, C).
    """
    seen = start - start // SEGMENT * SINKS
    before = None if memory is None else memory[:, :, max(0, seen - POOL) : seen].contiguous()
    model.model.layers[LAYER].self_attn.memory = before
    top = model.model.norm(run(model, below[:, start : start + SEGMENT], slice(LAYER, None)))
    return nn.functional.cross_entropy(
        model.lm_head(top)[0, :-1], ids[0, start + 1 : start + SEGMENT], reduction="none"
    )


def main(folder: str, *paths: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    layers, texts, memories = model.eval().requires_grad_(False).model.layers, [], []
    attention = layers[LAYER].self_attn = MemoryAttention(layers[LAYER].self_attn)
    for path in paths:
        ids = tokenizer(Path(path).read_text("utf-8"), return_tensors="pt").input_ids[:, :TOKENS]
        below = [run(model, model.model.embed_tokens(part), slice(LAYER)) for part in ids.split(SEGMENT, 1)]
        seen = [(run(model, part, slice(LAYER, LAYER + 1)), attention.seen)[1] for part in below]
        texts.append((ids, torch.cat(below, 1)))
        memories.append(torch.cat(seen, 2))

    @torch.no_grad()
    def score(when: str) -> None:
        for name, given in {"no": (None, None), "its": memories, "the other's": memories[::-1]}.items():
            for path, text, memory in zip(paths, texts, given, strict=True):
                length = text[0].shape[1]
                found = [losses(model, *text, at, memory) for at in range(length // 2, length - 1, SEGMENT)]
                print(f"{path} with {name} memory, {when}: perplexity {torch.cat(found).mean().exp():.3f}", flush=True)

    score("untrained")
    optimizer = torch.optim.AdamW(attention.biases.parameters(), lr=0.02)
    for start in range(SEGMENT, TRAINED // 2, SEGMENT):
        for text, memory in zip(texts, memories, strict=True):
            optimizer.zero_grad()
            losses(model, *text, start, memory).mean().backward()
            optimizer.step()
    score("trained")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of SmolLM2 in Hugging Face's format")
    parser.add_argument("text", nargs=2, help="a long text in UTF-8")
    arguments = parser.parse_args()
    for path, there in ((arguments.model, Path.is_dir), *((text, Path.is_file) for text in arguments.text)):
        if not there(Path(path)):
            parser.error(f"there is no {path}")
    main(arguments.model, *arguments.text)
