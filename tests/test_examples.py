"""examples/memory.py on a model of three layers and two short texts, and the code of its page."""

import random
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.tolerance import assert_agree
from tests.valm.cli.test_documents import blocks
from tests.valm.models import llama_of
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.delitem(sys.modules, "memory", raising=False)
    import memory

    sizes = {"SEGMENT": 16, "ENTRIES": 4, "POOL": 100, "LAYER": 1, "TOKENS": 160, "TRAINED": 128}
    for name, size in sizes.items():
        monkeypatch.setattr(memory, name, size)
    return memory


@pytest.fixture
def folder(tmp_path):
    draw = random.Random(0)
    words = [f"{a}{b}" for a in "bdfgk" for b in "aeiou"]
    for name in ("one", "other"):
        (tmp_path / f"{name}.txt").write_text(" ".join(draw.choice(words) for _ in range(400)), "utf-8")
    tokenizer = prune_tokenizer(clip_tokenizer(), [(tmp_path / "one.txt").read_text("utf-8")])
    tokenizer.save_pretrained(tmp_path / "model")
    llama_of(tokenizer).save_pretrained(tmp_path / "model")
    return tmp_path


def test_without_memory_it_is_the_model(memory, folder):
    """The layer that is replaced attends as before, and what it keeps are the keys before rotation."""
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    ids = torch.arange(5, 15)[None]
    expected = model(ids, output_hidden_states=True)
    own = model.model.layers[1].self_attn
    attention = model.model.layers[1].self_attn = memory.MemoryAttention(own)
    assert_agree(model(ids).logits, expected.logits)
    normed = model.model.layers[1].input_layernorm(expected.hidden_states[1])
    keys = own.k_proj(normed)[0].unflatten(-1, (2, 8)).transpose(0, 1)
    assert_agree(attention.seen[0], keys[:, memory.SINKS :])


def test_a_segment_reads_what_was_read_before_it(memory, folder):
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    attention = model.model.layers[1].self_attn = memory.MemoryAttention(model.model.layers[1].self_attn)
    ids = torch.arange(5, 21).repeat(6)[None]
    below = torch.zeros(1, 96, 32)
    number = torch.arange(6.0).repeat_interleave(16 - memory.SINKS)  # of the segment that each entry is of
    of_segments = number[None, None, :, None].expand(2, 2, -1, 8)
    for start in range(16, 96, 16):
        memory.losses(model, ids, below, start, of_segments)
        assert attention.memory[0, 0, :, 0].unique().tolist() == list(range(start // 16))
    memory.POOL = 30  # two segments and a half
    memory.losses(model, ids, below, 80, of_segments)
    assert attention.memory.shape[2] == 30 and attention.memory[0, 0, :, 0].unique().tolist() == [2, 3, 4]


def test_prints_perplexities_and_the_memory_matters(memory, folder, capsys):
    memory.main(str(folder / "model"), *(str(folder / f"{name}.txt") for name in ("one", "other")))
    line = r"(\w+)\.txt with (no|its|the other's) memory, (\w+): perplexity ([\d.]+)"
    found = {row[:3]: float(row[3]) for row in re.findall(line, capsys.readouterr().out)}
    assert len(found) == 12 and all(1 < perplexity < 1000 for perplexity in found.values())
    for text in ("one", "other"):
        assert found[text, "no", "untrained"] == found[text, "no", "trained"]  # the biases are of the memory
        assert len({perplexity for row, perplexity in found.items() if row[0] == text}) == 5


def test_the_code_of_the_page_runs():
    (code,) = blocks(ROOT / "docs" / "how-to" / "memory.md", "python")
    names = {}
    exec(compile(code, "memory.md", "exec"), names)
    assert names["out"].shape == (1, 4, 16, 32) and names["memory_k"].shape == (4, 516, 32)
