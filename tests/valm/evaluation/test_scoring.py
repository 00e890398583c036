import pytest
import torch

from tests.tolerance import assert_agree
from tests.valm.models import tiny_model
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.errors import ValmError
from valm.evaluation.scoring import answer_log_probs, answer_tokens

TOKENIZER = prune_tokenizer(clip_tokenizer(), ["the color of the sea is blue", "red"])


def a_model(**arguments):
    return tiny_model(vocab_size=len(TOKENIZER), bos_token_id=TOKENIZER.bos_token_id, **({"num_images": 0} | arguments))


@pytest.mark.parametrize("bos", [True, False])
def test_scores_are_those_of_reading_each_text_alone(bos):
    model = a_model()
    prompts = ["the sea is", "the color of the sea is", "red", "the"]
    answers = ["blue", "red", "bluered", "blur", "blued"]  # one piece and several, some with a common beginning
    scores = answer_log_probs(model, TOKENIZER, prompts, answers, bos=bos, batch_size=2)
    lengths = [len(tokenized) for tokenized in answer_tokens(TOKENIZER, answers)]
    assert lengths[:2] == [1, 1] and min(lengths[2:]) > 1
    for i, prompt in enumerate(prompts):
        for j, answer in enumerate(answers):
            ids = TOKENIZER(f"{prompt} {answer}", add_special_tokens=bos, return_tensors="pt")["input_ids"]
            log_probs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
            assert_agree(scores[i, j], log_probs[-lengths[j] :].sum())


def test_empty_texts_and_a_model_without_its_pictures_are_refused():
    with pytest.raises(ValmError, match="answer '' has no tokens"):
        answer_log_probs(a_model(), TOKENIZER, ["a"], ["red", ""])
    with pytest.raises(ValmError, match="prompt '' has no tokens"):
        answer_log_probs(a_model(), TOKENIZER, [""], ["red"], bos=False)
    with pytest.raises(ValmError, match="set a retriever first"):
        answer_log_probs(a_model(num_images=3), TOKENIZER, ["a"], ["red"])


def test_of_a_long_prompt_the_last_tokens_are_read():
    model = a_model()
    long = " ".join(["the sea is blue"] * 20)
    answers = ["red", "blur"]
    room = model.config.n_positions - max(map(len, answer_tokens(TOKENIZER, answers))) + 1 - 1
    ids = TOKENIZER(long, add_special_tokens=False)["input_ids"]
    assert len(ids) > room
    log_probs = model(torch.tensor([[TOKENIZER.bos_token_id, *ids[-room:]]])).logits[0, -1].log_softmax(-1)
    scores = answer_log_probs(model, TOKENIZER, [long], answers)
    assert_agree(scores[0, 0], log_probs[answer_tokens(TOKENIZER, ["red"])[0][0]])


def test_the_logits_of_a_batch_are_one_product():
    model, seen = a_model(), []
    prompts = ["the sea is", "the sea of", "the color is"]

    def see(layer, inputs, logits):
        seen.append((inputs[0].shape[:2], inputs[0].is_contiguous()))

    model.get_output_embeddings().register_forward_hook(see)
    answer_log_probs(model, TOKENIZER, prompts, ["red"])
    assert seen == [((3, 1), True)]
    model(TOKENIZER(prompts, return_tensors="pt")["input_ids"], logits_to_keep=1)  # the copies have ended
    assert seen[1:] == [((3, 1), False)]
    model.get_output_embeddings = lambda: None  # of a class without
    answer_log_probs(model, TOKENIZER, prompts, ["red"])
    assert seen[2:] == [((3, 1), False)]
