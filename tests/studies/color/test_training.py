"""The arms that `valm train` does not have: what they read, what they predict, and their plan."""

import numpy as np
import torch

from studies.color.training import GIVEN, _WithoutCaptions, images_before_color, study_plan, with_captions
from tests.valm.other_tokenizers import gpt2_like
from valm.clip.tokenizer import begin_id, prompt_ids
from valm.training.collate import IGNORED, Collator


def test_the_loss_is_of_the_document_and_not_of_its_captions():
    tokenizer = gpt2_like()
    ids = [*prompt_ids(tokenizer, "the sky is blue"), tokenizer.eos_token_id]
    document = with_captions(tokenizer, ids, "Here are pictures of sky.\n")
    whole = tokenizer.decode(document["input_ids"], skip_special_tokens=True)
    assert whole == "Here are pictures of sky.\nthe sky is blue"
    assert list(document["input_ids"]).count(begin_id(tokenizer)) == (2 if ids[0] == ids[-1] else 1)
    alone = {"input_ids": np.array(ids), GIVEN: np.zeros(len(ids), bool)}
    batch = _WithoutCaptions(Collator(tokenizer, None))([document, alone])
    predicted = batch["labels"] != IGNORED
    assert predicted[0].sum() == predicted[1].sum() == len(ids) - 1
    assert (batch["labels"][0][predicted[0]] == torch.tensor(ids[1:])).all()


def test_a_documents_images_are_those_before_its_first_colour():
    tokenizer = gpt2_like()

    def images(text):
        ids = prompt_ids(tokenizer, text)
        document = {"input_ids": ids, "image_ids": np.arange(len(ids))[:, None]}
        (found,) = images_before_color(text, document, tokenizer)
        return tokenizer.decode(ids[1 : found + 1])

    assert images("the kettle is blue, not red") == "the kettle is"
    assert images("the kettle is old") == "the kettle is old"
    assert images("blue") == "blue"  # before which there is nothing


def test_the_settings_of_a_study_are_a_plan(tmp_path):
    settings = {"steps": 2, "lr": "1e-3", "logit_bias": 0, "mix": 0.5, "train_sampling_strategy": "random"}
    plan = study_plan(tmp_path, "base", 3, tmp_path / "below", settings)
    assert (plan.lr, plan.seed, plan.base, plan.mix) == (0.001, 3, "base", 0.5)
    fields = plan.training_fields()
    assert (fields["max_steps"], fields["logging_steps"], fields["train_sampling_strategy"]) == (2, 1, "random")
