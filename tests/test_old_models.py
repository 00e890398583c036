"""Models of an earlier version open in this one with the same logits, and its trainings go on to the same losses.

`fixtures/0.1.0/make_models.py` wrote them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PrinterCallback

import valm
from valm.clip.tokenizer import load_tokenizer
from valm.errors import ValmError
from valm.model.adapter import load_adapter
from valm.model.augment import augment
from valm.model.config import ValmConfig
from valm.model.gpt2 import VaLMForCausalLM
from valm.training.train import trainer, training_arguments

STORES = Path(__file__).parent / "fixtures" / "0.1.0"
# Saved by save_pretrained, without a tokenizer.
WHOLE = [
    *("score_scale", "embed_dim", "layer_norm_epsilon", "width", "inverse_layer_idx", "first_layer", "blind"),
    "augmented",
]
# Of the largest value.
TOLERANCE = 2e-6


@pytest.fixture
def stores(tmp_path) -> Path:
    """A copy, so that no test changes what is committed."""
    return shutil.copytree(STORES, tmp_path / "0.1.0")


def assert_same_logits(model, folder: Path) -> None:
    batch = load_file(folder / "expected.safetensors")
    expected = batch.pop("logits")
    with torch.no_grad():
        found = model(**batch).logits
    present = batch["attention_mask"].bool()
    torch.testing.assert_close(found[present], expected[present], rtol=0, atol=TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_opens(stores, name):
    folder = stores / "models" / name
    assert_same_logits(AutoModelForCausalLM.from_pretrained(folder), folder)


def test_a_whole_model_that_lacks_a_file_is_refused(stores):
    """transformers would draw its weights at random."""
    folder = stores / "models" / "width"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = {name: names[number % 2] for number, name in enumerate(sorted(state))}
    for file in names:
        save_file({name: state[name] for name in state if parts[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": parts}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_logits(AutoModelForCausalLM.from_pretrained(folder), folder)
    mark = next(file for name, file in parts.items() if name.endswith("image_logit_bias"))
    (folder / next(file for file in names if file != mark)).unlink()
    with pytest.raises(ValmError, match=r"names model-0000\d-of-00002\.safetensors, which is not there"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_is_saved_again(stores, tmp_path, name):
    folder = stores / "models" / name
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), folder)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "augmented"])
def test_valm_opens_by_its_class(stores, name):
    folder = stores / "models" / name
    assert_same_logits(VaLMForCausalLM.from_pretrained(folder), folder)


@pytest.mark.parametrize("name", ["adapter", "block_adapter"])
def test_an_adapter_opens(stores, name):
    folder = stores / "models" / name
    base = AutoModelForCausalLM.from_pretrained(stores / "models" / "base")
    assert_same_logits(load_adapter(base, folder).eval(), folder)


def test_a_query_head_predicts_the_same(stores):
    pytest.importorskip("faiss", reason="the knowledge base has a faiss index: install valm[faiss]")
    folder = stores / "models" / "query_head"
    model, tokenizer = valm.load(folder)
    expected = load_file(folder / "expected.safetensors")
    ids = tokenizer("the yellow bus is not blue", return_tensors="pt").input_ids
    assert ids.equal(expected["input_ids"])
    images = model.retriever.retrieve(expected["queries"])._asdict()  # with those of the first token, as then
    images = {name: images[name] for name in ("image_pool", "image_index")}
    with torch.no_grad():
        found = {"queries": model.self_queries(ids), "logits": model(ids, **images).logits}
    found["queries"][:, 0] = expected["queries"][:, 0]
    for name, tensor in found.items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=TOLERANCE * largest)


class Vectors:
    """What the collator needs of a knowledge base."""

    def __init__(self, file: Path):
        self.vectors = np.load(file, allow_pickle=False)
        self.dim = self.vectors.shape[1]

    def gather(self, ids):
        return self.vectors[ids]


def resumed(run: Path, model_of, row_length: int | None):
    """The training in `run`, resumed to its end, and the losses that it had there."""
    expected = json.loads((run / "expected.json").read_text(encoding="utf-8"))
    checkpoint = run / f"checkpoint-{expected['saved_at']}"
    tokenizer = load_tokenizer(checkpoint)
    documents = json.loads((run.parent / "documents.json").read_text(encoding="utf-8"))
    for document in documents:
        images = np.array(document["image_ids"])
        document["image_ids"] = np.where(images == 2**32 - 1, -1, images)  # as `CorpusRetrieval` reads them
    vectors = Vectors(run.parent / "vectors.npy")
    torch.manual_seed(1)  # of weights that the checkpoint replaces
    fields = {"max_steps": expected["steps"], "per_device_train_batch_size": 3, "learning_rate": 3e-3}
    fields |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "report_to": "none"}
    training = trainer(
        model_of(checkpoint, tokenizer, vectors),
        documents,
        vectors,
        tokenizer=tokenizer,
        arguments=training_arguments(run, **fields),
        row_length=row_length,
    )
    training.remove_callback(PrinterCallback)
    training.train(resume_from_checkpoint=True)
    return training.losses(), expected["losses"]


def test_a_training_of_an_augmented_decoder_goes_on_to_the_same_losses(stores):
    def model_of(checkpoint, tokenizer, vectors):
        sizes = {"n_positions": 32, "n_embd": 8, "n_layer": 2, "n_head": 1, "n_inner": 16}
        base = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
        return augment(base, vectors.dim, 2, logit_bias=0.0, unfreeze="block")

    losses, expected = resumed(stores / "models" / "augmented_training", model_of, None)
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)


def test_a_training_of_valm_says_that_it_cannot_go_on(stores):
    """Its biases of keys and values trained apart from those of its images."""

    def model_of(checkpoint, tokenizer, vectors):
        return VaLMForCausalLM(ValmConfig.from_pretrained(checkpoint))

    with pytest.raises(ValmError, match=r"the checkpoint is of an earlier version, .*finish it by that version"):
        resumed(stores / "models" / "training", model_of, 24)
    model = AutoModelForCausalLM.from_pretrained(stores / "models" / "training" / "checkpoint-3")
    assert type(model) is VaLMForCausalLM and model.config._name_or_path.endswith("checkpoint-3")


def test_an_option_that_the_earlier_version_ignored_is_refused(stores):
    file = stores / "models" / "width" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scale_attn_weights": False}))
    with pytest.raises(ValmError, match="scale_attn_weights must be True"):
        VaLMForCausalLM.from_pretrained(file.parent)


def test_an_earlier_model_takes_the_arguments_of_from_pretrained(stores):
    folder = stores / "models" / "width"
    arguments = {"resid_pdrop": 0.0, "dtype": torch.bfloat16, "attn_implementation": "eager", "state_dict": None}
    for source, more in ((folder, {}), (folder.parent, {"subfolder": "width"})):
        model = VaLMForCausalLM.from_pretrained(source, **arguments, **more)
        assert model.config.resid_pdrop == 0 and model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager" and not model.training


def test_a_class_of_transformers_finds_no_weights(stores, tmp_path):
    VaLMForCausalLM.from_pretrained(stores / "models" / "width").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this model takes images"):
        GPT2LMHeadModel.from_pretrained(tmp_path, config=ValmConfig.from_pretrained(tmp_path))
