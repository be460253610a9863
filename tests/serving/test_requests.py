"""Bodies mean one thing, or are refused; nothing that would change an answer is ignored."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as Chat
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as Completion

from flexolmo.bundle.terms import PURPOSES
from flexolmo.serving.policy import Wish
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.requests import ChatBody, CompletionBody, read_body

COMPLETION = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
IGNORED = {"user", "metadata"}


def read(body, kind=CompletionBody):
    return read_body(json.dumps(body).encode(), kind).ask()


def refusal_of(body, kind=CompletionBody):
    with pytest.raises(Refusal) as caught:
        read(body, kind)
    assert caught.value.status == 400
    return caught.value


def test_what_is_not_said_has_openais_defaults():
    found = read(COMPLETION)
    assert (found.temperature, found.top_p, found.n, found.max_new_tokens) == (1.0, 1.0, 1, 16)
    assert found.wish == Wish(None, ()) and found.purposes == frozenset()
    assert (found.seed, found.top_k, found.num_logprobs, found.stops) == (None, None, None, ())
    assert not found.echoes and read(CHAT, ChatBody).max_new_tokens is None
    absent = dict.fromkeys(set(CompletionBody.model_fields) - set(COMPLETION))
    assert read(COMPLETION | absent) == found  # null says nothing


def test_prompts_are_texts_or_ids_one_or_several():
    for prompt, expected in (
        ("x", ["x"]),
        (["x", "y"], ["x", "y"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ):
        assert read(COMPLETION | {"prompt": prompt}).prompts == expected
    for prompt in ([], [[]], ["x", 1], [1, "x"], [True], [-1], None, 7, {}, [1.5], [[["x"]]]):
        assert refusal_of(COMPLETION | {"prompt": prompt}).field == "prompt"


def test_sources_and_purposes_are_read_to_the_letter():
    assert read(COMPLETION | {"experts": {"only": []}}).wish == Wish((), ())
    assert read(COMPLETION | {"experts": {"only": ["a"]}}).wish == Wish(("a",), ())
    assert read(COMPLETION | {"experts": {"without": ["a"]}}).wish == Wish(None, ("a",))
    assert read(COMPLETION | {"purpose": "education"}).purposes == {"education"}
    assert read(COMPLETION | {"purpose": list(PURPOSES)}).purposes == set(PURPOSES)
    wrong = [
        {},
        {"only": ["a"], "without": []},
        {"only": "a"},
        {"onyl": []},
        [],
        "a",
        {"only": [1]},
    ]
    for experts in wrong:
        refusal_of(COMPLETION | {"experts": experts})
    for purpose in ("fun", "", ["fun"], 7, {"a": 1}):
        refused = refusal_of(COMPLETION | {"purpose": purpose})
        assert refused.field == "purpose" and all(name in str(refused) for name in PURPOSES)


@given(name=st.text(max_size=12))
def test_an_unknown_field_is_named_and_never_ignored(name):
    if name not in CompletionBody.model_fields:
        refusal = refusal_of(COMPLETION | {name: 1})
        assert refusal.code == "unsupported_field" and refusal.field == name[:64]


@pytest.mark.parametrize(
    "typo, meant", [("expert", "experts"), ("purposes", "purpose"), ("max_token", "max_tokens")]
)
def test_a_misspelt_field_is_told_what_it_may_mean(typo, meant):
    assert f"Did you mean '{meant}'" in str(refusal_of(COMPLETION | {typo: 1}))


@pytest.mark.parametrize(
    "kind, body, official", [(CompletionBody, COMPLETION, Completion), (ChatBody, CHAT, Chat)]
)
def test_each_field_that_openais_client_sends_is_read_or_refused(kind, body, official):
    """A value that would change the answer is refused where it is not supported."""
    others = {"frequency_penalty": 1, "presence_penalty": 1, "logit_bias": {"1": 1}, "best_of": 2}
    others |= {"suffix": "x", "response_format": {"type": "json_object"}}
    for field in official.__annotations__:
        if field not in kind.model_fields:
            assert refusal_of(body | {field: 1}, kind).code == "unsupported_field"
        elif field in others:
            assert refusal_of(body | {field: others[field]}, kind).field == field
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me"}
    assert read(body | neutral, kind) == read(body, kind)
    unread = set(kind.model_fields) - set(official.__annotations__)
    assert unread == {"experts", "purpose", "top_k", "trace"}


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"n": 0},
        {"temperature": 2.1},
        {"temperature": "1"},
        {"top_p": 0},
        {"top_k": 0},
        {"seed": 2**63},
        {"stop": ""},
        {"stop": ["a"] * 5},
        {"stop": [""]},
        {"logprobs": 21},
        {"logprobs": True},
        {"stream_options": {"include_usage": True}},
        {"echo": "yes"},
        {"model": ""},
    ],
)
def test_values_out_of_bounds_are_refused(fields):
    refusal_of(COMPLETION | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
        {"max_tokens": 1, "max_completion_tokens": 2},
        {"max_tokens": 0},
        {"top_logprobs": 1},
        {"logprobs": 1},
    ],
)
def test_chats_that_are_none_are_refused(fields):
    refusal_of(CHAT | fields, ChatBody)


def test_a_messages_parts_are_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (messages,) = read(CHAT | {"messages": [{"role": "user", "content": parts}]}, ChatBody).prompts
    assert [m.text for m in messages] == ["ab"]


def test_scores_are_asked_for_by_an_echo_and_no_tokens():
    found = read(COMPLETION | {"max_tokens": 0, "echo": True, "logprobs": 2})
    assert (found.max_new_tokens, found.echoes, found.num_logprobs) == (0, True, 2)
    chat = read(CHAT | {"logprobs": True, "top_logprobs": 3}, ChatBody)
    assert chat.num_logprobs == 3 and read(CHAT | {"logprobs": True}, ChatBody).num_logprobs == 0


secrets = st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=3)


@given(
    secret=secrets,
    wrong=st.sampled_from(["prompt", "stop", "purpose", "n", "user", "temperature", "messages"]),
)
def test_no_refusal_quotes_a_prompt(secret, wrong):
    body = COMPLETION | {"prompt": secret} | {wrong: {"x": secret}}
    assert secret not in str(refusal_of(body))
    chat = CHAT | {"messages": [{"role": secret, "content": {"x": secret}}]}
    assert secret not in str(refusal_of(chat, ChatBody))
    raw = b'{"model": "m", "prompt": "' + secret.encode() + b'", }'
    with pytest.raises(Refusal) as caught:
        read_body(raw, CompletionBody)
    assert secret not in str(caught.value)
