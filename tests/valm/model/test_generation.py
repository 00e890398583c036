"""generate() with live retrieval: token by token equals reading it all again."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

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
from tests.valm.models import HashRetriever, again_from_the_start, tiny_model
from valm.errors import ValmError
from valm.model.retrieval_cache import RetrievalCache

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}
# MiniMax makes a cache of its own class; Phi-3 drops its cache at token 10, where its rotation changes
MODELS = {
    "llama": augmented,
    "gpt2": partial(augmented, tiny_gpt2),
    "valm": tiny_model,
    "minimax": partial(augmented, tiny_minimax),
    "phi3": partial(augmented, tiny_phi3_longrope),
}
with_any_cache = pytest.mark.parametrize("model", ["llama", "gpt2", "valm"], indirect=True)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    model = MODELS[request.param]()
    model.set_retriever(HashRetriever())
    return model


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy(model, use_cache):
    ids = random_ids(3, 5)
    expected = again_from_the_start(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY, use_cache=use_cache), expected)
    model.set_retriever(None)
    text_alone = model.generate(ids, **GREEDY)
    model.set_retriever(HashRetriever())
    assert not torch.equal(text_alone, expected)


@with_any_cache
@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prefill_chunk_size": 3}], ids=str)
def test_another_way_through_the_prompt(model, options):
    ids = random_ids(3, 5)
    assert torch.equal(model.generate(ids, **GREEDY, **options), again_from_the_start(model, ids))


@with_any_cache
@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padding(model, cache):
    prompts = [random_ids(1, length, seed=length) for length in (6, 3)]
    padded = torch.cat([prompts[0], torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompts[1]], 1)])
    mask = torch.ones_like(padded)
    mask[1, :3] = 0
    out = model.generate(padded, attention_mask=mask, **GREEDY, cache_implementation=cache)
    for row, prompt in zip(out, prompts, strict=True):
        assert torch.equal(row[-8:], again_from_the_start(model, prompt)[0, -8:])


@pytest.mark.parametrize(
    "options", [{"num_beams": 4}, {"guidance_scale": 3.0}, {"do_sample": True, "num_return_sequences": 3}], ids=str
)
def test_with_and_without_a_cache(model, options):
    ids = random_ids(2, 6)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        runs.append(model.generate(ids, **GREEDY | options, use_cache=use_cache))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0][: len(ids)], model.generate(ids, **GREEDY))


@with_any_cache
def test_beams_in_a_static_cache(model):
    ids, beams = random_ids(2, 5), GREEDY | {"num_beams": 4}
    expected = model.generate(ids, **beams, use_cache=False)
    assert torch.equal(model.generate(ids, **beams, cache_implementation="static"), expected)


@with_any_cache
def test_going_on_from_a_cache(model):
    ids = random_ids(2, 5)
    first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert isinstance(first.cache, RetrievalCache)
    both = model.generate(first.sequences, **GREEDY, cache=first.cache)
    assert torch.equal(both, again_from_the_start(model, ids, 16))


@torch.no_grad()
def test_embeddings_generate_what_their_tokens_do():
    model, ids = augmented(), random_ids(1, 5)
    expected = model.generate(ids, **GREEDY)[:, 5:]
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY), expected)
    model.set_retriever(HashRetriever())
    with pytest.raises(ValueError, match="the retriever needs token ids, got only inputs_embeds"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)


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


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_generation_in_a_static_cache_compiles_once(base):
    """One graph for all steps, in which the kernel reads the number of cached keys from a tensor."""
    model = augmented(base)
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

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    cache = StaticCache(config=model.config, max_cache_len=80)
    static = {"cache": cache, "compile_config": config}
    warm = model.generate(ids, **long | {"max_new_tokens": 4}, **static)
    assert torch.equal(warm, expected[:, : warm.shape[1]])
    (graph,) = graphs
    attention = torch.ops.valm_kernels.visual_fusion_attn.default
    (call,) = (node for node in graph.graph.nodes if node.target == attention)
    assert call.args[13] is not None  # cache_seqlens
    cache.reset()
    assert torch.equal(model.generate(ids, **long, **static), expected)
    assert len(graphs) == 1


@torch.no_grad()
def rest_from_cache(model, ids, cache, begin=4):
    return model(ids[:, begin:], cache=cache).logits


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("use_cache", [True, None])
def test_a_returned_cache_has_the_retrievers_state(model, name, use_cache):
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :2] = 0
    out = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=use_cache)
    got = model(ids[:, 4:], attention_mask=mask, **{name: out[name]}).logits
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 4:]
    assert_agree(got, expected)
    model.set_retriever(None)
    blind = model(ids, attention_mask=mask, use_cache=False).logits[:, 4:]
    model.set_retriever(HashRetriever())
    assert (blind - expected).abs().max() > 0.1  # the images matter


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_returned_cache_can_be_copied_and_its_rows_selected(model, copied):
    ids = random_ids(2, 9)
    expected = model(ids, use_cache=False).logits[:, 4:]
    _, unread = model(ids[:, :4], use_cache=True, return_dict=False)
    read = model(ids[:, 4:6], cache=copied(unread)).cache
    assert type(copied(read)) is type(read)
    for cache, begin in ((unread, 4), (read, 6)):
        assert_agree(rest_from_cache(model, ids, copied(cache), begin), expected[:, begin - 4 :])
        cache.batch_select_indices(torch.tensor([1]))
        assert_agree(rest_from_cache(model, ids[1:], cache, begin), expected[1:, begin - 4 :])


CACHES = [DynamicCache, lambda: StaticCache(config=tiny_llama().config, max_cache_len=12)]


@torch.no_grad()
@pytest.mark.parametrize("make", CACHES)
def test_a_cache_of_ones_own_can_be_reset(make):
    model = augmented()
    model.set_retriever(HashRetriever())
    ids, other, cache = random_ids(2, 9), random_ids(2, 3, seed=1), make()
    model(other, cache=cache, use_cache=True)
    cache.reset()
    model(ids[:, :4], cache=cache, use_cache=True)
    expected = model(ids, use_cache=False).logits[:, 4:]
    assert_agree(rest_from_cache(model, ids, cache), expected)


@torch.no_grad()
@pytest.mark.parametrize("read", [False, True])
def test_another_retriever_in_the_middle_of_a_cache_is_noticed(read):
    model, ids = augmented(), random_ids(1, 6)
    model.set_retriever(HashRetriever())
    cache = model(ids[:, :3], use_cache=True).cache
    if read:
        model(ids[:, 3:4], cache=cache)
    model.set_retriever(model.retriever)  # the same
    end = cache.get_seq_length() + 1
    model(ids[:, end - 1 : end], cache=cache)
    model.set_retriever(HashRetriever())
    with pytest.raises(ValueError, match="saw another retriever's images: start with an empty cache"):
        model(ids[:, end : end + 1], cache=cache)


@torch.no_grad()
def test_a_cache_with_tokens_that_the_retriever_has_not_read_is_refused():
    model = augmented()
    model.set_retriever(HashRetriever())
    ids = random_ids(1, 6)
    cache = model(ids[:, :2], use_cache=True).cache
    model(ids[:, 2:3], cache=cache)
    given = {"image_pool": torch.zeros(0, 24), "image_index": torch.full((1, 2, 3), -1)}
    model(ids[:, 3:5], cache=cache, **given)
    with pytest.raises(ValueError, match="the cache contains 5 tokens, but the retriever has read 3: the other"):
        model(ids[:, 5:], cache=cache)


@torch.no_grad()
@with_any_cache
@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_reading_in_parts_equals_reading_at_once(model, make, found, positions):
    """A mask may be wider than what is read, as its columns are of keys: a prompt is read in parts with the mask of all
    of it, and a static cache has more."""
    ids, images = random_ids(2, 9), random_images(2, 9)
    mask = torch.zeros(2, 12, dtype=torch.int64)
    mask[:, :9], mask[1, :3] = 1, 0
    place = (mask.cumsum(1) - 1).clamp(min=0)

    def read(begin, end, width, cache=None):
        more = {} if found else images | {"image_index": images["image_index"][:, begin:end]}
        if positions:
            more["position_ids"] = place[:, begin:end]
        return model(ids[:, begin:end], attention_mask=mask[:, :width], cache=cache, use_cache=True, **more)

    expected = read(0, 9, 9).logits
    present = mask[:, :9].bool()
    assert_agree(read(0, 9, 12).logits[present], expected[present])
    for own, wide in itertools.product((False, True), repeat=2):
        cache, outputs = make() if own else None, []
        for begin, end in ((0, 5), (5, 6), (6, 9)):
            output = read(begin, end, 12 if wide else end, cache)
            cache = output.cache
            outputs.append(output.logits)
        assert_agree(torch.cat(outputs, 1)[present], expected[present])
    message = "a column for each of the 9 tokens in the cache and of these 1, got 1 columns"
    with pytest.raises(ValueError, match=message):
        read(8, 9, 1, cache)


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
    with pytest.raises(ValueError, match="has no retriever and was given no images"):
        model.generate_batch(ids.tolist(), **CONTINUOUS)


@with_any_cache
@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_lookup_num_tokens": 2}, "Assisted decoding requires a cache that can be cropped"),
        (random_images(1, 6), "each new token needs its own images"),
    ],
)
def test_what_generate_cannot_do_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(random_ids(1, 6), **GREEDY, **options)
