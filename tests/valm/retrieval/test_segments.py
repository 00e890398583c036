import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from valm.clip.tokenizer import clip_tokenizer
from valm.retrieval.segments import Reading, SegmentRule, SegmentState, sentence_end_ids

SOT, EOT, STOP = 100, 101, 9


def rule(**changes):
    defaults = {"limit": 6, "overlap": 2, "min_tokens": 3, "eot_in_segment": False}
    return SegmentRule(sot=SOT, eot=EOT, sentence_ends=frozenset({STOP}), **{**defaults, **changes})


def read(ids, rule, state=None):
    reading = Reading(0, state or SegmentState(), rule)
    for position, id in enumerate(ids):
        reading.add(id)
        reading.want(position)
    reading.keep()
    return reading


def segments(ids, rule):
    """(tokens, how many of them are asked for) of each run."""
    return [(run.ids, len(run.wanted)) for run in read(ids, rule).runs]


def segments_of(reading):
    return [(run.ids, run.start, run.wanted) for run in reading.runs]


def test_a_segment_ends_when_it_is_full_and_after_a_sentence():
    # the two carried over are not asked for again
    assert segments([SOT, *range(1, 9)], rule()) == [([SOT, 1, 2, 3, 4, 5, 6], 7), ([SOT, 5, 6, 7, 8], 2)]
    assert segments([1, 2, STOP, 3, STOP, 4], rule()) == [([SOT, 1, 2, STOP], 3), ([SOT, 2, STOP, 3, STOP, 4], 3)]
    # tokens carried over do not count as its own
    assert segments([1, STOP, 2, STOP, 3], rule()) == [([SOT, 1, STOP, 2, STOP], 4), ([SOT, 2, STOP, 3], 1)]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.sampled_from([1, 2, 3, STOP]), max_size=40), limit=st.integers(2, 8), data=st.data())
def test_a_segment_begins_with_the_end_of_the_one_before(ids, limit, data):
    overlap, min_tokens = data.draw(st.integers(0, limit - 1)), data.draw(st.integers(1, limit))
    runs = read(ids, rule(limit=limit, overlap=overlap, min_tokens=min_tokens)).runs
    own = [run.ids[run.wanted[0][1] :] if number else run.ids[1:] for number, run in enumerate(runs)]
    assert [id for tokens in own for id in tokens] == ids
    for before, run, tokens in zip(runs, runs[1:], own[1:], strict=False):
        text = before.ids[1:]
        assert run.ids == [SOT, *text[max(0, len(text) - overlap) :], *tokens]
        assert len(text) == limit or (text[-1] == STOP and len(before.wanted) >= min_tokens)


def test_documents_begin_anew():
    assert segments([1, 2, EOT, 3, SOT, 4], rule()) == [([SOT, 1, 2], 3), ([SOT, 3], 1), ([SOT, 4], 2)]
    assert segments([1, 2, EOT, EOT], rule(eot_in_segment=True)) == [([SOT, 1, 2, EOT], 3), ([SOT, EOT], 1)]


@pytest.mark.parametrize("eot_in_segment", [False, True])
def test_every_token_is_asked_for_once(eot_in_segment):
    ids = [1, 2, SOT, EOT, EOT, 3, STOP, 4, 5, 6, 7, 8, 9, 10, 11, SOT, SOT, 1, EOT]
    runs = read(ids, rule(eot_in_segment=eot_in_segment)).runs
    assert [position for run in runs for position, _ in run.wanted] == list(range(len(ids)))
    assert all(len(run.ids) <= 1 + 6 + eot_in_segment for run in runs)


def test_eot_alone_looks_back_at_an_earlier_call():
    before = read([1, 2, STOP], rule())
    (run,) = read([EOT], rule(), before.kept).runs
    assert (run.ids, run.start, run.wanted, run.kept) == ([], 4, [(0, -1)], 0)


def test_what_is_not_kept_is_read_again():
    reading = Reading(0, SegmentState(), rule())
    for id in (SOT, 1):
        reading.add(id)
    reading.keep()
    reading.add(2)
    (run,) = reading.runs
    assert (run.ids, run.kept) == ([SOT, 1, 2], 2)
    assert segments_of(read([3, 4], rule(), reading.kept)) == [([3, 4], 2, [(0, 0), (1, 1)])]
    assert reading.state.text == [1, 2]


def test_a_fork_goes_on_from_its_place():
    """Behind the run it leaves where its segment has room, else in a segment of its own."""
    reading = read([SOT, 1, 2, 3, 4], rule(min_tokens=6))
    reading.fork([5, 6], [7, 8])
    reading.add(9)
    assert segments_of(reading) == [([SOT, 1, 2, 3, 4, 9], 0, [(n, n) for n in range(5)])]
    (branch,) = reading.runs[0].branches
    assert (branch.ids, branch.start, branch.wanted) == ([5, 6], 5, [(7, 1), (8, 1)])
    reading.fork([10, 11], [9])
    (fork,) = reading.forks
    assert (fork.ids, fork.start, fork.wanted) == ([SOT, 9, 10, 11], 0, [(9, 3)])
    assert reading.state.text == [1, 2, 3, 4, 9]


def test_sentence_ends_of_clip():
    tokenizer = clip_tokenizer()
    pieces = set(tokenizer.convert_ids_to_tokens(sorted(sentence_end_ids(tokenizer))))
    assert {".</w>", "!</w>", "?</w>", '."</w>', "...</w>", ".)</w>"} <= pieces
    assert not pieces & {",</w>", ";</w>", ".", "/.</w>"}
