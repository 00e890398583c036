"""A base in a GGUF file, which transformers dequantises."""

import json
import warnings

import pytest
import torch

from tests.upstream.quantised import COARSELY, SIZES, logits, opened, with_images
from tests.valm.model.decoders import tiny_llama
from tests.valm.other_tokenizers import gpt2_like
from valm import load
from valm.errors import ValmError
from valm.model.adapter import save_adapter

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra compat)")
pytestmark = pytest.mark.slow


def write_gguf(model, file, kind="Q8_0"):
    """A Llama as llama.cpp's converter writes it: matrices quantised, those of queries and keys in its own order."""
    config, kind = model.config, getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        module = name.split(".")[-2]
        if module in heads:
            tensor = tensor.view(heads[module], 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        content, options = tensor.numpy(), {}
        if tensor.dim() == 2:
            content, options = gguf.quants.quantize(content, kind), {"raw_dtype": kind}
        writer.add_tensor(names.get_name(name, (".weight",)), content, **options)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def bases(tmp_path):
    """base.gguf and other.gguf in a folder, base.gguf in 4 bits beside it, and the same in float; and a tokenizer."""
    tokenizer = gpt2_like()
    made = [tiny_llama(seed, vocab_size=len(tokenizer), **SIZES) for seed in (0, 1)]
    (tmp_path / "bases").mkdir()
    write_gguf(made[0], tmp_path / "bases" / "base.gguf")
    write_gguf(made[1], tmp_path / "bases" / "other.gguf")
    write_gguf(made[0], tmp_path / "4-bits.gguf", "Q4_0")
    made[0].save_pretrained(tmp_path / "float")
    assert (logits_of_text(opened(tmp_path / "bases", gguf_file="base.gguf")) - logits_of_text(made[0])).std() < 0.5
    for folder in ("adapter", "of-float"):
        tokenizer.save_pretrained(tmp_path / folder)
    return tmp_path


@torch.no_grad()
def logits_of_text(model):
    return model(torch.arange(9)[None]).logits


def test_an_adapter_says_in_which_file_its_base_is(bases):
    model = with_images(opened(bases / "bases", gguf_file="base.gguf"))
    save_adapter(model, bases / "adapter")
    assert json.loads((bases / "adapter" / "_retrieval.json").read_text())["base"] == "../bases/base.gguf"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=COARSELY)
        loaded, _ = load(bases / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    save_adapter(loaded, bases / "adapter" / "again")
    assert json.loads((bases / "adapter/again/_retrieval.json").read_text())["base"] == "../../bases/base.gguf"
    (bases / "bases" / "base.gguf").unlink()
    with pytest.raises(ValmError, match=r"the base model .*base\.gguf of the adapter .* cannot be read: .*; put it b"):
        load(bases / "adapter")


def test_an_adapter_opens_on_copies_of_its_base_alone(bases):
    save_adapter(with_images(opened(bases / "bases", gguf_file="base.gguf")), bases / "adapter")
    save_adapter(with_images(opened(bases / "float")), bases / "of-float")
    for folder, base in (("adapter", "4-bits.gguf"), ("adapter", "float"), ("of-float", "4-bits.gguf")):
        with pytest.warns(UserWarning, match=COARSELY):
            load(bases / folder, base=bases / base)
    for folder in ("adapter", "of-float"):
        with pytest.raises(ValmError, match="belongs to another base model"):
            load(bases / folder, base=bases / "bases" / "other.gguf")
