import pytest

from valm.retrieval.segments import SegmentRule, SegmentState, sentence_end_ids
from valm.tokenizer import clip_tokenizer

SOT, EOT, STOP = 100, 101, 9


def rule(**changes):
    defaults = {"limit": 6, "overlap": 2, "min_tokens": 3, "eot_in_segment": False}
    return SegmentRule(sot=SOT, eot=EOT, sentence_ends=frozenset({STOP}), **{**defaults, **changes})


def segments(ids, rule, state=None):
    """(tokens, how many of them are asked for) of each run."""
    runs = (state or SegmentState()).read(0, list(enumerate(ids)), rule)
    return [(run.ids, len(run.wanted)) for run in runs]


def test_a_segment_ends_when_it_is_full():
    assert segments([SOT, *range(1, 9)], rule()) == [
        ([SOT, 1, 2, 3, 4, 5, 6], 7),
        ([SOT, 5, 6, 7, 8], 2),  # the two carried over are not asked for again
    ]


def test_a_segment_ends_after_a_sentence():
    assert segments([1, 2, STOP, 3, STOP, 4], rule()) == [([SOT, 1, 2, STOP], 3), ([SOT, 2, STOP, 3, STOP, 4], 3)]
    # tokens carried over do not count as its own
    assert segments([1, STOP, 2, STOP, 3], rule()) == [([SOT, 1, STOP, 2, STOP], 4), ([SOT, 2, STOP, 3], 1)]


def test_documents_begin_anew():
    assert segments([1, 2, EOT, 3, SOT, 4], rule()) == [([SOT, 1, 2], 3), ([SOT, 3], 1), ([SOT, 4], 2)]
    assert segments([1, 2, EOT, EOT], rule(eot_in_segment=True)) == [([SOT, 1, 2, EOT], 3), ([SOT, EOT], 1)]


@pytest.mark.parametrize("eot_in_segment", [False, True])
def test_every_token_is_asked_for_once(eot_in_segment):
    ids = [1, 2, SOT, EOT, EOT, 3, STOP, 4, 5, 6, 7, 8, 9, 10, 11, SOT, SOT, 1, EOT]
    runs = SegmentState().read(0, list(enumerate(ids)), rule(eot_in_segment=eot_in_segment))
    assert [position for run in runs for position, _ in run.wanted] == list(range(len(ids)))
    assert all(len(run.ids) <= 1 + 6 + eot_in_segment for run in runs)


def test_eot_alone_looks_back_at_an_earlier_call():
    state = SegmentState()
    state.read(0, list(enumerate([1, 2, STOP])), rule())
    (run,) = state.read(0, [(0, EOT)], rule())
    assert (run.ids, run.start, run.wanted, run.goes_on) == ([], 4, [(0, -1)], False)


def test_sentence_ends_of_clip():
    tokenizer = clip_tokenizer()
    pieces = set(tokenizer.convert_ids_to_tokens(sorted(sentence_end_ids(tokenizer))))
    assert {".</w>", "!</w>", "?</w>", '."</w>', "...</w>", ".)</w>"} <= pieces
    assert not pieces & {",</w>", ";</w>", ".", "/.</w>"}
