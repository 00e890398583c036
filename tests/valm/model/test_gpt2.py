import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from tests.tolerance import assert_agree
from tests.valm.models import (
    BOS,
    EOS,
    VOCAB,
    HashRetriever,
    WholeTextRetriever,
    random_ids,
    random_images,
    random_scores,
    tiny_config,
    tiny_model,
)
from valm.errors import ValmError
from valm.model.augment import fusion_module
from valm.model.gpt2 import VaLMForCausalLM
from valm_kernels import sort_image_slots


def close(actual, expected):
    """Equal up to the order of float32 sums: the logits here have a size of about 10."""
    assert_agree(actual, expected)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def gpt2_with_weights_of(model):
    config = GPT2Config(
        **{k: v for k, v in model.config.to_dict().items() if k in GPT2Config().to_dict() and k != "model_type"}
    )
    gpt2 = GPT2LMHeadModel(config).eval()
    names = gpt2.load_state_dict(model.state_dict(), strict=False)
    assert not names.missing_keys
    return gpt2, names.unexpected_keys


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("inverse", [False, True])
def test_without_pictures_it_is_gpt2(attention, inverse):
    model = tiny_model(num_images=0, scale_attn_by_inverse_layer_idx=inverse)
    model.set_attn_implementation(attention)
    gpt2, other = gpt2_with_weights_of(model)
    assert other == []
    ids = random_ids(3, 20)
    out = model(ids, labels=ids)
    expected = gpt2(ids, labels=ids)
    close(out.logits, expected.logits)
    close(out.loss, expected.loss)


def test_one_seed_gives_valm_and_gpt2_the_same_shared_weights():
    torch.manual_seed(5)
    valm = VaLMForCausalLM(tiny_config()).state_dict()
    torch.manual_seed(5)
    gpt2 = VaLMForCausalLM(tiny_config(num_images=0)).state_dict()
    assert set(gpt2) < set(valm)
    for name, weight in gpt2.items():
        assert torch.equal(weight, valm[name]), name
    assert valm["transformer.h.1.attn.image_fusion.proj.weight"].std() > 0.1
    # GPT-2's scheme: what adds to the residual stream starts smaller by sqrt(2 x layers)
    for name in ("h.0.attn.c_proj", "h.1.attn.c_proj", "h.2.mlp.c_proj"):
        assert gpt2[f"transformer.{name}.weight"].std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)


def test_one_seed_gives_valm_and_gpt2_the_same_dropout():
    """Building either draws the same random numbers, and so does training it."""
    found = []
    for num_images in (3, 0):
        torch.manual_seed(5)
        model = VaLMForCausalLM(tiny_config(num_images=num_images, logit_bias=-1e4)).train()
        ids = random_ids(2, 12)
        pool, index = random_images(tiny_config(), 2, 12)
        images = {"image_pool": pool, "image_index": index} if num_images else {}
        found.append((model(ids, labels=ids, **images).loss, torch.rand(3)))
    close(*(loss for loss, _ in found))
    assert found[0][1].equal(found[1][1])


def test_a_future_token_changes_no_earlier_logit(model):
    ids = random_ids(2, 12)
    pool, index = random_images(model.config, 2, 12)
    before = model(ids, image_pool=pool, image_index=index).logits
    changed = ids.clone()
    changed[:, 7] = (ids[:, 7] + 1) % BOS
    after = model(changed, image_pool=pool, image_index=index).logits
    assert torch.equal(after[:, :7], before[:, :7])
    assert (after[:, 7:] - before[:, 7:]).abs().amax(-1).min() > 1e-4


