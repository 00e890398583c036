"""`Batch`: texts that are read together, against each by itself."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.checks.families import tiny
from tests.tolerance import assert_agree
from tests.valm.model.decoders import IMAGE_DIM, IMAGES, tiny_llama, tiny_minimax, tiny_phi3_longrope
from valm.model.augment import augment
from valm.retrieval.retriever import NoImages
from valm.serving.batch import Batch, can_join, needs_positions, rotates_anew_after


def texts_of(tokenizer, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(0, len(tokenizer) - 2, (1, length), generator=generator)
        ids[0, 0] = tokenizer.bos_token_id
        found.append(ids)
    return found


def alone(model, text, more):
    """Logits (T, V) and images of a text's tokens, one by one behind its first ones."""
    batch = Batch(model)
    seen = [batch.begin(list(text))]
    seen += [batch.read(id[None, None]) for id in more]
    return torch.cat([one.logits[0] for one in seen]), torch.cat([one.image_ids[0, -1:] for one in seen])


def test_rows_that_join_and_leave_are_read_as_alone(served):
    model, tokenizer = served
    lengths, joins, leaves = (5, 31, 12, 3), (0, 2, 2, 7), (20, 9, 20, 15)
    texts = texts_of(tokenizer, lengths)
    more = [
        torch.cat(texts_of(tokenizer, [leave - join], seed=9 + row), 1)[0]
        for row, (join, leave) in enumerate(zip(joins, leaves, strict=True))
    ]
    batch, rows = Batch(model), []
    logits, images = {row: [] for row in range(4)}, {row: [] for row in range(4)}
    for step in range(20):
        if rows:
            kept = [place for place, row in enumerate(rows) if leaves[row] > step]
            if len(kept) < len(rows):
                batch.keep(kept)
                rows = [rows[place] for place in kept]
            seen = batch.read(torch.stack([more[row][step - joins[row] - 1] for row in rows])[:, None])
            for place, row in enumerate(rows):
                logits[row].append(seen.logits[place])
                images[row].append(seen.image_ids[place])
        if new := [row for row in range(4) if joins[row] == step]:  # two of them begin together
            joining = Batch(model)
            seen = joining.begin([texts[row][0] for row in new])
            for place, row in enumerate(new):
                logits[row].append(seen.logits[place])
                images[row].append(seen.image_ids[place, -1:])
            batch.join(joining)
            assert len(joining) == 0
            rows += new
    for row in range(4):
        n = len(logits[row]) - 1
        expected, expected_images = alone(model, texts[row], more[row][:n])
        assert_agree(torch.cat(logits[row]), expected)
        assert torch.equal(torch.cat(images[row]), expected_images)
    assert n > 5


def seeing_nothing(base):
    model = augment(base, num_images=IMAGES, image_dim=IMAGE_DIM).eval()
    model.set_retriever(NoImages(IMAGES, IMAGE_DIM))
    return model


def ignores_padding():
    model = seeing_nothing(tiny_llama())
    prepare = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda ids, attention_mask, **inputs: prepare(
        ids, attention_mask=torch.ones_like(attention_mask), **inputs
    )
    return model


def scales_by_the_longest_row():
    model = seeing_nothing(tiny_llama())
    model.config.get_text_config(decoder=True).attn_temperature_tuning = True
    return model


def tiny_mistral():
    """With a window that the texts below are longer than."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(sliding_window=6, **sizes, **heads)).eval()


@pytest.mark.parametrize(
    ("make", "joins"),
    [
        (lambda: seeing_nothing(tiny_llama()), True),
        (lambda: seeing_nothing(tiny_mistral()), True),
        (lambda: seeing_nothing(tiny_minimax()), False),  # a recurrent state has no positions that could be padding
        (ignores_padding, False),
        (scales_by_the_longest_row, False),
    ],
)
def test_whether_rows_can_be_padded_is_tried(make, joins):
    assert can_join(make()) == joins


@pytest.mark.parametrize("family, needed", [("llama", False), ("bamba", True), ("roberta", False)])
def test_whether_positions_are_needed_is_tried(family, needed):
    """Bamba counts from 0 without them, and RoBERTa otherwise than they say."""
    model = seeing_nothing(tiny(family))
    assert needs_positions(model) == needed
    ids = torch.arange(3, 23)[None]
    batch = Batch(model, needed)
    batch.begin([ids[0, :12]])
    found = torch.cat([batch.read(ids[:, place : place + 1]).logits[0] for place in range(12, 20)])
    whole = Batch(model, needed).begin([ids[0]], all_logits=True).logits[0, 12:]
    assert_agree(found, whole)


def test_keys_are_rotated_anew_as_generate_does():
    """And no rows are joined: the longest would decide for all."""
    model = seeing_nothing(tiny_phi3_longrope())
    assert not can_join(model) and not needs_positions(model)
    most = int(rotates_anew_after(model))
    ids = torch.arange(3, 3 + most - 3)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    batch, found = Batch(model), []
    last = batch.begin([ids[0]]).logits[:, -1].argmax(-1)
    for _ in range(8):
        found.append(int(last))
        last = batch.read(last[None]).logits[:, -1].argmax(-1)
    assert found == expected.tolist()
