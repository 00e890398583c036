"""Documents in one row of an augmented decoder, told apart by positions that restart: none sees another."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from tests.checks.families import tiny
from tests.tolerance import assert_agree
from tests.valm.model.decoders import augmented, random_ids, random_images, tiny_gpt2, tiny_llama
from tests.valm.models import WholeTextRetriever, tiny_model

LENGTHS = (5, 1, 8, 3)
ORDERS = (LENGTHS, LENGTHS[::-1])
MODELS = {
    "llama": augmented,
    "gpt2": partial(augmented, tiny_gpt2),
    "valm": tiny_model,
    "layer_0": partial(augmented, layer=0),
    "eager": lambda: augmented(lambda seed: tiny_llama(seed, attn_implementation="eager")),
}
CACHE = "a row contains several documents, which a cache cannot hold"


def packed_rows(way=""):
    """Two rows of documents in another order and their images; padded and with a mask, if `way` says so."""
    padding = 3 if "padding" in way else 0
    positions = [
        torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.int64)]) for lengths in ORDERS
    ]
    length = sum(LENGTHS) + padding
    batch = {"input_ids": random_ids(2, length), "position_ids": torch.stack(positions), **random_images(2, length)}
    if "mask" in way:
        batch["attention_mask"] = (torch.arange(length) < sum(LENGTHS)).long().expand(2, -1)
    return batch


@torch.no_grad()
def alone(model, batch, orders=ORDERS):
    """The logits of each document by itself, (2, tokens, V)."""
    rows = []
    for row, lengths in enumerate(orders):
        begin, found = 0, []
        for length in lengths:
            place = slice(begin, begin + length)
            images = {"image_pool": batch["image_pool"], "image_index": batch["image_index"][row : row + 1, place]}
            images = images if model.retriever is None else {}
            found.append(model(input_ids=batch["input_ids"][row : row + 1, place], **images).logits)
            begin += length
        rows.append(torch.cat(found, 1))
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize("way", ["by default", "a mask", "no cache", "padding and a mask", "padding", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_have_the_logits_of_each_alone(name, way):
    model, batch = MODELS[name](), packed_rows(way)
    expected = alone(model, batch)
    if way == "no cache":
        batch["use_cache"] = False
    if way == "training":
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    assert_agree(model(**batch).logits[:, : sum(LENGTHS)], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "valm"])
@pytest.mark.parametrize(
    "way",
    [
        "by default",
        "a mask",
        "padding and a mask",
        "one row of positions",
        pytest.param("compiled", marks=pytest.mark.slow),
    ],
)
def test_a_retriever_reads_each_document_by_itself(name, way):
    model, batch, orders = MODELS[name](), packed_rows(way), ORDERS
    model.set_retriever(WholeTextRetriever())
    if way == "one row of positions":
        batch["position_ids"], orders = batch["position_ids"][:1], (LENGTHS, LENGTHS)
    read = torch.compile(model, backend="eager") if way == "compiled" else model
    found = read(**{name: value for name, value in batch.items() if "image" not in name}, use_cache=False).logits
    assert_agree(found[:, : sum(LENGTHS)], alone(model, batch, orders))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "valm"])
def test_padding_on_the_left_and_a_mask(name):
    """Of one document, with the positions that `generate` counts: it is not taken for several."""
    model, ids, images = MODELS[name](), random_ids(1, 6), random_images(1, 9)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    positions = mask.cumsum(-1) - 1
    expected = model(input_ids=ids, image_pool=images["image_pool"], image_index=images["image_index"][:, 3:]).logits
    for padding, arguments in ((0, {}), (0, {"use_cache": False}), (1, {"use_cache": True})):
        place = positions.masked_fill(mask == 0, padding)
        found = model(input_ids=padded, attention_mask=mask, position_ids=place, **images, **arguments).logits
        assert_agree(found[:, 3:], expected)


def test_gaps_and_holes_beside_several_documents_are_refused():
    """transformers would split a document there. In a batch without restarts they mean what they mean to the family."""
    model, batch = augmented(), packed_rows()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 8] = 0  # inside the third document
    gap = batch["position_ids"].clone()
    gap[1, 5:11] += 4
    for odd in ({"attention_mask": mask}, {"position_ids": gap}):
        with pytest.raises(ValueError, match="a document has a gap in its positions or padding inside it"):
            model(**batch | odd)


@torch.no_grad()
def test_a_document_behind_padding():
    model, ids, images = augmented(), random_ids(1, 9), random_images(1, 9)
    mask, positions = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1]]), torch.tensor([[0, 1, 2, 9, 9, 0, 1, 2, 3]])
    found = model(input_ids=ids, attention_mask=mask, position_ids=positions, **images).logits
    for place in (slice(0, 3), slice(5, 9)):
        own = {"image_pool": images["image_pool"], "image_index": images["image_index"][:, place]}
        assert_agree(found[:, place], model(input_ids=ids[:, place], **own).logits)


@pytest.mark.parametrize("name", ["llama", "valm"])
@pytest.mark.parametrize("cache", [{"use_cache": True}, {"cache": DynamicCache()}, {"past_key_values": DynamicCache()}])
def test_several_documents_and_a_cache_are_refused(name, cache):
    with pytest.raises(ValueError, match=CACHE):
        MODELS[name]()(**packed_rows(), **cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "valm"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_document_behind_a_filled_cache_is_refused(name, masked):
    model, ids, positions = MODELS[name](), random_ids(1, 9), [3, 4, 5, 0, 1, 2]
    cache = model(input_ids=ids[:, :3], use_cache=True).cache
    given = {"input_ids": ids[:, 3 : 3 + len(positions)], "position_ids": torch.tensor([positions]), "cache": cache}
    if masked:
        given["attention_mask"] = torch.ones(1, 3 + len(positions), dtype=torch.int64)
    with pytest.raises(ValueError, match=CACHE):
        model(**given)


@pytest.fixture(params=["the code of a graph", pytest.param("compiled", marks=pytest.mark.slow)])
def graph_of(request, monkeypatch):
    """Compiles a model, or runs the code that is compiled as it is: it cannot look at positions."""

    def make(model):
        if request.param == "compiled":
            torch._dynamo.reset()
            return torch.compile(model, backend="eager")
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        return model

    return make


def test_a_family_that_mixes_documents_is_refused(graph_of):
    model = augmented(lambda seed: tiny("jamba"), layer=0)
    batch = {"input_ids": random_ids(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), **random_images(1, 6)}
    with pytest.raises(ValueError, match="a row contains several documents, which JambaModel does not keep apart"):
        model(**batch)
    with pytest.raises(RuntimeError, match="only if its family keeps documents apart"):
        graph_of(model)(**batch, use_cache=False)


@torch.no_grad()
def test_what_a_graph_does_with_packed_documents(graph_of):
    """It separates them, or ends with an error."""
    model, batch = augmented(), packed_rows()
    mask, one = torch.ones_like(batch["input_ids"]), torch.arange(17).expand(2, -1)
    apart, whole = alone(model, batch), model(**batch | {"position_ids": one}).logits
    graph = graph_of(model)
    assert_agree(graph(**batch, use_cache=False).logits, apart)
    for arguments in ({"attention_mask": mask}, {"attention_mask": mask, "use_cache": False}, {}):
        with pytest.raises(RuntimeError, match="which a compiled model keeps apart only without an attention_mask"):
            graph(**batch, **arguments)
        assert_agree(graph(**batch | {"position_ids": one} | arguments).logits, whole)
