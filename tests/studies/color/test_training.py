"""The arms that `valm train` does not have: what they read, what they predict, and which weights they end with."""

import numpy as np
import torch

from studies.color.training import GIVEN, KeepBest, _WithoutCaptions, images_before_color, with_captions
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
    batch = _WithoutCaptions(Collator(tokenizer, None))(
        [document, {"input_ids": np.array(ids), GIVEN: np.zeros(len(ids), bool)}]
    )
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


def test_the_best_weights_stay_and_patience_ends_the_training():
    model = torch.nn.Linear(1, 1)
    best = KeepBest(patience=2)
    control = type("Control", (), {"should_training_stop": False})()
    for step, loss in enumerate((3.0, 2.0, 2.5, 2.2)):
        assert not control.should_training_stop
        with torch.no_grad():
            model.weight.fill_(step)
        state = type("State", (), {"global_step": step})()
        best.on_evaluate(None, state, control, metrics={"eval_loss": loss}, model=model)
    assert control.should_training_stop
    best.restore(model)
    assert (model.weight.item(), best.step, best.loss) == (1, 1, 2.0)
