"""Captions in context: which images' captions stand before a question, and what they say."""

import types

import torch

from studies.color.captions import Captions, captioned, captions_line
from studies.color.pictures import Picture
from studies.color.questions import validation_questions
from tests.studies.color.test_scoring import THINGS, EveryImage
from tests.valm.other_tokenizers import gpt2_like

PICTURES = [
    Picture("a.png", "apple", "drawn", "apple", "red", None),
    Picture("b.png", "A man.\nSomebody.", "photos", None, None, None),
]
KB = types.SimpleNamespace(item=lambda image: types.SimpleNamespace(uri=PICTURES[image].file))


def test_a_caption_says_its_colour_only_where_it_may():
    assert [Captions(KB, PICTURES)(image) for image in (0, 1)] == ["red apple", "A man."]


def test_a_question_stands_behind_the_captions_of_its_last_tokens_images():
    retriever = EveryImage()
    retriever.encoder = types.SimpleNamespace(tokenizer=gpt2_like())

    def find(ids, mask):
        images = retriever(ids).image_index.clone()
        images[:, :-1] = 1  # of the other tokens of the longest
        images[mask == 0] = -1
        last = mask.sum(1) - 1
        images[range(len(ids)), last] = 0
        images[range(len(ids)), last, 1] = -1
        return images, torch.zeros(images.shape)

    retriever.find = find
    asked = validation_questions(THINGS)
    found = captioned(asked, retriever, Captions(KB, PICTURES))
    line = captions_line(["red apple"])
    assert found.texts == tuple(tuple(line + text for text in row) for row in asked.texts)
    assert (found.right, found.candidates) == (asked.right, asked.candidates)
