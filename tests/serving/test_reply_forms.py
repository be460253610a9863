"""Log-probabilities in OpenAI's form, where several tokens look alike."""

from flexolmo.inference.engine import Scored, TokenWritten
from flexolmo.serving.forms import CompletionForm, Part
from flexolmo.serving.text import Shown

HEAD = {"id": "cmpl-1", "created": 1, "model": "made"}


def test_of_tokens_that_look_alike_the_likeliest_is_shown():
    """Parts of characters all decode to U+FFFD, under which there is room for one."""
    scored = Scored(1, -1.0, {1: -1.0, 2: -2.0, 3: -3.0})
    form = CompletionForm(lambda ids: "\ufffd" if ids[0] < 3 else "c")
    part = Part(0, "", [Shown(TokenWritten(1, scored), 0)])
    (choice,) = form.reply([part], HEAD).choices
    assert choice.logprobs.top_logprobs == [{"\ufffd": -1.0, "c": -3.0}]


def test_a_token_without_a_score_has_none():
    part = Part(0, "a", [Shown(TokenWritten(1, None), 0)])
    (choice,) = CompletionForm(lambda ids: "a").reply([part], HEAD).choices
    assert (choice.logprobs.token_logprobs, choice.logprobs.top_logprobs) == ([None], [None])