def test_a_tokens_pictures_change_its_own_logits_and_those_after_it_only(model):
    ids = random_ids(2, 12)
    pool, index = random_images(model.config, 2, 12)
    before = model(ids, image_pool=pool, image_index=index).logits
    changed = index.clone()
    changed[:, 7] = (index[:, 7] + 2) % len(pool)
    after = model(ids, image_pool=pool, image_index=changed).logits
    assert torch.equal(after[:, :7], before[:, :7])
    assert (after[:, 7] - before[:, 7]).abs().amax(-1).min() > 1e-3
    assert (after[:, 8:] - before[:, 8:]).abs().max() > 1e-4  # through the block after the fusion block


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side, attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    lengths = [9, 4, 1]
    pool, index = random_images(model.config, 3, 9)
    ids = torch.full((3, 9), EOS)
    mask = torch.zeros(3, 9, dtype=torch.int64)
    rows = [random_ids(1, n, seed=n)[0] for n in lengths]
    where = [slice(9 - n, 9) if side == "left" else slice(0, n) for n in lengths]
    for i, (row, place) in enumerate(zip(rows, where, strict=True)):
        ids[i, place], mask[i, place] = row, 1
    logits = model(ids, mask, image_pool=pool, image_index=index).logits
    assert logits.isfinite().all()
    for i, (row, place) in enumerate(zip(rows, where, strict=True)):
        alone = model(row[None], image_pool=pool, image_index=index[i : i + 1, place]).logits
        close(logits[i : i + 1, place], alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    lengths = (5, 1, 8, 3)
    documents = [random_ids(1, n, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    pool, index = random_images(model.config, 1, 17)
    packed = model(torch.cat(documents, 1), position_ids=positions, image_pool=pool, image_index=index).logits
    begin = 0
    for document in documents:
        end = begin + document.shape[1]
        alone = model(document, image_pool=pool, image_index=index[:, begin:end]).logits
        close(packed[:, begin:end], alone)
        begin = end


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("way", ["positions", "one row of positions", "a mask", "padding"])
def test_documents_without_bos_are_told_apart_by_positions(attention, found, way):
    """As DataCollatorWithFlattening gives them; some begin with bos too, and some do not."""
    model = tiny_model()
    model.set_attn_implementation(attention)
    if found:
        model.set_retriever(WholeTextRetriever(BOS))
    lengths, padding = (5, 1, 8, 3), 2 if way == "padding" else 0
    ids = random_ids(2, 17 + padding)
    ids[:, 0] = 5
    ids[:, 6] = BOS
    pool, index = random_images(model.config, 2, 17 + padding)
    positions = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.int64)]).expand(2, -1)
    batch = {"input_ids": ids, "position_ids": positions[:1] if way == "one row of positions" else positions}
    if way in ("a mask", "padding"):
        batch["attention_mask"] = (torch.arange(17 + padding) < 17).long().expand(2, -1)
    images = {} if found else {"image_pool": pool, "image_index": index}
    packed = model(**batch, **images).logits
    begin = 0
    for length in lengths:
        place = slice(begin, begin + length)
        own = {} if found else {"image_pool": pool, "image_index": index[:, place]}
        close(packed[:, place], model(ids[:, place], **own).logits)
        begin += length


@torch.no_grad()
def test_a_document_by_its_positions_behind_a_cache_is_refused(model):
    ids, positions = random_ids(2, 9), torch.arange(9).expand(2, -1)
    cache = model(ids[:, :5], use_cache=True).cache
    with pytest.raises(ValueError, match=r"position_ids restart, .* which a cache cannot hold"):
        model(ids[:, 5:], position_ids=positions[:, :4], cache=copy.deepcopy(cache))
    expected = model(ids).logits[:, 5:]
    close(model(ids[:, 5:], position_ids=positions[:, 5:], cache=cache).logits, expected)


