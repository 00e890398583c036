import numpy as np
import pytest
import torch

from studies.color.questions import validation_questions
from studies.color.scoring import (
    Evaluation,
    answers_of,
    counted,
    measures,
    nats_of,
    question_rows,
    read_from_fusion,
    score_arm,
    text_rows,
)
from tests.checks.families import open_images
from tests.tolerance import assert_agree
from tests.valm.models import llama_of
from tests.valm.other_tokenizers import gpt2_like
from valm.evaluation.metrics import log_prior
from valm.evaluation.scorers import CausalScorer
from valm.evaluation.sets import Item
from valm.model.augment import augment
from valm.retrieval.retriever import NoImages, Retrieved

THINGS = [Item("banana", "yellow", "a"), Item("apple", "red", "an"), Item("sky", "blue", "the")]
TEXTS = ["the color of the sky is blue", "apples and bananas"]


class EveryImage:
    """A retriever of the same two images for every token."""

    k, dim = 2, 24
    pool = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))

    def __call__(self, ids, attention_mask=None):
        index = torch.arange(2).expand(*ids.shape, 2)
        return Retrieved(self.pool, index, torch.full((2,), -1), torch.zeros(index.shape))


@pytest.fixture
def scorer():
    tokenizer = gpt2_like()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = llama_of(tokenizer, max_position_embeddings=128, **ids).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    augment(model, 24, 2)
    open_images(model)
    model.set_retriever(EveryImage())
    return CausalScorer(model, tokenizer, "tiny")


def test_known_rows_begin_at_the_fusion_layer_and_give_the_same_scores(scorer, tmp_path):
    asked = validation_questions(THINGS)
    rows = question_rows(scorer.tokenizer, asked) + text_rows(scorer.tokenizer, TEXTS)
    expected = scorer.answers(asked, None)[0], nats_of(scorer, [*TEXTS, "a yellow bus"])
    read_from_fusion(scorer.model, rows + rows, tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 1
    below = []
    scorer.model.model.layers[0].self_attn.register_forward_hook(lambda *_: below.append(1))
    assert_agree(scorer.answers(asked, None)[0], expected[0])  # other batches
    texts = nats_of(scorer, TEXTS)
    asked_alone = len(below)  # answers without a prompt are no known rows
    assert_agree(texts, expected[1][:2])
    assert len(below) == asked_alone
    assert nats_of(scorer, ["a yellow bus"]) == expected[1][2:]
    assert len(below) == asked_alone + 1


def test_answers_are_the_likeliest_candidates(scorer):
    asked = validation_questions(THINGS)
    scores = scorer.answers(asked, None)[0]
    found = answers_of(scorer, asked)
    assert found["raw"].tolist() == scores.argmax(-1).tolist()
    assert found["calibrated"].shape == found["raw"].shape
    assert (found["calibrated"] != found["raw"]).any() and set(found) == {"raw", "calibrated"}
    pictured = np.array([True, False, False])
    apart = answers_of(scorer, asked, pictured)["calibrated apart"]
    for some in (pictured, ~pictured):
        alone = scores[some].double().numpy()
        assert (apart[some] == (alone - log_prior(alone)).argmax(-1)).all()


def test_hits_are_right_answers_and_answers_with_the_colour_that_the_images_have():
    asked = validation_questions(THINGS)
    colors = [dict.fromkeys(("retrieved", "exchanged", "other-colors")) for _ in THINGS]
    colors[1] = {"retrieved": "red", "exchanged": "blue", "other-colors": "red"}
    measured = measures(asked, colors)
    # the other colour is the same one
    assert set(measured) == {"raw", "calibrated", "calibrated apart", "shown", "exchanged"}
    answers = np.array(asked.right)
    answers[1, :2] = asked.candidates.index("blue")
    row = {"arm": "valm", "images": "retrieved", "of": "validation", "measure": "raw", "answers": answers.tolist()}
    prompts = len(asked.prompts)
    raw, shown, exchanged = counted(row, measured)
    assert (raw["measure"], raw["hits"]) == ("raw", [prompts, prompts - 2, prompts])
    assert (shown["measure"], shown["hits"]) == ("shown", [prompts - 2])
    assert (exchanged["measure"], exchanged["hits"]) == ("exchanged", [2])
    assert [one["measure"] for one in counted(row | {"images": "random"}, measured)] == ["raw", "shown"]
    assert [one["measure"] for one in counted(row | {"arm": "control"}, measured)] == ["raw", "shown"]
    assert [one["measure"] for one in counted(row | {"arm": "valm-60"}, measured)] == ["raw", "shown"]
    assert [one["measure"] for one in counted(row | {"measure": "calibrated"}, measured)] == ["calibrated"]


def test_an_arm_is_asked_what_each_test_asks(scorer):
    asked = {"validation": validation_questions(THINGS)}
    said = []
    tests = [
        Evaluation("retrieved", asked | {"large": validation_questions(THINGS * 2)}, {"prose": TEXTS}, EveryImage()),
        Evaluation("off", asked, {"prose": TEXTS}, NoImages(2, 24)),
    ]
    rows = score_arm("valm", scorer, tests, said.append)
    asked_for = [("retrieved", of) for of in ("validation", "large", "prose")]
    asked_for += [("off", of) for of in ("validation", "prose")]
    assert [(row["images"], row["of"]) for row in rows if row["measure"] != "calibrated"] == asked_for
    retrieved, off = (row["hits"] for row in rows if row["measure"] == "nats")
    assert retrieved != off
    assert said[0] == "valm, retrieved, validation"
