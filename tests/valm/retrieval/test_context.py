import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tolerance import UNIT_VECTORS, assert_accurate, assert_agree
from tests.valm.tiny_clip import TEXTS, make_clip
from valm.clip.tokenizer import padded
from valm.retrieval import context
from valm.retrieval.context import QUERIES, ContextEncoder
from valm_kernels.int8_rows import has_avx2

INT8 = pytest.mark.skipif(not has_avx2(), reason="needs AVX2")
TOKENS = st.integers(0, 47)
ROWS = st.lists(st.lists(TOKENS, min_size=1, max_size=60), min_size=1, max_size=4)
fixed = settings(max_examples=16, deadline=None, derandomize=True)


@pytest.fixture(scope="module", params=["eot", "state"])
def encoder(request, clip):
    return ContextEncoder(clip, query=request.param, dtype=torch.float64)


@pytest.fixture(scope="module")
def pool(clip):
    """What numbers of a drawn row stand for: words with sentence ends among them, now and then SOT or EOT."""
    words = clip.tokenizer("".join(TEXTS), add_special_tokens=False)["input_ids"]
    return [*words[:40], *([clip.tokenizer.bos_token_id, clip.tokenizer.eos_token_id] * 4)]


def with_drawn_rule(encoder, data):
    """`encoder`, cutting segments at other places."""
    encoder = copy.copy(encoder)
    overlap, min_tokens = data.draw(st.integers(0, encoder.rule.limit // 2)), data.draw(st.integers(1, 20))
    encoder.rule = dataclasses.replace(encoder.rule, overlap=overlap, min_tokens=min_tokens)
    return encoder


def alone(encoder, row):
    return encoder(torch.tensor([row]))[0]


def close(found, expected):
    """The text tower runs in float64 where two ways to the same query are compared, and rounds at the end."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=UNIT_VECTORS)


def queries_in_a_padded_batch(encoder, rows, padding, data):
    """The queries of each of `rows`, with some `padding` before and behind it."""
    length = max(map(len, rows)) + data.draw(st.integers(0, 3))
    ids = torch.tensor(padding)[torch.arange(len(rows) * length).reshape(len(rows), -1) % len(padding)]
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    before = [data.draw(st.integers(0, length - len(row))) for row in rows]
    for n, (row, start) in enumerate(zip(rows, before, strict=True)):
        ids[n, start : start + len(row)] = torch.tensor(row)
        mask[n, start : start + len(row)] = 1
    queries = encoder(ids, mask)
    assert (queries[mask == 0] == 0).all()
    return [queries[n, start : start + len(row)] for n, (row, start) in enumerate(zip(rows, before, strict=True))]


@fixed
@given(rows=ROWS, data=st.data())
def test_a_query_is_the_same_in_a_padded_batch(encoder, pool, rows, data):
    encoder = with_drawn_rule(encoder, data)
    rows = [[pool[number] for number in row] for row in rows]
    for row, found in zip(rows, queries_in_a_padded_batch(encoder, rows, pool, data), strict=True):
        assert close(found, alone(encoder, row))


@fixed
@given(row=st.lists(TOKENS, min_size=2, max_size=80), future=st.lists(TOKENS, min_size=1, max_size=20), data=st.data())
def test_a_query_does_not_depend_on_the_future(encoder, pool, row, future, data):
    encoder = with_drawn_rule(encoder, data)
    length = data.draw(st.integers(1, len(row) - 1))
    row, future = ([pool[number] for number in numbers] for numbers in (row, future))
    whole = alone(encoder, row)
    assert close(alone(encoder, row[:length]), whole[:length])
    assert close(alone(encoder, row[:length] + future)[:length], whole[:length])


def check_steps(encoder, rows, padding, data):
    """Rows of a batch with paddings between, read in steps of any length, and exchanged as beam search does."""
    expected = [alone(encoder, row) for row in rows]
    cache = encoder.new_cache(len(rows))
    order = list(range(len(rows)))  # which row stands in which place
    done = [0] * len(rows)
    while any(done[row] < len(rows[row]) for row in order):
        width = data.draw(st.sampled_from([1, 1, 1, 2, 7, 30]))
        ids = torch.full((len(rows), width), padding)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for place, row in enumerate(order):
            given = rows[row][done[row] : done[row] + width]
            ids[place, width - len(given) :] = torch.tensor(given, dtype=torch.int64)
            mask[place, width - len(given) :] = True
        queries = encoder.step(ids, cache, mask)
        for place, row in enumerate(order):
            assert close(queries[place, mask[place]], expected[row][done[row] : done[row] + width])
        done = [min(at + width, len(row)) for at, row in zip(done, rows, strict=True)]
        beam_idx = data.draw(st.permutations(range(len(rows))))
        order = [order[place] for place in beam_idx]
        cache.reorder(torch.tensor(beam_idx))


@fixed
@given(rows=ROWS, data=st.data())
def test_a_query_is_the_same_step_by_step(encoder, pool, rows, data):
    encoder = with_drawn_rule(encoder, data)
    check_steps(encoder, [[pool[number] for number in row] for row in rows], pool[0], data)


def test_beams_that_share_a_past_go_their_own_ways(encoder, pool):
    start, ends = pool[:25], (pool[25:35], pool[30:40])
    cache = encoder.new_cache(2)
    encoder.step(torch.tensor([start, pool[5:30]]), cache)
    cache.reorder(torch.tensor([0, 0]))
    for at in range(10):
        queries = encoder.step(torch.tensor([[end[at]] for end in ends]), cache)
        for row, end in enumerate(ends):
            assert close(queries[row, 0], alone(encoder, start + end)[25 + at])


def prefixes(clip, words):
    """SOT, prefix, EOT of every prefix, the empty one first: what open_clip is given."""
    rows = torch.full((len(words) + 1, clip.context_length), clip.tokenizer.eos_token_id)
    rows[:, 0] = clip.tokenizer.bos_token_id
    for length in range(len(words) + 1):
        rows[length, 1 : 1 + length] = torch.tensor(words[:length])
    return rows


def errors(found, expected):
    """Largest and root mean square."""
    difference = found.double() - expected
    return torch.stack([difference.abs().max(), difference.square().mean().sqrt()])


@pytest.mark.parametrize(("custom_text", "layer_scale"), [(False, None), (True, None), (True, 0.5)])
def test_eot_queries_are_clips_own_features_of_every_prefix(tokenizer, custom_text, layer_scale):
    pooling = {"pool_type": "eos", "eos_id": tokenizer.eos_token_id} if custom_text else {}
    clip = make_clip(tokenizer, custom_text=custom_text, ls_init_value=layer_scale, **pooling)
    limit = clip.context_length - 2
    words = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"][:limit]
    rows = prefixes(clip, words)

    def found(dtype):
        # one segment: it does not end before it is full
        encoder = ContextEncoder(clip, min_tokens=limit, dtype=dtype)
        queries = alone(encoder, [tokenizer.bos_token_id, *words, tokenizer.eos_token_id])
        assert close(queries[-1], queries[-2])  # at EOT: the whole text
        return queries[1:-1]

    with torch.no_grad():
        expected = copy.deepcopy(clip.model).double().encode_text(rows[1:], normalize=True)
        assert close(found(torch.float64).double(), expected)
        for dtype in (torch.float32, torch.bfloat16):
            eager = copy.deepcopy(clip.model).to(dtype).encode_text(rows[1:], normalize=True)
            rounding = 2 * torch.finfo(dtype).eps * expected.abs().max()
            assert (errors(found(dtype), expected) <= 2 * errors(eager, expected) + rounding).all()


def test_state_queries_are_the_towers_states(clip, tokenizer):
    """At EOT the state is CLIP's feature; at any other token that of the tower with the token's position pooled."""
    words = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"][:10]
    row = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
    found = alone(ContextEncoder(clip, query="state", min_tokens=18, dtype=torch.float64), row)
    model = copy.deepcopy(clip.model).double()
    rows = prefixes(clip, words)[-1:].expand(len(row), -1)
    with torch.no_grad():
        assert close(found[-1:].double(), model.encode_text(rows[:1], normalize=True))
        model.text_pool_type, model.text_eos_id = "none", None
        states = torch.nn.functional.normalize(model.encode_text(rows[:1]), dim=-1)[0, : len(row)]
    assert close(found[1:].double(), states[1:])


def test_queries_are_unit_vectors_that_training_may_use(clip, pool):
    queries = ContextEncoder(clip)(torch.tensor([pool[:30]]))
    assert torch.allclose(queries[:, 1:].norm(dim=-1), torch.ones(1, 29))
    assert not queries.requires_grad and not queries.is_inference()


def test_documents_do_not_see_each_other(encoder, clip, pool):
    sot, eot = clip.tokenizer.bos_token_id, clip.tokenizer.eos_token_id
    first, second = [sot, *pool[:13], eot], [sot, *pool[20:31], eot]
    both = alone(encoder, first + second)
    assert close(both, torch.cat([alone(encoder, first), alone(encoder, second)]))
    # text without SOT is read as if it had one, after EOT too
    assert close(alone(encoder, first[1:])[1:], alone(encoder, first)[2:])
    found = alone(encoder, first + second[1:])
    assert close(found[len(first) + 1 :], both[len(first) + 2 :])


def test_the_first_token_of_a_document_has_no_query(encoder, clip, pool):
    sot, eot = clip.tokenizer.bos_token_id, clip.tokenizer.eos_token_id
    row = [*pool[:3], eot, *pool[3:5], sot, *pool[5:8], eot, eot, sot, sot]
    first = [0, 4, 6, 11, 12, 13]  # after EOT, at SOT, and an EOT that ends nothing
    expected = torch.ones(len(row), dtype=torch.bool).index_fill(0, torch.tensor(first), False)
    assert torch.equal(alone(encoder, row).any(-1), expected)
    cache = encoder.new_cache(1)
    steps = [encoder.step(torch.tensor([[id]]), cache)[0, 0].any() for id in row]
    assert torch.equal(torch.stack(steps), expected)


def test_segments_carry_the_last_tokens_over(clip, pool):
    """The first token after a full segment is read behind the last four of it, and behind nothing else."""
    encoder = ContextEncoder(clip, min_tokens=18, overlap=4, dtype=torch.float64)
    words = pool[:30]
    found = alone(encoder, words)
    assert close(found[18:20], alone(encoder, words[14:20])[4:])
    bare = ContextEncoder(clip, min_tokens=18, overlap=0, dtype=torch.float64)
    assert close(alone(bare, words)[18:20], alone(bare, [clip.tokenizer.bos_token_id, *words[18:20]])[1:])


def test_segments_are_encoded_together(clip, pool, monkeypatch):
    """New segments make one call of the tower; a call has as many tokens as allowed."""
    encoder = ContextEncoder(clip, dtype=torch.float64)
    calls = []
    run = encoder.tower.run
    monkeypatch.setattr(encoder.tower, "run", lambda *read, **options: calls.append(read[1]) or run(*read, **options))
    ids, mask = padded([pool[:9], pool[9:16], pool[16:25], pool[25:28], pool[28:37]])
    together = encoder(ids, mask)
    assert calls == [[10, 10, 10, 8, 4]]  # SOT and nine, seven, nine, three and nine tokens
    monkeypatch.setattr(context, "CPU_CALL_TOKENS", 44)
    calls.clear()
    apart = encoder(ids, mask)
    assert calls == [[10, 10], [10, 8], [4]]
    assert_agree(together, apart)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.int8, marks=INT8)])
def test_queries_in_a_batch_and_token_by_token_are_as_accurate_as_alone(clip, pool, query, dtype):
    encoder, exact = (ContextEncoder(clip, query=query, dtype=of) for of in (dtype, torch.float64))
    rows = [pool[:17], pool[17:22], pool[22:33], pool[3:6]]
    ids, mask = padded(rows)
    by_itself, truth = (torch.cat([alone(one, row) for row in rows]) for one in (encoder, exact))
    cache = encoder.new_cache(len(rows))
    steps = torch.cat([encoder.step(ids[:, at : at + 1], cache, mask[:, at : at + 1]) for at in range(17)], 1)
    for found in (encoder(ids, mask), steps):
        assert_accurate("queries", found[mask.bool()], by_itself, truth)


def test_wrong_arguments(clip):
    for options, message in (
        ({"query": "mean"}, "query must be one of 'eot', 'state', got 'mean'"),
        ({"overlap": 18}, "overlap must be from 0 to 17"),
        ({"min_tokens": 0}, "min_tokens must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ContextEncoder(clip, **options)
    encoder = ContextEncoder(clip)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    for wrong, message in (
        ((ids[0],), r"input_ids must be \(B, T\) int64"),
        ((ids.float(),), r"input_ids must be \(B, T\) int64"),
        ((ids, torch.ones(1, 2)), r"attention_mask must have the shape of input_ids \(1, 3\), got \(1, 2\)"),
        ((ids - 1,), "input_ids contains -1, but the CLIP tiny has 589 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(*wrong)
    assert encoder(torch.tensor([[1, -1]]), torch.tensor([[1, 0]])).shape == (1, 2, 16)  # padding may be anything
    with pytest.raises(ValueError, match="input_ids has 2 rows, the cache 1"):
        encoder.step(ids.expand(2, 3), encoder.new_cache(1))
