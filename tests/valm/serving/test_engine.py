import asyncio

import pytest
import torch

from tests.tolerance import assert_agree
from tests.valm.tiny_clip import TEXTS
from valm.clip.tokenizer import prompt_ids
from valm.errors import ValmError
from valm.serving import engine as engine_module
from valm.serving.batch import Batch
from valm.serving.engine import BusyError, Engine, Prompt, StoppingError


async def text_of(answer) -> str:
    return "".join([part async for part in answer])


def served_together(model, tokenizer, prompts, **options):
    """Tokens, reason and images of each."""

    async def ask():
        engine = Engine(model, tokenizer, len(prompts), **options)
        answers = engine.submit(*prompts)
        await asyncio.gather(*map(text_of, answers))
        engine.end()
        await asyncio.to_thread(engine._thread.join, 30)
        return [([score.id for score in answer.scores], answer.finish_reason, answer.images) for answer in answers]

    return asyncio.run(ask())


def unserved(model, tokenizer, prompt):
    """Tokens and reason by `generate`, of a greedy one."""
    ids = torch.tensor([prompt.ids])
    options = {"max_new_tokens": prompt.max_new_tokens, "do_sample": False}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    new = found[0, len(prompt.ids) :].tolist()
    return new, "stop" if new[-1] == tokenizer.eos_token_id else "length"


def prompts_of(tokenizer):
    words = TEXTS[1].split()
    texts = [" ".join(words[:n]) for n in (3, 20, 9, 20)] + [TEXTS[0], " ".join(TEXTS)]
    prompts = []
    for number, text in enumerate(texts):
        sampled = {"temperature": 1.5, "top_p": 0.9, "seed": number} if number % 2 else {}
        prompts.append(Prompt(prompt_ids(tokenizer, text), 4 + number, logprobs=0, **sampled))
    return prompts


def test_requests_at_once_are_answered_as_each_alone(served):
    """With their own images and random numbers; a greedy one as `generate` does."""
    model, tokenizer = served
    prompts = prompts_of(tokenizer)
    alone = [served_together(model, tokenizer, [prompt])[0] for prompt in prompts]
    for found in (served_together(model, tokenizer, prompts, max_batch=size) for size in (2, 8)):
        for (*one, images), (*other, same_images) in zip(found, alone, strict=True):
            assert one == other and list(images) == list(same_images) and len(images) > 3
            assert_agree(list(images.values()), list(same_images.values()))
    for (*found, _), prompt in zip(alone, prompts, strict=True):
        assert prompt.temperature > 0 or tuple(found) == unserved(model, tokenizer, prompt)


def test_one_at_a_time_where_a_cache_cannot_be_padded(served, monkeypatch):
    model, tokenizer = served
    prompts = prompts_of(tokenizer)[:3]
    expected = served_together(model, tokenizer, prompts, max_batch=1)
    join = Batch.join

    def joins_nothing(self, other):
        assert len(self) == 0
        join(self, other)

    monkeypatch.setattr(engine_module, "can_join", lambda model, positions: False)
    monkeypatch.setattr(Batch, "join", joins_nothing)
    assert served_together(model, tokenizer, prompts) == expected


def test_a_conversation_is_answered_as_without_a_cache(served):
    model, tokenizer = served
    text = TEXTS[0]
    for turn in range(3):
        prompt = Prompt(prompt_ids(tokenizer, text), 8, logprobs=0)
        ((*answer, _),) = served_together(model, tokenizer, [prompt])
        hits = model.retriever.cache.hits
        model.retriever.cache.clear()
        assert tuple(answer) == unserved(model, tokenizer, prompt)
        assert turn == 0 or hits > 0
        text += tokenizer.decode(answer[0]) + " a small boat. and then: a lemon."


def test_an_error_of_one_prompt_ends_it_alone(served):
    model, tokenizer = served
    good = Prompt(prompt_ids(tokenizer, TEXTS[0]), 3)

    async def ask():
        engine = Engine(model, tokenizer, 9)
        wrong = [Prompt([10**6], 3), Prompt(good.ids, 3, temperature=1.0, seed=1 << 70)]
        answers = engine.submit(good, *wrong, good)
        found = await asyncio.gather(*map(text_of, answers), return_exceptions=True)
        assert found[0] == found[3] and isinstance(found[0], str)
        assert all(isinstance(error, Exception) for error in found[1:3])
        await asyncio.sleep(0)
        assert not engine._open
        engine.end()

    asyncio.run(ask())


@pytest.fixture
def serve(letters):
    """Runs `ask`, a coroutine function, with an engine of letters."""

    def serve(ask, max_waiting=5, **options):
        async def whole():
            engine = Engine(letters, letters, max_waiting, **options)
            await ask(engine)
            engine.end()
            await asyncio.to_thread(engine._thread.join, 30)
            assert not engine._thread.is_alive()

        asyncio.run(whole())

    return serve


def test_a_short_answer_does_not_wait_for_a_long_one(serve, letters):
    """It joins at the next token; its row is free again at its end."""

    async def ask(engine):
        letters.go.release(10_000)
        (long,) = engine.submit(Prompt([1], 800))
        parts = aiter(long)
        assert [await anext(parts) for _ in range(3)] == ["a", "b", "c"]
        (short,) = engine.submit(Prompt([1], 3))
        assert await text_of(short) == "abc" and long.num_tokens < 800
        assert len(await text_of(long)) == 797

    serve(ask)
    assert letters.batches.count(2) == 2 and len(letters.batches) == 799


