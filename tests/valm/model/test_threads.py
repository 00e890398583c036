"""Models that threads share: every call returns what it does alone."""

import sys
from functools import partial

import torch

from tests.threads import THREADS, at_once
from tests.valm.model.decoders import each_model, random_images
from tests.valm.models import HashRetriever, random_ids

ROUNDS = 3
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}


@each_model
def test_a_model(make, monkeypatch):
    """Read with images, without any and for its weights, and generating with a retriever."""
    model = make()
    model.set_retriever(HashRetriever())
    no_images = {"image_pool": torch.zeros(0, 24), "image_index": torch.full((2, 7, 3), -1)}

    def calls(thread):
        ids, images = random_ids(2, 7, thread), random_images(2, 7, seed=thread)
        with torch.no_grad():
            yield model(ids, **images).logits
            yield model(ids, **no_images).logits
            yield model.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True).logits[-1]
            yield torch.cat(model.fusion_attention(ids, **images), -1)

    expected = [list(calls(thread)) for thread in range(THREADS)]

    def use(thread):
        for _ in range(ROUNDS):
            for found, right in zip(calls(thread), expected[thread], strict=True):
                torch.testing.assert_close(found, right)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        at_once(*[partial(use, thread) for thread in range(THREADS)])
    finally:
        sys.setswitchinterval(interval)
