"""Documents in one row of an augmented decoder, told apart by positions that restart: none sees another."""

import pytest
import torch
from transformers import DynamicCache

from tests.checks.families import tiny
from tests.tolerance import assert_agree
from tests.valm.model.decoders import augmented, random_ids, random_images, tiny_gpt2, tiny_llama
from tests.valm.models import WholeTextRetriever

LENGTHS = (5, 1, 8, 3)
MODELS = {
    "llama": augmented(),
    "gpt2": augmented(tiny_gpt2),
    "layer_0": augmented(layer=0),
    "eager": augmented(lambda seed: tiny_llama(seed, attn_implementation="eager")),
}


def packed_rows(padding=0):
    """Two rows of documents in another order, their images, and what each token should be compared with."""
    positions = [
        torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.int64)])
        for lengths in (LENGTHS, LENGTHS[::-1])
    ]
    length = sum(LENGTHS) + padding
    images = random_images(2, length)
    return {"input_ids": random_ids(2, length), "position_ids": torch.stack(positions), **images}


@torch.no_grad()
def alone(model, batch):
    """The logits of each document by itself, (2, tokens, V)."""
    rows = []
    for row, lengths in enumerate((LENGTHS, LENGTHS[::-1])):
        begin, found = 0, []
        for length in lengths:
            place = slice(begin, begin + length)
            images = {"image_pool": batch["image_pool"], "image_index": batch["image_index"][row : row + 1, place]}
            found.append(model(input_ids=batch["input_ids"][row : row + 1, place], **images).logits)
            begin += length
        rows.append(torch.cat(found, 1))
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize("way", ["by default", "a mask", "no cache", "padding and a mask", "padding", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_have_the_logits_of_each_alone(name, way):
    model = MODELS[name]
    batch = packed_rows(padding=3 if "padding" in way else 0)
    length = sum(LENGTHS)
    expected = alone(model, batch)
    if "mask" in way:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, length:] = 0
    if way == "no cache":
        batch["use_cache"] = False
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    rates = [module.p for module in dropouts]
    try:
        if way == "training":
            model.train()
            for module in dropouts:
                module.p = 0.0
        found = model(**batch).logits[:, :length]
    finally:
        model.eval()
        for module, rate in zip(dropouts, rates, strict=True):
            module.p = rate
    assert_agree(found, expected)


@torch.no_grad()
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
def test_a_retriever_reads_each_document_by_itself(way):
    model = augmented()
    model.set_retriever(WholeTextRetriever())
    batch = packed_rows(padding=3 if "padding" in way else 0)
    if "mask" in way:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, sum(LENGTHS) :] = 0
    orders = [LENGTHS, LENGTHS[::-1]]
    if way == "one row of positions":
        batch["position_ids"], orders[1] = batch["position_ids"][:1], LENGTHS
    ids = batch["input_ids"][:, : sum(LENGTHS)]
    alone = [
        torch.cat([model(part).logits for part in row[None].split(order, 1)], 1)
        for row, order in zip(ids, orders, strict=True)
    ]
    read = torch.compile(model, backend="eager") if way == "compiled" else model
    found = read(**{name: value for name, value in batch.items() if "image" not in name}, use_cache=False).logits
    assert_agree(found[:, : sum(LENGTHS)], torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_the_left_and_a_mask(name):
    """Of one document, with the positions that `generate` counts: it is not taken for several."""
    model, ids, images = MODELS[name], random_ids(1, 6), random_images(1, 9)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(input_ids=ids, image_pool=images["image_pool"], image_index=images["image_index"][:, 3:]).logits
    for arguments in ({}, {"use_cache": False}, {"use_cache": True}):
        found = model(input_ids=padded, attention_mask=mask, position_ids=positions, **images, **arguments).logits
        assert_agree(found[:, 3:], expected)


def test_gaps_and_holes_beside_several_documents_are_refused():
    """transformers would split a document there. In a batch without restarts they mean what they mean to the family."""
    model, batch = MODELS["llama"], packed_rows()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 8] = 0  # inside the third document
    with pytest.raises(ValueError, match="one has a gap in its positions or padding inside it"):
        model(**batch, attention_mask=mask)
    gap = batch["position_ids"].clone()
    gap[1, 5:11] += 4
    with pytest.raises(ValueError, match="one has a gap in its positions or padding inside it"):
        model(**batch | {"position_ids": gap})


