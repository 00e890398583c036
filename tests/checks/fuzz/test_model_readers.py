"""As test_store_readers.py, for what is read of models: checkpoints, tokenizers, adapters, trainings, CLIPs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.checks.fuzz.mutations import check_mutants, files_of, fuzzed
from tests.valm.model.decoders import IMAGE_DIM, IMAGES, tiny_llama
from tests.valm.training.documents import TOKENIZER, new_trainer
from valm import load
from valm.clip.clip import Clip
from valm.clip.tokenizer import load_tokenizer
from valm.model.adapter import adapter_base, load_adapter, save_adapter
from valm.model.augment import augment
from valm.training.cache_below import cache_below
from valm.training.clip import new_clip

pytestmark = pytest.mark.slow


@fuzzed(100)
@pytest.mark.filterwarnings("ignore:the model's")
def test_checkpoint(stores, outside, data):
    folder = stores / data.draw(st.sampled_from(["gpt2", "valm", "blind"]))
    check_mutants(data, files_of(folder), outside, lambda: load(folder), ...)


@fuzzed(100)
def test_tokenizer_of_a_language_model(stores, outside, data):
    files = [stores / "gpt2" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    check_mutants(data, files, outside, lambda: load_tokenizer(stores / "gpt2"), ...)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    tiny_llama().save_pretrained(folder / "base")
    model = augment(AutoModelForCausalLM.from_pretrained(folder / "base"), IMAGE_DIM, IMAGES)
    return save_adapter(model, folder / "adapter")


@fuzzed(200)
def test_adapter(adapter, outside, data):
    def read() -> Any:
        base = AutoModelForCausalLM.from_pretrained(adapter_base(adapter))
        return load_adapter(base, adapter)(torch.arange(5)[None]).logits.shape

    check_mutants(data, files_of(adapter), outside, read, ...)


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Path:
    """A training with a checkpoint of its second step."""
    folder = tmp_path_factory.mktemp("training")
    new_trainer(folder, max_steps=2, save_strategy="steps", save_steps=2).train()
    return folder


@fuzzed(50)
def test_checkpoint_of_a_training(training, outside, data):
    checkpoint = training / "checkpoint-2"

    def read() -> Any:
        made = new_trainer(training, max_steps=3)
        made.train(resume_from_checkpoint=str(checkpoint))
        return made.losses(), [weight.tolist() for weight in made.model.parameters()]

    check_mutants(data, files_of(checkpoint), outside, read, ...)


@fuzzed(100)
def test_cached_states(tmp_path_factory, outside, data):
    folder = tmp_path_factory.mktemp("states")
    model = augment(tiny_llama(), IMAGE_DIM, IMAGES)
    lines = [{"input_ids": list(range(5, 15))}, {"input_ids": list(range(20, 40))}]

    def read() -> Any:
        return [document["fusion_input"].tobytes() for document in cache_below(model, lines, folder, progress=False)]

    read()
    check_mutants(data, files_of(folder), outside, read, ...)


@fuzzed(60)
def test_clip(stores, outside, data):
    check_mutants(data, files_of(stores / "clip"), outside, lambda: Clip.load(stores / "clip").weights_hash, ...)


@fuzzed(200)
def test_clip_configurations(tmp_path_factory, outside, data):
    file = tmp_path_factory.mktemp("clip") / "clip.json"
    towers = {"vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}}
    towers["text_cfg"] = {"context_length": 20, "width": 32, "heads": 2, "layers": 2}
    file.write_text(json.dumps({"model_cfg": {"embed_dim": 24, **towers}, "preprocess_cfg": {"mean": [0.5] * 3}}))
    check_mutants(data, [file], outside, lambda: new_clip(file, tokenizer=TOKENIZER), ...)
