"""TRL's trainers on an augmented decoder that has a retriever, and the page that shows them."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import valm
from tests.valm import stores
from tests.valm.model.decoders import augmented, tiny_llama
from tests.valm.models import HashRetriever
from tests.valm.other_tokenizers import LINES, gpt2_like
from valm.clip.clip import Clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.model.augment import fusion_module

trl = pytest.importorskip("trl", reason="needs the package trl (extra compat)")
datasets = pytest.importorskip("datasets", reason="needs the package datasets (extra huggingface)")
pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "trl.md"


class CountingRetriever(HashRetriever):
    asked = 0

    def __call__(self, ids, attention_mask=None):
        self.asked += 1
        return super().__call__(ids, attention_mask)


def sft(folder):
    """A trainer for two steps, its model, and the tensors of the fusion before."""
    tokenizer = gpt2_like()
    model = augmented(lambda seed: tiny_llama(seed, vocab_size=len(tokenizer)))
    model.set_retriever(CountingRetriever())
    texts = datasets.Dataset.from_dict({"text": LINES})
    options = trl.SFTConfig(
        str(folder), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True
    )
    trainer = trl.SFTTrainer(model, options, train_dataset=texts, eval_dataset=texts, processing_class=tokenizer)
    before = {name: tensor.detach().clone() for name, tensor in fusion_module(model).named_parameters()}
    return trainer, model, before


def test_training_asks_the_retriever_and_moves_the_fusion(tmp_path):
    trainer, model, before = sft(tmp_path)
    trainer.train()
    after = dict(fusion_module(model).named_parameters())
    assert not [name for name, tensor in before.items() if after[name].equal(tensor)]
    assert model.retriever.asked >= 2


def test_evaluation_asks_the_retriever(tmp_path):
    trainer, model, _ = sft(tmp_path)
    trainer.evaluate()
    assert model.retriever.asked > 0


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What docs/how-to/trl.md defines, run where `path/to/llama` and `kb` are small ones."""
    folder = tmp_path_factory.mktemp("trl")
    tokenizer = gpt2_like()
    stores.make_pictures(folder / "pictures")
    Clip.create(stores.CLIP, prune_tokenizer(clip_tokenizer(), stores.CORPUS.splitlines()), name="tiny").save(
        folder / "clip"
    )
    stores.build_kb(folder, folder / "kb")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "path/to/llama")
    tokenizer.save_pretrained(folder / "path/to/llama")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    run: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, str(PAGE), "exec"), run)
        yield folder, run


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def dpo(model, folder, page, **more):
    options = trl.DPOConfig(str(folder / "dpo"), max_steps=1, logging_steps=1, **page["on_cpu"])
    return trl.DPOTrainer(model, args=options, train_dataset=page["pairs"], processing_class=page["tokenizer"], **more)


def test_the_page_trains_and_saves_a_model_with_images(page):
    folder, run = page
    trained, _ = valm.load(folder / "trained")
    assert trained.fusion_options.num_images == 4 and trained.retriever is not None
    assert run["trainer"].ref_model.fusion_options == trained.fusion_options  # of GRPO, with beta


def test_the_reference_of_a_loaded_model_sees_its_images(page):
    folder, run = page
    model, _ = valm.load(folder / "whole")
    with torch.no_grad():  # open heads: a reference without images would have other logits
        fusion_module(model).logit_bias_delta.fill_(10)
    valm.save_checkpoint(model, run["tokenizer"], folder / "open")
    trainer = dpo(valm.load(folder / "open")[0], folder, run)
    assert trainer.ref_model.retriever is not None
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)  # the digits that a log shows


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, model: valm.load(folder / "whole", kb=folder / "kb")[0],
        lambda folder, model: model.set_num_images(1) or model,
        lambda folder, model: model.set_min_score(0.99) or model,
        lambda folder, model: model.set_retriever(None) or model,
    ],
    ids=["kb", "K", "min_score", "retriever"],
)
def test_a_model_that_sees_other_images_than_its_folder_notes_needs_a_reference(page, change):
    folder, run = page
    model = change(folder, valm.load(folder / "whole")[0])
    with pytest.raises(OSError, match="give TRL ref_model= and processing_class="):
        dpo(model, folder, run)
    assert "give TRL" not in str(model.config.to_dict())  # which PEFT's card shows


def test_a_model_in_memory_has_no_reference_without_a_word(page):
    folder, run = page
    model = augmented(lambda seed: AutoModelForCausalLM.from_pretrained(folder / "path/to/llama"))
    with pytest.raises(OSError, match="give TRL ref_model= and processing_class="):
        dpo(model, folder, run)
    model.set_retriever(HashRetriever())
    other = augmented(lambda seed: AutoModelForCausalLM.from_pretrained(folder / "path/to/llama"))
    other.set_retriever(HashRetriever())
    trainer = dpo(model, folder, run, ref_model=other)
    trainer.train()
    assert len(losses(trainer)) == 1