def test_what_is_cancelled_ends_before_its_next_token_and_leaves_the_queue(serve, letters):
    async def ask(engine):
        running, *waiting, last = (engine.submit(Prompt([1], 4))[0] for _ in range(4))
        with pytest.raises(BusyError, match="3 requests are already waiting"):
            engine.submit(Prompt([1], 1))
        assert letters.begun.acquire(timeout=60)
        for answer in waiting:
            engine.cancel(answer)
            assert await text_of(answer) == "" and answer.num_tokens == 0
        assert len(engine._waiting) == 1
        letters.go.release(1)
        assert await anext(aiter(running)) == "a"
        engine.cancel(running)
        letters.go.release(5)  # one for a token that may be on its way, four for the last request
        assert await text_of(last) == "abcd" and running.num_tokens <= 2

    serve(ask, max_waiting=3, max_batch=1)


def test_requests_take_turns(serve, letters, monkeypatch):
    """One of many prompts keeps nobody out, whose requests begin after two more of its prompts at most."""

    monkeypatch.setattr("valm.serving.engine.FURTHER_PROMPTS", 128)

    async def ask(engine):
        ended = []

        async def read(name, answer):
            await text_of(answer)
            ended.append(name)

        many = engine.submit(*[Prompt([1], 1)] * 128)
        assert letters.begun.acquire(timeout=60)
        with pytest.raises(BusyError, match="127 further prompts of requests are already waiting"):
            engine.submit(*[Prompt([1], 1)] * 3)
        others = [engine.submit(Prompt([1], 1))[0] for _ in range(2)]
        others += engine.submit(Prompt([1], 1), Prompt([1], 1))
        with pytest.raises(BusyError, match="3 requests are already waiting"):
            engine.submit(Prompt([1], 1))
        letters.go.release(200)
        reading = [read("many", answer) for answer in many]
        reading += [read(name, answer) for name, answer in zip(["one", "two", "three", "three"], others, strict=True)]
        await asyncio.gather(*reading)
        assert ended[:10] == ["many"] * 3 + ["one", "two", "three", "many", "three", "many", "many"]

    serve(ask, max_waiting=3, max_batch=1)


def test_a_call_that_nobody_waits_for_leaves_the_queue(serve, letters):
    async def ask(engine):
        called = []
        (answer,) = engine.submit(Prompt([1], 1))
        assert letters.begun.acquire(timeout=60)
        call = asyncio.ensure_future(engine.call(lambda: called.append(1)))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert list(engine._open) == [answer] and not engine._waiting
        letters.go.release(1)
        assert await text_of(answer) == "a" and await engine.call(lambda: 2) == 2 and not called

    serve(ask)


def test_prompts_are_read_together_up_to_a_number_of_tokens(serve, letters, monkeypatch):
    monkeypatch.setattr(engine_module, "PROMPT_TOKENS", 12)

    async def ask(engine):
        prompts = [Prompt([1] * tokens, 1) for tokens in (3, 4, 2, 4, 13, 1)]
        letters.go.release(len(prompts))
        await asyncio.gather(*map(text_of, engine.submit(*prompts)))

    serve(ask, max_waiting=20)
    assert letters.prompts == [[3, 4, 2], [4], [13], [1]]


def test_other_work_has_its_turn_between_two_tokens(serve, letters):
    async def ask(engine):
        (answer,) = engine.submit(Prompt([1], 3))
        call, fails = (asyncio.ensure_future(engine.call(work)) for work in (lambda: "explained", lambda: 1 / 0))
        await asyncio.sleep(0)
        letters.go.release(2)
        assert await call == "explained" and answer.num_tokens == 2
        letters.go.release(1)
        assert await text_of(answer) == "abc"
        with pytest.raises(ZeroDivisionError):
            await fails

    serve(ask)


def test_the_end_is_told_to_all_at_once(serve, letters):
    async def ask(engine):
        answers = engine.submit(*[Prompt([1], 4)] * 3)
        waiting = asyncio.ensure_future(engine.call(lambda: 1))
        await asyncio.sleep(0)
        engine.end()
        for ended in (*map(text_of, answers), waiting):
            with pytest.raises(StoppingError):
                await ended
        with pytest.raises(StoppingError):
            engine.submit(Prompt([1], 4))
        letters.go.release(3)

    serve(ask)


class Panic(BaseException):
    """As a library in Rust raises."""


@pytest.mark.parametrize("error", [RuntimeError("no"), Panic("no")])
def test_after_an_error_others_are_answered(serve, letters, error):
    async def ask(engine):
        letters.error = error
        (first,) = engine.submit(Prompt([1], 2))
        letters.go.release(1)
        with pytest.raises((RuntimeError, ValmError), match="no"):
            await text_of(first)
        letters.error = None
        letters.go.release(2)
        assert await text_of(engine.submit(Prompt([1], 2))[0]) == "ab"

    serve(ask)


def test_an_error_between_the_batches_does_not_end_the_thread(serve, letters, monkeypatch):
    async def ask(engine):
        first, second = engine.submit(Prompt([1], 4), Prompt([1], 9))
        with monkeypatch.context() as patched:
            patched.setattr(type(engine._batch), "keep", lambda *_: 1 / 0)
            letters.go.release(30)
            assert await text_of(first) == "abcd"
            with pytest.raises(ZeroDivisionError):
                await text_of(second)
        letters.go.release(20)
        assert await text_of(engine.submit(Prompt([1], 2))[0]) == "ab"

    serve(ask)


def test_a_token_that_the_tokenizer_has_not_ends_its_row_alone(serve, letters):
    async def ask(engine):
        engine.num_ids = 99  # so that "c" is none
        long, short = engine.submit(Prompt([1], 5), Prompt([1], 2))
        letters.go.release(10)
        with pytest.raises(ValueError, match="token 99, which its tokenizer does not know"):
            await text_of(long)
        assert await text_of(short) == "ab"

    serve(ask)
