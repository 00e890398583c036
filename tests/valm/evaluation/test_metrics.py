import numpy as np
import pytest

from valm.evaluation.metrics import choice_metrics, document_metrics, vote_of_prompts
from valm.evaluation.questions import FAIR, PUBLISHED, Documents, Questions


def questions(right, candidates, protocol=FAIR) -> Questions:
    items = tuple(map(str, range(len(right))))
    prompts = tuple(map(str, range(len(right[0]))))
    texts = tuple(tuple("" for _ in row) for row in right)
    return Questions("memory_color", protocol, items, prompts, texts, candidates, right)


def constant(asked: Questions, answer: int, seeds: int = 1) -> np.ndarray:
    scores = np.zeros((seeds, len(asked.items), len(asked.prompts), len(asked.candidates)))
    scores[..., answer] = 1
    return scores


def test_constant_yes_is_perfect_as_published_and_half_right_in_the_fair_protocol():
    published = questions(((0, 0),) * 5, ("yes", "no"), PUBLISHED)
    assert choice_metrics(published, constant(published, 0), None)["accuracy"]["value"] == 1
    fair = questions(((0, 1) * 3,) * 5, ("yes", "no"))
    found = choice_metrics(fair, constant(fair, 0), np.zeros((1, 2)))
    assert found["accuracy"]["value"] == found["balanced"] == found["baselines"]["majority"] == 0.5
    assert (found["both_orders"]["value"], found["said_yes"]) == (0, 1)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_majority_model_scores_the_stated_majority(seeds):
    asked = questions(((1, 1), (1, 1), (0, 0), (1, 1), (2, 2)), ("a", "b", "c"))
    found = choice_metrics(asked, constant(asked, 1, seeds), None)
    assert found["baselines"]["majority_answer"] == "b"
    assert found["accuracy"]["value"] == found["vote"]["value"] == found["baselines"]["majority"] == 0.6
    assert found["balanced"] == pytest.approx(1 / 3)
    assert found["baselines"]["constants"] == {"b": 0.6, "a": 0.2, "c": 0.2}
    assert "calibrated" not in found


def test_calibration_takes_out_the_score_without_a_prompt():
    asked = questions(((0,), (1,)), ("rare", "common"))
    scores = np.array([[[[-5.0, -3.0]], [[-9.0, -1.0]]]])  # the prompt makes "rare" likelier in the first
    found = choice_metrics(asked, scores, np.array([[-8.0, -2.0]]))
    assert (found["accuracy"]["value"], found["calibrated"]["value"]) == (0.5, 1)


def test_preferred_sees_through_a_fondness_for_yes():
    asked = questions(((0, 1),) * 4, ("yes", "no"))
    scores = np.zeros((1, 4, 2, 2))
    scores[..., 0, 0], scores[..., 1, 0] = 5, 4
    found = choice_metrics(asked, scores, None)
    assert (found["accuracy"]["value"], found["preferred"]["value"]) == (0.5, 1)


def test_perplexity_per_token_word_and_byte():
    of_texts = {"nats": [6, 4], "tokens": [3, 2], "words": [2, 3], "bytes": [12, 8]}
    of_texts |= {"word_nats": [2, 3], "known": [1, 0]}
    scores = {name: np.array([values], float) for name, values in of_texts.items()}
    found = document_metrics(Documents("lambada", FAIR, ("", ""), True), scores)
    assert found["perplexity"]["value"] == pytest.approx(np.exp(2))
    assert found["word_perplexity"]["value"] == pytest.approx(np.exp(2))
    assert found["byte_perplexity"]["value"] == pytest.approx(np.exp(0.5))
    assert (found["accuracy"]["value"], found["target_perplexity"]["value"]) == (0.5, pytest.approx(np.exp(2.5)))
    published = document_metrics(Documents("wikitext103", PUBLISHED, ("", ""), False), scores)
    assert set(published) == {"perplexity"}


def test_the_vote_is_by_count_and_equal_counts_go_to_the_likelier():
    scores = np.log(
        [
            [[0.9, 0.1], [0.4, 0.6], [0.4, 0.6]],  # two of three for the second, though the first is likelier over all
            [[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]],
        ]
    )
    assert vote_of_prompts(scores).tolist() == [1, 0]
    assert vote_of_prompts(scores[:, :2]).tolist() == [0, 0]
