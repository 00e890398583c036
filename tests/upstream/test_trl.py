"""TRL's SFTTrainer on an augmented decoder that has a retriever."""

import pytest

from tests.valm.model.decoders import augmented, tiny_llama
from tests.valm.models import HashRetriever
from tests.valm.other_tokenizers import LINES, gpt2_like
from valm.model.augment import fusion_module

trl = pytest.importorskip("trl", reason="needs the package trl (extra compat)")
datasets = pytest.importorskip("datasets", reason="needs the package datasets (extra huggingface)")
pytestmark = pytest.mark.slow


class CountingRetriever(HashRetriever):
    asked = 0

    def __call__(self, ids, attention_mask=None):
        self.asked += 1
        return super().__call__(ids, attention_mask)


def sft(folder, unfreeze):
    """A trainer for two steps, its model, and the tensors of the fusion before."""
    tokenizer = gpt2_like()
    model = augmented(lambda seed: tiny_llama(seed, vocab_size=len(tokenizer)), unfreeze=unfreeze)
    model.set_retriever(CountingRetriever())
    texts = datasets.Dataset.from_dict({"text": LINES})
    options = trl.SFTConfig(
        str(folder), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True
    )
    trainer = trl.SFTTrainer(model, options, train_dataset=texts, eval_dataset=texts, processing_class=tokenizer)
    before = {name: tensor.detach().clone() for name, tensor in fusion_module(model).named_parameters()}
    return trainer, model, before


@pytest.mark.parametrize("unfreeze", ["", "block"])
def test_training_asks_the_retriever_and_moves_the_fusion(tmp_path, unfreeze):
    trainer, model, before = sft(tmp_path, unfreeze)
    trainer.train()
    after = dict(fusion_module(model).named_parameters())
    assert not [name for name, tensor in before.items() if after[name].equal(tensor)]
    assert model.retriever.asked >= 2


def test_evaluation_asks_the_retriever(tmp_path):
    trainer, model, _ = sft(tmp_path, "block")
    trainer.evaluate()
    assert model.retriever.asked > 0