def test_packed_documents_may_be_longer_than_the_positions_together(model):
    positions = torch.arange(20).repeat(3)[None]
    assert model(random_ids(1, 20).repeat(1, 3), position_ids=positions).logits.shape == (1, 60, VOCAB)
    padded = torch.cat([random_ids(1, 20), torch.full((1, 40), EOS)], 1)
    logits = model(padded, torch.arange(60)[None] < 20).logits
    close(logits[:, :20], model(padded[:, :20]).logits)
    with pytest.raises(ValueError, match="a document of at least 33 tokens"):
        model(random_ids(1, 33))


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_reading_in_pieces_with_the_cache_equals_reading_at_once(chunks, attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    ids = random_ids(3, 12)
    mask = torch.ones_like(ids)
    ids[2, :4], mask[2, :4] = EOS, 0  # left padding
    ids[2, 4] = BOS
    pool, index = random_images(model.config, 3, 12)
    expected = model(ids, mask, image_pool=pool, image_index=index).logits
    cache, begin, logits = None, 0, []
    for chunk in chunks:
        end = begin + chunk
        out = model(
            ids[:, begin:end],
            mask[:, :end],
            image_pool=pool,
            image_index=index[:, begin:end],
            cache=cache,
            use_cache=True,
        )
        cache, begin = out.cache, end
        logits.append(out.logits)
    real = mask.bool()
    close(torch.cat(logits, 1)[real], expected[real])


def greedy(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_with_a_retriever_equals_reading_it_all_again(use_cache):
    model = tiny_model()
    model.set_retriever(HashRetriever(BOS))
    ids = random_ids(3, 5)
    expected = greedy(model, ids, 10)
    out = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None, use_cache=use_cache)
    assert torch.equal(out, expected)
    model.set_retriever(None)
    assert not torch.equal(greedy(model, ids, 10), expected)


def test_generate_continues_left_padded_prompts_as_it_does_each_alone():
    model = tiny_model()
    model.set_retriever(HashRetriever(BOS))
    prompts = [random_ids(1, n, seed=n) for n in (6, 3)]
    padded = torch.cat([prompts[0], torch.cat([torch.full((1, 3), EOS), prompts[1]], 1)])
    mask = torch.ones_like(padded)
    mask[1, :3] = 0
    out = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for row, prompt in zip(out, prompts, strict=True):
        alone = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert torch.equal(row[-8:], alone[0, -8:])


def test_beam_search_moves_cache_and_retriever_together():
    model = tiny_model()
    model.set_retriever(HashRetriever(BOS))
    ids = random_ids(2, 5)
    arguments = {"max_new_tokens": 8, "num_beams": 4, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(ids, **arguments)
    assert torch.equal(with_cache, model.generate(ids, **arguments, use_cache=False))
    assert not torch.equal(with_cache, model.generate(ids, **(arguments | {"num_beams": 1})))


def test_save_and_load(tmp_path, model):
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, VaLMForCausalLM)
    ids = random_ids(2, 6)
    pool, index = random_images(model.config, 2, 6)
    assert torch.equal(
        loaded(ids, image_pool=pool, image_index=index).logits, model(ids, image_pool=pool, image_index=index).logits
    )


def test_fusion_attention_gives_the_weights_of_the_forward_pass(model):
    ids = random_ids(2, 6)
    pool, index = random_images(model.config, 2, 6)
    text, images = model.fusion_attention(ids, pool, index)
    assert text.shape == (2, 4, 6, 6) and images.shape == (2, 4, 6, 3)
    close(text.sum(-1) + images.sum(-1), torch.ones(2, 4, 6))
    with torch.no_grad():  # a closed head gives pictures no weight
        closed = tiny_model()
        fusion_module(closed).logit_bias_delta.fill_(-1e4)
    assert closed.fusion_attention(ids, pool, index)[1].max() == 0
    assert (images.sum(-1) > 0).any()


def test_fusion_attention_where_no_images_were_found(model):
    ids = random_ids(2, 6)
    text, images = model.fusion_attention(
        ids, torch.zeros(0, model.fusion_options.image_dim), torch.full((2, 6, 3), -1)
    )
    close(text.sum(-1), torch.ones(2, 4, 6))
    assert images.sum() == 0


def test_all_parameters_learn():
    model = tiny_model().train()
    ids = random_ids(2, 8)
    pool, index = random_images(model.config, 2, 8)
    model(ids, image_pool=pool, image_index=index, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("way", ["bfloat16", "autocast", "float64"])
def test_other_precisions_give_the_same_loss(way):
    model = tiny_model()
    ids = random_ids(4, 8)
    pool, index = random_images(model.config, 4, 8)
    pool = pool.half()  # as the collator gives it
    expected = model(ids, image_pool=pool, image_index=index, labels=ids).loss.item()
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, image_pool=pool, image_index=index, labels=ids).loss
    else:
        loss = model.to(getattr(torch, way))(ids, image_pool=pool, image_index=index, labels=ids).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    # bfloat16 has 8 bits: a relative error of 2^-8 a rounding, in a handful of layers
    assert loss.item() == pytest.approx(expected, rel=1e-6 if way == "float64" else 8 * 2**-8)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = random_ids(2, 8)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        pool, index = random_images(model.config, 2, 8)
        model(ids, image_pool=pool, image_index=index, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_pool": torch.zeros(3, 24)}, "must be given together"),
        ({"image_pool": torch.zeros(3, 25), "image_index": torch.zeros(2, 5, 3).long()}, "image_dim = 24"),
        ({"image_pool": torch.zeros(3, 24), "image_index": torch.zeros(2, 4, 3).long()}, "image_index must have shape"),
        ({"image_pool": torch.zeros(3, 24), "image_index": torch.full((2, 5, 3), 3)}, "image_index must be -1"),
    ],
)
def test_wrong_inputs_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 5), **arguments)


