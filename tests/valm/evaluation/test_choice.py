import numpy as np
import pytest
import torch

from valm.evaluation import choice
from valm.evaluation.choice import ask, vote_of_prompts

ARGUMENTS = {"fair": True, "batch_size": 1, "progress": None}


def answering(monkeypatch, scores):
    """Replaces the model: these are the log-probabilities, (items, prompts, candidates)."""
    flat = torch.tensor(scores, dtype=torch.float32).flatten(0, 1)
    monkeypatch.setattr(choice, "answer_log_probs", lambda *_, **__: flat)


def test_calibration_takes_out_an_answer_that_is_always_likely(monkeypatch):
    answering(monkeypatch, [[[1, 9, 0]] * 2, [[0, 9, 1]] * 2])
    asked = ask(None, None, [["", ""]] * 2, ["a", "c"], ("a", "b", "c"), **ARGUMENTS)
    assert asked["accuracy"].value == asked["vote"].value == 0
    assert asked["calibrated"].value == asked["calibrated_vote"].value == 1
    assert asked["predictions"] == (("b", "b"), ("b", "b"))


def test_balanced_accuracy_does_not_reward_the_frequent_answer(monkeypatch):
    answering(monkeypatch, [[[1.0, 0.0]]] * 4)  # always "a"
    asked = ask(None, None, [[""]] * 4, ["a", "a", "a", "b"], ("a", "b"), **ARGUMENTS)
    assert asked["accuracy"].value == asked["majority"] == 0.75
    assert (asked["balanced"], asked["majority_answer"]) == (0.5, "a")


def test_the_vote_is_by_count_and_equal_counts_go_to_the_likelier():
    scores = np.log(
        [
            [[0.9, 0.1], [0.4, 0.6], [0.4, 0.6]],  # two of three for the second, though the first is likelier over all
            [[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]],
        ]
    )
    assert vote_of_prompts(scores).tolist() == [1, 0]
    assert vote_of_prompts(scores[:, :2]).tolist() == [0, 0]


def test_the_published_protocol_has_neither_vote_nor_calibration(monkeypatch):
    answering(monkeypatch, [[[1.0, 0.0]]])
    monkeypatch.setattr(choice, "answer_pieces", lambda _, answers: [[1]] * len(answers))
    asked = ask(None, None, [[""]], ["a"], ("a", "b"), **(ARGUMENTS | {"fair": False}))
    assert asked["vote"] is asked["calibrated"] is asked["calibrated_vote"] is None
    assert asked["accuracy"].value == pytest.approx(1)
