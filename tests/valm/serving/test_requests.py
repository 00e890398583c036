import json

import pytest
from pydantic import ValidationError

from valm.serving.requests import ChatRequest, CompletionRequest


def completion(**fields):
    return CompletionRequest.model_validate_json(json.dumps({"prompt": "the sea", **fields}))


def test_what_has_no_effect_is_accepted():
    """As clients send it."""
    asked = completion(
        n=1, user="me", presence_penalty=0, frequency_penalty=0.0, logprobs=None, echo=False, logit_bias={}, stop="x"
    )
    assert asked.limit is None and asked.temperature is None and asked.stop == ["x"]


def test_an_answer_may_be_sent_back():
    """As the openai package has it, with its empty fields."""
    answer = {"role": "assistant", "content": " red", "refusal": None, "tool_calls": None, "annotations": []}
    parts = [{"type": "text", "text": "is it "}, {"type": "text", "text": "so?"}]
    body = {"messages": [answer, {"role": "user", "content": parts}], "max_tokens": 3, "max_completion_tokens": 4}
    asked = ChatRequest.model_validate_json(json.dumps(body))
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
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"seed": -1},
        {"seed": 1 << 32},
        {"n": 2},
        {"stop": ""},
        {"stop": ["a"] * 5},
        {"tools": [{}]},
        {"best_of": 2},
        {"echo": True},
        {"prompt": ["a"]},
        {"prompt": None},
    ],
)
def test_what_cannot_be_done_is_an_error(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
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
    with pytest.raises(ValidationError, match="messages"):
        ChatRequest.model_validate_json(json.dumps({"messages": messages}))
