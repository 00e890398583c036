import json

import pytest

from valm.serving.requests import ChatRequest, CompletionRequest, FieldError, read


def completion(**fields):
    return read(json.dumps({"prompt": "the sea", **fields}).encode(), CompletionRequest)


def test_what_has_no_effect_is_accepted():
    """As clients send it."""
    asked = completion(
        n=1,
        user="me",
        presence_penalty=0,
        frequency_penalty=0.0,
        logprobs=None,
        echo=False,
        logit_bias={},
        stop="x",
        best_of=1,
        response_format={"type": "text"},
        parallel_tool_calls=True,
    )
    assert asked.limit is None and asked.temperature is None and asked.stop == ["x"]


def test_an_answer_may_be_sent_back():
    """As the openai package has it, with its empty fields."""
    answer = {"role": "assistant", "content": " red", "refusal": None, "tool_calls": None, "annotations": []}
    parts = [{"type": "text", "text": "is it "}, {"type": "text", "text": "so?"}]
    body = {"messages": [answer, {"role": "user", "content": parts}], "max_tokens": 3, "max_completion_tokens": 4}
    asked = read(json.dumps(body).encode(), ChatRequest)
    assert [message.text for message in asked.messages] == [" red", "is it so?"] and asked.limit == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": -0.1},
        {"temperature": "0"},
        {"top_p": 0},
        {"top_p": float("nan")},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"seed": -1},
        {"seed": 1 << 32},
        {"n": 2},
        {"stop": ""},
        {"stop": ["a"] * 17},
        {"tools": [{}]},
        {"best_of": 2},
        {"prompt": []},
        {"prompt": ["a", 1]},
        {"prompt": [[]]},
        {"prompt": [True]},
        {"prompt": [-1]},
        {"logprobs": 6},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"prompt": None},
    ],
)
def test_what_cannot_be_done_is_an_error(fields):
    with pytest.raises(FieldError, match=next(iter(fields))):
        completion(**fields)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}],
    ],
)
def test_wrong_messages_are_an_error(messages):
    with pytest.raises(FieldError, match="messages"):
        read(json.dumps({"messages": messages}).encode(), ChatRequest)


@pytest.mark.parametrize(
    "prompt, prompts", [("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2, 3]], [[1], [2, 3]])]
)
def test_one_prompt_or_several(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(FieldError, match="this server has no 'max_token', did you mean max_tokens"):
        completion(max_token=3)
    with pytest.raises(FieldError, match="this server has no 'tool_calls' in messages: leave it out"):
        message = {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}
        read(json.dumps({"messages": [message]}).encode(), ChatRequest)
