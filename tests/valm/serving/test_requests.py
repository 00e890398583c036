import json

import pytest

from valm.serving.requests import ChatRequest, CompletionRequest, FieldError, read


def completion(**fields):
    return read(json.dumps({"prompt": "the sea", **fields}).encode(), CompletionRequest)


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
        {"temperature": -0.1},
        {"temperature": "0"},
        {"top_p": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"seed": 1 << 32},
        {"n": 2},
        {"stop": ""},
        {"stop": ["a"] * 17},
        {"tools": [{}]},
        {"best_of": 2},
        {"prompt": []},
        {"prompt": ["a", 1]},
        {"prompt": [[]]},
        {"prompt": [-1]},
        {"prompt": [True]},
        {"logprobs": 6},
        {"response_format": {"type": "json_object"}},
        {"prompt": None},
    ],
)
def test_what_cannot_be_done_is_an_error(fields):
    with pytest.raises(FieldError, match=next(iter(fields))):
        completion(**fields)


def test_one_prompt_or_several_and_what_has_no_effect():
    several = ["a", "b"], [[1], [2, 3]]
    for prompt, prompts in (("a", ["a"]), ([1, 2], [[1, 2]]), *zip(several, several, strict=True)):
        assert completion(prompt=prompt).prompts == prompts
    # as clients send it
    no_effect = {"n": 1, "user": "me", "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": None, "echo": False}
    no_effect |= {"logit_bias": {}, "best_of": 1, "response_format": {"type": "text"}, "parallel_tool_calls": True}
    asked = completion(stop="x", **no_effect)
    assert asked.limit is None and asked.temperature is None and asked.stop == ["x"]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "tool", "content": "x"}], "messages"),
        ([{"role": "user"}], "messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}], "has no 'tool_calls' in messages: leave"),
    ],
)
def test_wrong_messages_are_an_error(messages, error):
    with pytest.raises(FieldError, match=error):
        read(json.dumps({"messages": messages}).encode(), ChatRequest)


def test_a_missing_name_is_named_and_an_unknown_one_answered_with_the_nearest():
    with pytest.raises(FieldError, match="prompt is missing: expected a text, a list of token ids"):
        read(b"{}", CompletionRequest)
    with pytest.raises(FieldError, match="this server has no 'max_token', did you mean max_tokens"):
        completion(max_token=3)