def test_image_slots_reach_the_operator():
    """On the CPU it raises where they belong to another image_index, and they change nothing."""
    model, ids = tiny_model(), random_ids(2, 5)
    pool, index = random_images(model.config, 2, 5)
    images = {"image_pool": pool, "image_index": index}
    slots = sort_image_slots(index, len(pool))
    with torch.no_grad():
        assert model(ids, **images, image_slots=slots).logits.equal(model(ids, **images).logits)
        with pytest.raises(ValueError, match="image_slots does not belong to this image_index"):
            model(ids, **images, image_slots=slots.flip(0))
    with pytest.raises(ValueError, match="image_slots must be given together with image_pool and image_index"):
        model(ids, image_slots=slots)


SCORED = {"image_pool": torch.zeros(3, 24), "image_index": torch.zeros(2, 5, 3).long()}


@pytest.mark.parametrize(
    "scale, arguments, message",
    [
        (None, SCORED | {"image_scores": torch.zeros(2, 5, 3)}, "a model that does not use retrieval scores"),
        (1.0, {"image_scores": torch.zeros(2, 5, 3)}, "image_scores must be given together with image_pool"),
        (1.0, SCORED, "image_scores must be given with the images"),
        (1.0, SCORED | {"image_scores": torch.zeros(2, 5, 2)}, r"image_scores .* \(2, 5, 3\), got .* \(2, 5, 2\)"),
        (1.0, SCORED | {"image_scores": torch.zeros(2, 5, 3).long()}, "image_scores must be float .* got torch.int64"),
    ],
)
def test_wrong_scores_are_named(scale, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(score_scale=scale)(random_ids(2, 5), **arguments)


def test_retrieval_scores_are_part_of_the_model(tmp_path):
    """The scale learns, is saved and loaded, and every way to images brings their scores."""
    model = tiny_model(score_scale=1.5)
    ids = random_ids(2, 8)
    pool, index = random_images(model.config, 2, 8)
    images = {"image_pool": pool, "image_index": index, "image_scores": random_scores(index)}
    model(ids, **images, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    expected = model(ids, **images).logits
    none = tiny_model()
    none.load_state_dict(model.state_dict(), strict=False)
    assert (expected - none(ids, image_pool=pool, image_index=index).logits).abs().max() > 1e-2
    text, weights = model.fusion_attention(ids, **images)
    close(text.sum(-1) + weights.sum(-1), torch.ones(2, 4, 8))
    assert not weights.equal(none.fusion_attention(ids, pool, index)[1])

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.fusion_options.score_scale == 1.5
    assert fusion_module(loaded).score_scale_delta.equal(fusion_module(model).score_scale_delta)
    assert torch.equal(loaded(ids, **images).logits, expected)

    retriever = HashRetriever(BOS)
    found = retriever(ids)
    given = model(ids, image_pool=found.image_pool, image_index=found.image_index, image_scores=found.scores).logits
    model.set_retriever(retriever)
    assert torch.equal(model(ids).logits, given)
    again = ids
    for _ in range(6):
        again = torch.cat([again, model(again).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None), again)


def bos_inside(ids):
    ids[1, 3] = BOS
    return {}


def bos_behind_padding(ids):
    ids[1, 3] = BOS
    return {"attention_mask": (torch.arange(9) > 0).long().expand(2, -1)}


def padding_inside(ids):
    mask = torch.ones_like(ids)
    mask[1, 4:6] = 0
    return {"attention_mask": mask}


def cached(ids):
    return {"cache": tiny_model()(ids, use_cache=True).cache}


@torch.no_grad()
@pytest.mark.parametrize(
    "change, what",
    [
        (bos_inside, "a start token"),
        (bos_behind_padding, "a start token"),
        (cached, "a start token"),
        (padding_inside, "text behind padding"),
    ],
)
def test_a_row_that_seems_to_have_several_documents_is_named(change, what):
    """Once, as it is read as one; it was several documents to an earlier version."""
    model, ids = tiny_model(), random_ids(2, 9)
    given = change(ids)
    with pytest.warns(UserWarning, match=rf"a row has {what} behind other text, and is read as one document"):
        model(ids, **copy.deepcopy(given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, **copy.deepcopy(given))
    model.strict = True
    with pytest.raises(ValueError, match=rf"a row has {what} behind other text"):
        model(ids, **given)


@torch.no_grad()
def test_a_row_of_one_document_is_not_named():
    model, ids = tiny_model(), random_ids(2, 9)
    model.strict = True
    model.set_retriever(HashRetriever(BOS))
    for side in (slice(0, 2), slice(7, 9)):
        padded, mask = ids.clone(), torch.ones_like(ids)
        padded[1, side], mask[1, side] = EOS, 0
        padded[1, 2] = BOS if side.start == 0 else padded[1, 2]
        model(padded, attention_mask=mask)
    packed = ids.clone()
    packed[:, 4] = BOS
    model(packed, position_ids=(torch.arange(9) % 4).clamp(max=8)[None].expand(2, -1), use_cache=False)
    model.generate(packed, max_new_tokens=2, eos_token_id=None)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("make", [lambda config: None, lambda config: DynamicCache(), lambda c: DynamicCache(config=c)])
def test_a_cache_under_either_name_of_transformers(name, make):
    model = tiny_model()
    model.set_retriever(HashRetriever(BOS))
    ids = random_ids(2, 9)
    out = model(ids[:, :5], use_cache=True, **{name: make(model.config)})
    expected = model(ids).logits[:, 5:]
    close(model(ids[:, 5:], **{name: copy.deepcopy(out[name])}).logits, expected)
    out[name].batch_select_indices(torch.tensor([1]))
    close(model(ids[1:, 5:], **{name: out[name]}).logits, expected[1:])


@pytest.mark.parametrize("arguments", [{"guidance_scale": 3.0}, {"prefill_chunk_size": 2}, {"num_beams": 3}])
def test_generate_with_and_without_a_cache(arguments):
    model = tiny_model()
    model.set_retriever(HashRetriever(BOS))
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = random_ids(2, 6)
    with_cache = model.generate(ids, **greedy, **arguments)
    arguments.pop("prefill_chunk_size", None)
    assert torch.equal(with_cache, model.generate(ids, **greedy, **arguments, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(config=tiny_config(), max_cache_len=12)])
def test_a_failed_pass_leaves_the_cache_as_it_was(make):
    model = tiny_model()
    ids, other = random_ids(1, 9), random_ids(1, 4, seed=1)
    pool, index = random_images(model.config, 1, 9)
    cache = make()
    for part in (slice(0, 4), slice(4, 9)):
        with pytest.raises(ValueError, match="image_pool must have shape"):
            model(other, image_pool=pool[:, 1:], image_index=index[:, :4], cache=cache)
        found = model(ids[:, part], image_pool=pool, image_index=index[:, part], cache=cache).logits
        close(found, model(ids, image_pool=pool, image_index=index).logits[:, part])


def test_padding_sees_no_images():
    """Its last token predicts the first of the text, so images there would change the loss."""
    model, ids = tiny_model(), random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    pool, index = random_images(model.config, 2, 8)
    other = index.clone()
    other[0, :3] = (other[0, :3] + 1).clamp(min=0)
    labels = ids.masked_fill(mask == 0, -100)
    first, second = (model(ids, mask, pool, i, labels=labels).loss for i in (index, other))
    assert first.equal(second)
    assert model.fusion_attention(ids, pool, index, mask)[1][0, :, :3].max() == 0


@torch.no_grad()
@pytest.mark.parametrize("num_images", [0, 3])
def test_a_static_cache(num_images):
    """By forward and by generate, with padding."""
    model = tiny_model(num_images=num_images)
    if num_images:
        model.set_retriever(HashRetriever(BOS))
    ids = random_ids(3, 9)
    mask = torch.ones_like(ids)
    ids[2, :4], mask[2, :4], ids[2, 4] = EOS, 0, BOS
    greedy = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **greedy)
    assert model.generate(ids, **greedy, cache_implementation="static").equal(expected)
    cache = StaticCache(config=model.config, max_cache_len=12)
    logits = [model(ids[:, a:b], mask[:, :b], cache=cache).logits for a, b in ((0, 5), (5, 6), (6, 9))]
    present = mask.bool()
    close(torch.cat(logits, 1)[present], model(ids, mask).logits[present])


def test_assisted_decoding_is_refused():
    model = tiny_model()
    model.set_retriever(HashRetriever(BOS))
    with pytest.raises(ValueError, match="Assisted decoding requires a cache that can be cropped"):
        model.generate(random_ids(1, 6), max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_a_new_scale_begins_at_its_initial_value():
    model = VaLMForCausalLM(tiny_config(score_scale=2.5))
    assert fusion_module(model)(torch.zeros(1, model.fusion_options.image_dim)).score_scale.tolist() == [2.5]


def test_gpt2_refuses_pictures(model):
    with pytest.raises(ValueError, match="num_images = 0"):
        tiny_model(num_images=0)(
            random_ids(1, 3), image_pool=torch.zeros(3, 24), image_index=torch.zeros(1, 3, 3).long()
        )
    with pytest.raises(ValueError, match="num_images = 0"):
        tiny_model(num_images=0).fusion_attention(random_ids(1, 3), torch.zeros(3, 24), torch.zeros(1, 3, 3).long())
    restarting = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match=r"position_ids restart, .* which a cache cannot hold: call with use_cache"):
        model(random_ids(1, 5), position_ids=restarting, use_cache=True)
    model(random_ids(1, 5), position_ids=restarting, use_cache=False)
    padded = torch.tensor([[1, 1, 0, 1, 2]])  # as transformers counts behind padding
    model(random_ids(1, 5), attention_mask=torch.tensor([[0, 0, 1, 1, 1]]), position_ids=padded, use_cache=True)


@pytest.mark.parametrize("name, value", [("k", 5), ("dim", 7)])
def test_a_retriever_that_does_not_fit_is_refused(model, name, value):
    retriever = HashRetriever(BOS)
    setattr(retriever, name, value)
    with pytest.raises(ValmError, match=rf"retriever.{name} is {value}, but this model was made for"):
        model.set_retriever(retriever)


def test_hidden_states_and_embeddings():
    model, ids = tiny_model(), random_ids(2, 6)
    pool, index = random_images(model.config, 2, 6)
    out = model(ids, image_pool=pool, image_index=index, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    close(model.lm_head(out.hidden_states[-1]), out.logits)
    close(out.hidden_states[0], model.transformer.wte(ids) + model.transformer.wpe(torch.arange(6)))
    assert model(ids, image_pool=pool, image_index=index).hidden_states is None
    gpt2, _ = gpt2_with_weights_of(tiny_model(num_images=0))
    expected = gpt2(ids, output_hidden_states=True).hidden_states
    for mine, other in zip(
        tiny_model(num_images=0)(ids, output_hidden_states=True).hidden_states, expected, strict=True
    ):
        close(mine, other)
    embeds = model.transformer.wte(ids)
    close(model(inputs_embeds=embeds, image_pool=pool, image_index=index).logits, out.logits)
    with pytest.raises(ValueError, match=r"call fusion_attention\(\)"):
        model(ids, output_attentions=True)


@pytest.mark.parametrize("images", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_it_compiles_to_one_graph(images):
    model, ids = tiny_model(), random_ids(2, 6)
    pool, index = random_images(model.config, 2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    arguments = {"image_pool": pool, "image_index": index} if images else {}
    close(compiled(ids, **arguments).logits, model(ids, **arguments).logits)
