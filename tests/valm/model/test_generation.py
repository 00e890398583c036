"""generate() with live retrieval: token by token equals reading it all again."""

import copy
import pickle
from functools import partial

import pytest
import torch
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    TextStreamer,
)

from tests.tolerance import assert_agree
from tests.valm.model.decoders import (
    augmented,
    random_ids,
    random_images,
    tiny_gpt2,
    tiny_llama,
    tiny_minimax,
    tiny_phi3_longrope,
)
from tests.valm.models import HashRetriever, tiny_model
from valm.errors import ValmError
from valm.model.retrieval_cache import RetrievalCache

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2])
def model(request):
    model = augmented(request.param)
    model.set_retriever(HashRetriever())
    return model


def again_from_the_start(model, ids, steps=8):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy(model, use_cache):
    ids = random_ids(3, 5)
    expected = again_from_the_start(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY, use_cache=use_cache), expected)
    model.set_retriever(None)
    text_alone = model.generate(ids, **GREEDY)
    model.set_retriever(HashRetriever())
    assert not torch.equal(text_alone, expected)


def test_static_cache(model):
    ids = random_ids(3, 5)
    expected = again_from_the_start(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY, cache_implementation="static"), expected)


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padding(model, cache):
    prompts = [random_ids(1, length, seed=length) for length in (6, 3)]
    padded = torch.cat([prompts[0], torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompts[1]], 1)])
    mask = torch.ones_like(padded)
    mask[1, :3] = 0
    out = model.generate(padded, attention_mask=mask, **GREEDY, cache_implementation=cache)
    for row, prompt in zip(out, prompts, strict=True):
        assert torch.equal(row[-8:], again_from_the_start(model, prompt)[0, -8:])


class EachImageOnce(HashRetriever):
    """As a `Retriever`: the pool has only the images that were found, so its size differs between steps; now and then
    a row has none."""

    def _find(self, ids, previous, mask):
        found = super()._find(ids, previous, mask)
        index = found.image_index.masked_fill(ids[..., None] % 7 == 0, -1)
        image_ids, image_index = torch.unique(index, return_inverse=True)
        if len(image_ids) and image_ids[0] == -1:
            image_ids, image_index = image_ids[1:], image_index - 1
        return found._replace(image_pool=self.pool[image_ids], image_index=image_index, image_ids=image_ids)