@torch.no_grad()
def test_a_document_behind_padding():
    model, ids, images = MODELS["llama"], random_ids(1, 9), random_images(1, 9)
    mask, positions = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1]]), torch.tensor([[0, 1, 2, 9, 9, 0, 1, 2, 3]])
    found = model(input_ids=ids, attention_mask=mask, position_ids=positions, **images).logits
    for place in (slice(0, 3), slice(5, 9)):
        own = {"image_pool": images["image_pool"], "image_index": images["image_index"][:, place]}
        assert_agree(found[:, place], model(input_ids=ids[:, place], **own).logits)


@pytest.mark.parametrize("cache", [{"use_cache": True}, {"cache": DynamicCache()}, {"past_key_values": DynamicCache()}])
def test_several_documents_and_a_cache_are_refused(cache):
    with pytest.raises(ValueError, match="several documents in a row, which a cache cannot hold"):
        MODELS["llama"](**packed_rows(), **cache)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("positions", [[3, 4, 5, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0]])
def test_a_document_behind_a_filled_cache_is_refused(positions, masked):
    model, ids = MODELS["llama"], random_ids(1, 9)
    cache = model(input_ids=ids[:, :3], use_cache=True).cache
    given = {"input_ids": ids[:, 3 : 3 + len(positions)], "position_ids": torch.tensor([positions]), "cache": cache}
    if masked:
        given["attention_mask"] = torch.ones(1, 3 + len(positions), dtype=torch.int64)
    with pytest.raises(ValueError, match="several documents in a row, which a cache cannot hold"):
        model(**given)


def test_a_family_that_mixes_documents_is_refused(monkeypatch):
    model = augmented(lambda seed: tiny("jamba"), layer=0)
    ids, positions = random_ids(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    batch = {"input_ids": ids, "position_ids": positions, **random_images(1, 6)}
    with pytest.raises(ValueError, match="JambaModel does not keep documents in a row apart"):
        model(**batch)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="JambaModel does not keep documents in a row apart"):
        model(**batch, use_cache=False)


@pytest.mark.slow
def test_a_compiled_family_that_mixes_documents_is_refused():
    model = augmented(lambda seed: tiny("jamba"), layer=0)
    batch = {"input_ids": random_ids(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), **random_images(1, 6)}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="JambaModel does not keep documents in a row apart"):
        compiled(**batch, use_cache=False)


@torch.no_grad()
def test_what_a_graph_does_with_packed_documents(monkeypatch):
    """The code that is compiled, run as it is: it cannot look at positions."""
    model, batch = MODELS["llama"], packed_rows()
    mask, one = torch.ones_like(batch["input_ids"]), torch.arange(17).expand(2, -1)
    apart, whole = alone(model, batch), model(**batch | {"position_ids": one}).logits
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_agree(model(**batch, use_cache=False).logits, apart)
    for arguments in ({"attention_mask": mask}, {"attention_mask": mask, "use_cache": False}, {}):
        with pytest.raises(RuntimeError, match="which a compiled model keeps apart only without an attention_mask"):
            model(**batch, **arguments)
        found = model(**batch | {"position_ids": one} | arguments).logits
        assert_agree(found, whole)


@pytest.mark.slow
@torch.no_grad()
def test_packed_documents_in_a_compiled_model():
    """A graph cannot look at positions: it separates documents, or ends with an error."""
    model, batch = MODELS["llama"], packed_rows()
    mask, one = torch.ones_like(batch["input_ids"]), torch.arange(17).expand(2, -1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_agree(compiled(**batch, use_cache=False).logits, alone(model, batch))
    for arguments in ({"attention_mask": mask}, {"attention_mask": mask, "use_cache": False}, {}):
        with pytest.raises(RuntimeError, match="which a compiled model keeps apart only without an attention_mask"):
            compiled(**batch, **arguments)
        own = batch | {"position_ids": one} | arguments
        assert_agree(compiled(**own).logits, model(**own).logits)
