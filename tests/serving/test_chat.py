"""A chat becomes what its template says, and no message can write a control token."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import ConfigError
from flexolmo.serving.chat import ChatTemplate, find_template
from flexolmo.serving.refusal import Refusal

SOURCE = """{{ bos_token }}{% for message in messages %}
<|turn|>{{ message['role'] }}
{{ message['content'] | trim }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def marked(pico_anchor):
    """The pico tokenizer with two control tokens more."""
    inner = tokenizers.Tokenizer.from_str(json.dumps(pico_anchor.tokenizer.definition))
    inner.add_special_tokens(["<|turn|>", "<|end|>"])
    return Tokenizer(json.loads(inner.to_str()), pico_anchor.tokenizer.eos)


@pytest.fixture(scope="module")
def template(marked):
    return ChatTemplate(SOURCE, marked)


def control(tokenizer, name):
    return next(t["id"] for t in tokenizer.definition["added_tokens"] if t["content"] == name)


def test_a_templates_control_tokens_are_tokens(template, marked):
    ids = template.encode([{"role": "user", "content": "Hi"}])
    turn, end = control(marked, "<|turn|>"), control(marked, "<|end|>")
    assert ids == [
        marked.eos_id,
        turn,
        *marked.encode("user\n"),
        *marked.encode("Hi"),
        end,
        *marked.encode("\n"),
        turn,
        *marked.encode("assistant\n"),
    ]


@given(
    text=st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1"), max_size=20
    )  # which are refused
    | st.lists(
        st.sampled_from(["<|turn|>", "<|end|>", "<|endoftext|>", "a", "\n", "{{ 7*7 }}"])
    ).map("".join)
)
def test_no_message_writes_a_control_token_or_runs_as_a_template(template, marked, text):
    ids = template.encode([{"role": "user", "content": text}])
    controls = [token for token in ids if token in marked.controls]
    turn, end = control(marked, "<|turn|>"), control(marked, "<|end|>")
    assert controls == [marked.eos_id, turn, end, turn]
    inside = ids[ids.index(turn) + 1 : ids.index(end)]
    assert marked.decode(inside) == "user\n" + text


def test_a_message_cannot_pass_for_the_marks_between_which_it_is_found(template):
    for text in ("\ufdd1<|end|>", "\ufdd0", "a\ufdd1b"):
        with pytest.raises(Refusal, match="U\\+FDD0"):
            template.encode([{"role": "user", "content": text}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only users') }}",
        "{% for m in messages %}{{ m.content[1:] }}{% endfor %}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_or_takes_messages_apart_is_a_refusal(marked, source):
    with pytest.raises(Refusal) as caught:
        ChatTemplate(source, marked).encode([{"role": "user", "content": "Hi"}])
    assert (caught.value.status, caught.value.code) == (400, "invalid_chat")
    assert "Hi" not in str(caught.value)


def test_what_is_no_template_is_said_at_once(marked):
    with pytest.raises(ConfigError, match="chat template"):
        ChatTemplate("{% for %}", marked)


def test_the_tokenizers_own_template_is_found(tmp_path):
    assert find_template(tmp_path) is None
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"chat_template": "{{ messages }}"}')
    assert find_template(tmp_path) == "{{ messages }}"
    for other in ("[]", "{}", '{"chat_template": [{"name": "default"}]}'):
        path.write_text(other)
        assert find_template(tmp_path) is None
    path.write_text("{")
    with pytest.raises(ConfigError):
        find_template(tmp_path)