def collecting_compile_config(graphs):
    """Compiles each step of a generation to what runs it eagerly, and appends its graph to `graphs`."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    return config


@torch.no_grad()
def test_embeddings_generate_what_their_tokens_do():
    model, ids = augmented(), random_ids(1, 5)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **greedy)[:, 5:]
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(ids), **greedy), expected)
    model.set_retriever(HashRetriever())
    with pytest.raises(ValueError, match="the retriever reads token ids, got inputs_embeds only"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **greedy)


@pytest.mark.parametrize(
    "base, score_scale",
    [
        pytest.param(tiny_llama, None, marks=pytest.mark.slow),
        pytest.param(tiny_llama, 1.0, marks=pytest.mark.slow),
        pytest.param(tiny_gpt2, None, marks=pytest.mark.slow),
        (tiny_gpt2, 1.0),
    ],
)
def test_generation_in_a_static_cache_compiles_once(base, score_scale):
    """One graph for all steps, in which the kernel reads the number of cached keys from a tensor."""
    model = augmented(base, score_scale=score_scale)
    model.set_retriever(EachImageOnce())
    ids = random_ids(3, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    sizes = {len(EachImageOnce()(ids[:, i : i + 1]).image_pool) for i in range(6)}
    assert len(sizes) > 1
    long = {"attention_mask": mask, **GREEDY, "max_new_tokens": 68}
    expected = model.generate(ids, **long)
    torch.compiler.reset()
    graphs = []
    cache = StaticCache(config=model.config, max_cache_len=80)
    static = {"cache": cache, "compile_config": collecting_compile_config(graphs)}
    warm = model.generate(ids, **long | {"max_new_tokens": 4}, **static)
    assert torch.equal(warm, expected[:, : warm.shape[1]])
    (graph,) = graphs
    attention = torch.ops.valm_kernels.visual_fusion_attn.default
    (call,) = (node for node in graph.graph.nodes if node.target == attention)
    assert call.args[13] is not None  # cache_seqlens
    cache.reset()
    assert torch.equal(model.generate(ids, **long, **static), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("cache", [None, "static"])
def test_beams(model, cache):
    ids = random_ids(2, 5)
    beams = GREEDY | {"num_beams": 4}
    without = model.generate(ids, **beams, use_cache=False)
    assert torch.equal(model.generate(ids, **beams, cache_implementation=cache), without)
    assert not torch.equal(without, model.generate(ids, **GREEDY))


def test_sampling_several_sequences(model):
    ids = random_ids(2, 5)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(
            model.generate(
                ids, do_sample=True, num_return_sequences=3, max_new_tokens=8, eos_token_id=None, use_cache=use_cache
            )
        )
    assert outputs[0].shape == (6, 13)
    assert torch.equal(*outputs)


def test_streaming(model, clip, capsys):
    ids = random_ids(1, 5)
    model.generate(ids, **GREEDY, streamer=TextStreamer(clip.tokenizer))
    assert capsys.readouterr().out.strip()


def test_going_on_from_a_cache(model):
    ids = random_ids(2, 5)
    first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert isinstance(first.cache, RetrievalCache)
    both = model.generate(first.sequences, **GREEDY, cache=first.cache)
    assert torch.equal(both, again_from_the_start(model, ids, 16))


# MiniMax makes a cache of its own class; Phi-3 drops its cache at token 10, where its rotation changes
MODELS = {
    "llama": lambda: augmented(tiny_llama),
    "gpt2": lambda: augmented(tiny_gpt2),
    "minimax": lambda: augmented(tiny_minimax),
    "phi3": lambda: augmented(tiny_phi3_longrope),
}


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    model = MODELS[request.param]()
    model.set_retriever(HashRetriever())
    return model


assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def rest_from_cache(model, ids, cache, begin=4):
    return model(ids[:, begin:], cache=cache).logits


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("use_cache", [True, None])
def test_a_returned_cache_has_the_retrievers_state(family, name, use_cache):
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :2] = 0
    out = family(ids[:, :4], attention_mask=mask[:, :4], use_cache=use_cache)
    got = family(ids[:, 4:], attention_mask=mask, **{name: out[name]}).logits
    expected = family(ids, attention_mask=mask, use_cache=False).logits[:, 4:]
    assert_close(got, expected)
    family.set_retriever(None)
    blind = family(ids, attention_mask=mask, use_cache=False).logits[:, 4:]
    family.set_retriever(HashRetriever())
    assert (blind - expected).abs().max() > 0.1  # the images matter


def test_a_returned_cache_of_a_tuple_has_the_retrievers_state(family):
    ids = random_ids(2, 9)
    with torch.no_grad():
        _, cache = family(ids[:, :4], use_cache=True, return_dict=False)
        expected = family(ids, use_cache=False).logits[:, 4:]
    assert_close(rest_from_cache(family, ids, cache), expected)


@torch.no_grad()
def test_a_returned_cache_can_be_copied_and_its_rows_selected(family):
    ids = random_ids(2, 9)
    expected = rest_from_cache(family, ids, family(ids[:, :4], use_cache=True).cache)
    cache = family(ids[:, :4], use_cache=True).cache
    assert_close(rest_from_cache(family, ids, copy.deepcopy(cache)), expected)
    half_read = family(ids[:, 4:6], cache=cache).cache
    assert_close(rest_from_cache(family, ids, copy.deepcopy(half_read), 6), expected[:, 2:])
    half_read.batch_select_indices(torch.tensor([1]))
    assert_close(rest_from_cache(family, ids[1:], half_read, 6), expected[1:, 2:])
    unread = family(ids[:, :4], use_cache=True).cache
    unread.batch_select_indices(torch.tensor([1]))
    assert_close(rest_from_cache(family, ids[1:], unread), expected[1:])


@torch.no_grad()
def test_a_returned_cache_can_be_pickled(family):
    ids = random_ids(2, 9)
    cache = family(ids[:, :4], use_cache=True).cache
    unread = pickle.dumps(cache)
    read = pickle.dumps(family(ids[:, 4:6], cache=cache).cache)
    expected = rest_from_cache(family, ids, pickle.loads(unread))
    assert_close(rest_from_cache(family, ids, cache, 6), expected[:, 2:])
    assert_close(rest_from_cache(family, ids, pickle.loads(read), 6), expected[:, 2:])
    assert type(pickle.loads(read)) is type(cache)


@torch.no_grad()
@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(config=tiny_llama().config, max_cache_len=12)])
def test_a_cache_of_ones_own_can_be_reset(make):
    model = augmented()
    model.set_retriever(HashRetriever())
    ids, other, cache = random_ids(2, 9), random_ids(2, 3, seed=1), make()
    model(other, cache=cache, use_cache=True)
    cache.reset()
    model(ids[:, :4], cache=cache, use_cache=True)
    expected = model(ids, use_cache=False).logits[:, 4:]
    assert_close(rest_from_cache(model, ids, cache), expected)


@torch.no_grad()
def test_a_cache_with_tokens_that_the_retriever_has_not_read_is_refused():
    model = augmented()
    model.set_retriever(HashRetriever())
    ids = random_ids(1, 6)
    cache = model(ids[:, :2], use_cache=True).cache
    model(ids[:, 2:3], cache=cache)
    given = {"image_pool": torch.zeros(0, 24), "image_index": torch.full((1, 2, 3), -1)}
    model(ids[:, 3:5], cache=cache, **given)
    with pytest.raises(ValueError, match="the cache has 5 tokens, but the retriever has read 3 of them"):
        model(ids[:, 5:], cache=cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_family_generates_as_it_reads(family, use_cache):
    ids = random_ids(2, 6)
    assert torch.equal(family.generate(ids, **GREEDY, use_cache=use_cache), again_from_the_start(family, ids))


def test_every_family_finds_the_same_beams_with_a_cache(family):
    ids = random_ids(2, 6)
    beams = GREEDY | {"num_beams": 4}
    without = family.generate(ids, **beams, use_cache=False)
    assert torch.equal(family.generate(ids, **beams), without)
    assert not torch.equal(family.generate(ids, **GREEDY), without)


def test_guidance(family):
    ids = random_ids(2, 6)
    guided = GREEDY | {"guidance_scale": 3.0}
    without = family.generate(ids, **guided, use_cache=False)
    assert torch.equal(family.generate(ids, **guided), without)
    assert not torch.equal(without, family.generate(ids, **GREEDY))


def test_a_prompt_read_in_chunks(model):
    ids = random_ids(2, 7)
    assert torch.equal(model.generate(ids, **GREEDY, prefill_chunk_size=3), again_from_the_start(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(config=tiny_llama().config, max_cache_len=12)])
@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_a_mask_may_be_wider_than_what_is_read(make, found, positions):
    """Its columns are of keys: a prompt is read in parts with the mask of all of it, and a static cache has more."""
    model, ids, images = augmented(), random_ids(2, 9), random_images(2, 9)
    if found:
        model.set_retriever(HashRetriever())
    mask = torch.zeros(2, 12, dtype=torch.int64)
    mask[:, :9], mask[1, :3] = 1, 0
    place = (mask.cumsum(1) - 1).clamp(min=0)

    def read(begin, end, mask, cache=None):
        more = {} if found else images | {"image_index": images["image_index"][:, begin:end]}
        if positions:
            more["position_ids"] = place[:, begin:end]
        return model(ids[:, begin:end], attention_mask=mask, cache=cache, use_cache=True, **more)

    expected = read(0, 9, mask[:, :9]).logits
    present = mask[:, :9].bool()
    assert_close(read(0, 9, mask).logits[present], expected[present])
    own = make()
    for cache in (None, own):
        outputs = [read(0, 5, mask, cache)]
        outputs += [read(begin, end, mask, outputs[0].cache) for begin, end in ((5, 8), (8, 9))]
        parts = torch.cat([output.logits for output in outputs], 1)
        assert_close(parts[present], expected[present])
    with pytest.raises(
        ValueError, match=r"a column for each of the 9 tokens in the cache and of these 1, got 1 columns"
    ):
        read(8, 9, mask[:, :1], own)


def test_assisted_decoding_is_refused(model):
    with pytest.raises(ValueError, match="Assisted decoding requires a cache that can be cropped"):
        model.generate(random_ids(1, 6), **GREEDY, prompt_lookup_num_tokens=2)


CONTINUOUS = {
    "generation_config": GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=-1),
    "continuous_batching_config": ContinuousBatchingConfig(block_size=16, num_blocks=8, max_batch_tokens=64),
}


@pytest.mark.parametrize("make", [augmented, tiny_model])
def test_continuous_batching_is_refused_with_a_retriever_only(make):
    model = make()
    model.set_retriever(HashRetriever())
    ids = random_ids(2, 6)
    with pytest.raises(ValmError, match="which a retriever cannot follow"):
        model.generate_batch(ids.tolist(), **CONTINUOUS)
    with pytest.raises(ValmError, match="which a retriever cannot follow"):
        model.generate(ids, cache_implementation="paged", max_new_tokens=4)
    model.set_retriever(None)
    found = model.generate_batch(ids.tolist(), **CONTINUOUS)
    expected = again_from_the_start(model, ids, 4)[:, -4:]
    assert [output.generated_tokens for output in found.values()] == expected.tolist()
    model.strict = True
    with pytest.raises(ValueError, match="has no retriever and was given none"):
        model.generate_batch(ids.tolist(), **CONTINUOUS)


def test_images_given_to_generate_are_refused(model):
    with pytest.raises(ValueError, match="each new token has images of its own"):
        model.generate(random_ids(1, 5), **GREEDY, **random_images(1, 5))


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]])
def test_reading_in_parts_with_a_cache_equals_reading_at_once(chunks):
    model = augmented()
    ids, images = random_ids(3, 12), random_images(3, 12)
    mask = torch.ones_like(ids)
    mask[2, :4] = 0
    expected = model(ids, attention_mask=mask, **images).logits
    for cache in (None, StaticCache(config=model.config, max_cache_len=20)):
        begin, logits = 0, []
        for chunk in chunks:
            end = begin + chunk
            index = images["image_index"][:, begin:end]
            out = model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                image_pool=images["image_pool"],
                image_index=index,
                cache=cache,
                use_cache=True,
            )
            cache, begin = out.cache, end
            logits.append(out.logits)
        present = mask.bool()
        assert_agree(torch.cat(logits, 1)[present], expected[present])
