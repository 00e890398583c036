import numpy as np

from valm.evaluation.choice import vote_of_prompts


def test_the_vote_is_by_count_and_equal_counts_go_to_the_likelier():
    scores = np.log(
        [
            [[0.9, 0.1], [0.4, 0.6], [0.4, 0.6]],  # two of three for the second, though the first is likelier over all
            [[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]],
        ]
    )
    assert vote_of_prompts(scores).tolist() == [1, 0]
    assert vote_of_prompts(scores[:, :2]).tolist() == [0, 0]
