"""`StreamedText`."""

import random

import pytest

from tests.valm.other_tokenizers import chat_like, gpt2_like, llama_like
from valm.clip.tokenizer import prompt_ids
from valm.serving.text import StreamedText


def written(tokenizer, prompt, text, stop=()):
    """The parts of `text`, as if a model said it after `prompt`, and whether it is ended."""
    begin = prompt_ids(tokenizer, prompt)
    whole = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    ids = begin[:1] + whole
    assert ids[: len(begin)] == begin
    streamed, parts = StreamedText(tokenizer, begin, stop), []
    for id in ids[len(begin) :]:
        parts.append(streamed.add(id))
        if streamed.stopped:
            break
    parts.append(streamed.rest())
    return [part for part in parts if part], streamed.stopped


@pytest.mark.parametrize("make_tokenizer", [gpt2_like, llama_like])
def test_parts_are_whole_characters(make_tokenizer):
    parts, stopped = written(make_tokenizer(), "the sky", " is na\u00efve \u4f60\u597d \U0001f600 blue\ufffd")
    assert "".join(parts) == " is na\u00efve \u4f60\u597d \U0001f600 blue\ufffd" and not stopped
    assert "\ufffd" not in "".join(parts[:-1]) and len(parts) > 5


def test_a_special_token_is_a_stop_text_too():
    """Which is not in the text that is written."""
    tokenizer = chat_like()
    parts, stopped = written(tokenizer, "the sky", " is blue<|endoftext|> and green", ("<|endoftext|>",))
    assert stopped and "".join(parts) == " is blue"
    parts, stopped = written(tokenizer, "the sky", " is blue<|endoftext|> and green", ("<unk>",))
    assert not stopped and "".join(parts) == " is blue and green"


@pytest.mark.parametrize("make_tokenizer", [gpt2_like, llama_like])
def test_stop_texts_of_characters_of_several_tokens(make_tokenizer):
    """An answer ends where the first stop text begins, wherever its tokens do."""
    tokenizer, draw = make_tokenizer(), random.Random(0)
    parts, stopped = written(tokenizer, "x", " a\U0001f34c\U0001f34eb", ("\U0001f34c\U0001f34e",))
    assert stopped and "".join(parts) == " a"
    letters = "a b\U0001f34c\U0001f34e\u00e9\u6f22"
    for _ in range(200):
        text = " " + "".join(draw.choices(letters, k=12))
        stop = tuple("".join(draw.choices(letters, k=draw.randint(1, 3))) for _ in range(2))
        parts, stopped = written(tokenizer, "x", text, stop)
        ends = [place for one in stop if (place := text.find(one)) >= 0]
        assert stopped == bool(ends) and "".join(parts) == text[: min(ends, default=len(text))]
