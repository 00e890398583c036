import asyncio

import pytest
import torch

from tests.valm.other_tokenizers import chat_like, gpt2_like, llama_like
from tests.valm.tiny_clip import TEXTS
from valm.clip.tokenizer import prompt_ids
from valm.serving.engine import BusyError, Engine, Prompt, StoppingError, _Writer


async def text_of(answer) -> str:
    return "".join([part async for part in answer])


def served_together(engine, prompts):
    """Text, number of tokens and reason of each."""

    async def ask():
        answers = [engine.submit(prompt) for prompt in prompts]
        texts = await asyncio.gather(*map(text_of, answers))
        return [(text, answer.num_tokens, answer.finish_reason) for text, answer in zip(texts, answers, strict=True)]

    return asyncio.run(ask())


def unserved(model, tokenizer, prompt):
    """The same by `generate`."""
    if prompt.seed is not None:
        torch.manual_seed(prompt.seed)
    options = {"do_sample": prompt.temperature > 0}
    if options["do_sample"]:
        options |= {"temperature": prompt.temperature, "top_p": prompt.top_p, "top_k": 0}
    ids = torch.tensor([prompt.ids])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=prompt.max_new_tokens, **options)
    texts = [tokenizer.decode(each, skip_special_tokens=True) for each in (prompt.ids, found[0])]
    ended = found[0, -1] == tokenizer.eos_token_id
    return texts[1].removeprefix(texts[0]), found.shape[1] - len(prompt.ids), "stop" if ended else "length"


@pytest.fixture
def seen(served, monkeypatch):
    """The images of every forward pass, in order."""
    finder, found = served[0].finder, []
    find = finder.find_images

    def recorded(*arguments):
        pool, index, scores = find(*arguments)
        found.append((pool[index], index < 0))
        return pool, index, scores

    monkeypatch.setattr(finder, "find_images", recorded)
    return found


def test_requests_at_once_are_answered_as_each_alone(served, seen, monkeypatch):
    """With their own images, bit by bit, though segments of others are cached; and their own random numbers."""
    model, tokenizer = served
    words = TEXTS[1].split()
    texts = [" ".join(words[:n]) for n in (3, 20, 9, 20)] + [TEXTS[0], " ".join(TEXTS)]
    prompts = []
    for number, text in enumerate(texts):
        sampled = {"temperature": 1.5, "top_p": 0.9, "seed": number} if number % 2 else {}
        prompts.append(Prompt(prompt_ids(tokenizer, text), 6 + number, **sampled))
    expected = []
    for prompt in prompts:
        model.retriever.cache.clear()
        expected.append(unserved(model, tokenizer, prompt))
    alone = list(seen)
    seen.clear()
    assert served_together(Engine(model, tokenizer, len(prompts)), prompts) == expected
    assert len(seen) == len(alone) > 30
    assert all(
        torch.equal(*parts) for one, other in zip(seen, alone, strict=True) for parts in zip(one, other, strict=True)
    )
    assert any(torch.unique(images.flatten(0, 2), dim=0).shape[0] > 3 for images, _ in seen)
    assert model.retriever.cache.hits > 0


def test_a_conversation_is_answered_as_without_a_cache(served):
    model, tokenizer = served
    engine = Engine(model, tokenizer, 0)
    text = TEXTS[0]
    for turn in range(3):
        prompt = Prompt(prompt_ids(tokenizer, text), 8)
        (answer,) = served_together(engine, [prompt])
        hits = model.retriever.cache.hits
        model.retriever.cache.clear()
        assert answer == unserved(model, tokenizer, prompt)
        assert turn == 0 or hits > 0
        text += answer[0] + " a small boat. and then: a lemon."


class Collected:
    """An answer whose parts are here at once."""

    def __init__(self, prompt):
        self.prompt, self.parts, self.cancelled = prompt, [], False

    def put(self, part):
        self.parts.append(part)


def written(tokenizer, prompt, text, stop=()):
    """The parts of `text`, as if a model said it after `prompt`, and whether it is ended."""
    begin = prompt_ids(tokenizer, prompt)
    whole = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    ids = begin[:1] + whole
    assert ids[: len(begin)] == begin
    answer = Collected(Prompt(begin, 100, stop=stop))
    writer = _Writer(answer, tokenizer)
    for end in range(len(begin) + 1, len(ids) + 1):
        if writer(torch.tensor([ids[:end]]), None).all():
            break
    writer.write_rest()
    return answer.parts, writer.stopped


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


@pytest.mark.parametrize(
    "stop, expected", [(("grass",), " is blue! the "), (("zebra", "e! t"), " is blu"), ((" is",), "")]
)
def test_nothing_of_a_stop_text_is_written(stop, expected):
    parts, stopped = written(gpt2_like(), "the sky", " is blue! the grass is green", stop)
    assert stopped and "".join(parts) == expected


def test_what_only_begins_as_a_stop_text_is_written():
    parts, stopped = written(gpt2_like(), "the sky", " is blue! the gras", ("grass",))
    assert not stopped and "".join(parts) == " is blue! the gras"


def test_cancelled_answers_end_before_their_next_token(letters):
    async def ask():
        engine = Engine(letters, letters, 5)
        running, waiting, last = (engine.submit(Prompt([1], 4)) for _ in range(3))
        engine.cancel(waiting)
        letters.go.release(1)
        async for part in running:
            assert part == "a"
            engine.cancel(running)
            letters.go.release(5)  # one for the token that ends it, four for the last request
        assert running.num_tokens <= 2 and waiting.num_tokens == 0
        assert await text_of(last) == "abcd"
        await engine.join()

    asyncio.run(ask())


def test_more_requests_than_may_wait_are_refused(letters):
    async def ask():
        engine = Engine(letters, letters, 2)
        answers = [engine.submit(Prompt([1], 1)) for _ in range(3)]
        with pytest.raises(BusyError):
            engine.submit(Prompt([1], 1))
        letters.go.release(4)
        assert await asyncio.gather(*map(text_of, answers)) == ["a"] * 3
        assert await text_of(engine.submit(Prompt([1], 1))) == "a"

    asyncio.run(ask())


def test_the_end_is_told_to_all_at_once(letters):
    async def ask():
        engine = Engine(letters, letters, 5)
        answers = [engine.submit(Prompt([1], 4)) for _ in range(3)]
        engine.end()
        for answer in answers:
            with pytest.raises(StoppingError):
                await text_of(answer)
        with pytest.raises(StoppingError):
            engine.submit(Prompt([1], 4))
        letters.go.release(1)
        await asyncio.wait_for(engine.join(), 30)

    asyncio.run(ask())


class Panic(BaseException):
    """As a library in Rust raises."""


@pytest.mark.parametrize("error", [RuntimeError("no"), Panic("no")])
def test_an_error_is_that_of_its_request_alone(letters, error):
    async def ask():
        engine = Engine(letters, letters, 5)
        letters.error = error
        first = engine.submit(Prompt([1], 2))
        letters.go.release(1)
        with pytest.raises(RuntimeError, match="no"):
            await text_of(first)
        letters.error = None
        letters.go.release(2)
        assert await text_of(engine.submit(Prompt([1], 2))) == "ab"

    asyncio.run(ask())
