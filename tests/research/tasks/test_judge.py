"""Judging against an endpoint on this machine that answers well, badly, late, or not at all."""

import json
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError, SourceUnavailable
from flexolmo.research.tasks import judge as room
from flexolmo.research.tasks.judge import EndpointJudge, Verdict, read_verdict

FREQUENT = settings(derandomize=True, max_examples=100)
KEY = "sk-made-0123456789"
GOOD = '{"quality": 1.5, "coherence": 2, "clarity": 1}'
LATE = object()  # no answer before the endpoint closes


class Endpoint:
    """Gives the replies it was told to, in order, the last one for ever; keeps the requests.

    A reply is what the model says, (status, headers, body), raw bytes of a body, or LATE.
    """

    def __init__(self):
        self.replies, self.requests, self.closed = [GOOD], [], threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.requests.append((self.path, dict(self.headers), json.loads(body)))
                replies = endpoint.replies
                endpoint.answer(self, replies.pop(0) if len(replies) > 1 else replies[0])

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler, reply):
        if reply is LATE:
            self.closed.wait(10)
            return
        if isinstance(reply, str) or reply is None:
            reply = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        status, headers, body = reply if isinstance(reply, tuple) else (200, {}, reply)
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def close(self):
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint():
    made = Endpoint()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Seconds slept, which are not; and no key or proxy of this machine's."""
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    slept = []
    monkeypatch.setattr(room.time, "sleep", slept.append)
    return slept


def test_a_good_answer_is_a_verdict(endpoint):
    judge = EndpointJudge(endpoint.url + "/", "judge-1")
    assert judge.judge("Rain fell on Oslo.") == Verdict(1.5, 2, 1)
    path, headers, body = endpoint.requests[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    [message] = body["messages"]
    assert "Rain fell on Oslo." in message["content"] and "journalistic" in message["content"]


def test_poems_are_judged_as_poems(endpoint):
    EndpointJudge(endpoint.url, "judge-1", quality="poetic").judge("O rose {thou} art sick \ud800")
    content = endpoint.requests[0][2]["messages"][0]["content"]
    assert "poetic quality" in content and "journalistic" not in content
    assert "{thou} art sick ?" in content


def test_scores_go_from_0_to_100():
    assert Verdict(0, 0, 0).score == 0
    assert Verdict(2, 2, 1).score == 100
    assert Verdict(1, 0.5, 0.5).score == 40


@pytest.mark.parametrize(
    "bad",
    [
        "I liked it.",
        None,
        "",
        '{"quality": 3, "coherence": 1, "clarity": 1}',
        '{"quality": 1, "coherence": -0.5, "clarity": 1}',
        '{"quality": 1, "coherence": 1}',
        '{"quality": true, "coherence": 1, "clarity": 1}',
        '{"quality": "1", "coherence": 1, "clarity": 1}',
        '{"quality": NaN, "coherence": 1, "clarity": 1}',
        '{"a":' * 5000,
    ],
)
def test_a_bad_answer_is_asked_for_again_once(endpoint, bad):
    judge = EndpointJudge(endpoint.url, "judge-1")
    endpoint.replies = [bad, GOOD]
    assert judge.judge("text") == Verdict(1.5, 2, 1)
    endpoint.replies = [bad, bad, GOOD]
    assert judge.judge("text") is None
    assert judge.num_unjudged == 1
    assert len(endpoint.requests) == 4
    if bad:  # the second question says what was wrong with the answer
        roles = [message["role"] for message in endpoint.requests[-1][2]["messages"]]
        assert roles == ["user", "assistant", "user"]


@FREQUENT
@given(
    before=st.text('ab \n{}[]":,1', max_size=30),
    after=st.text('ab \n[]":,1}', max_size=30),
    quality=st.integers(0, 4),
    clarity=st.floats(0, 1),
)
def test_a_verdict_is_found_anywhere_in_an_answer(before, after, quality, clarity):
    made = {"clarity": clarity, "reason": {"x": 1}, "coherence": 2, "quality": quality / 2}
    answer = f"{GOOD} {before}\n{json.dumps(made)}{after}"
    assert read_verdict(answer) == Verdict(quality / 2, 2, clarity)


def test_a_busy_endpoint_is_asked_later(endpoint, waits):
    busy = (429, {}, b"{}")
    endpoint.replies = [
        busy,
        (429, {"Retry-After": "7"}, b""),
        (503, {"Retry-After": "9" * 400}, b""),
        (500, {"Retry-After": "nan"}, b""),
        GOOD,
    ]
    assert EndpointJudge(endpoint.url, "judge-1").judge("text") == Verdict(1.5, 2, 1)
    assert waits == [0, 1, 7, 60, 8]


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ((500, {}, b"out of\x1b[2J memory"), r"HTTP 500 out of\[2J memory"),
        (b"<html>Welcome</html>", "no chat completion"),
        (b'{"error": "no"}', "no chat completion"),
        (b"[" * 9999, "no chat completion"),
        ((200, {"Content-Length": "9"}, b""), "no chat completion"),
        (LATE, "TimeoutError"),
    ],
    ids=["500", "page", "error", "nested", "cut off", "late"],
)
def test_an_endpoint_that_never_judges_is_given_up(endpoint, monkeypatch, reply, found):
    monkeypatch.setattr(room, "ATTEMPTS", 2)
    endpoint.replies = [reply]
    with pytest.raises(SourceUnavailable, match=found):
        EndpointJudge(endpoint.url, "judge-1", timeout_seconds=0.2).judge("text")
    assert len(endpoint.requests) == 2


def test_no_endpoint_is_told_as_such(endpoint, waits):
    endpoint.close()
    with pytest.raises(SourceUnavailable, match=r"in 5 attempts.*refused"):
        EndpointJudge(endpoint.url, "judge-1").judge("text")
    assert waits == [0, 1, 2, 4, 8]


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_is_not_repeated_and_the_key_not_shown(endpoint, monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    body = b"x" * 190 + f" {KEY} is no key".encode()
    endpoint.replies = [(status, {}, body)]
    judge = EndpointJudge(endpoint.url, "judge-1", key_variable="JUDGE_KEY")
    with pytest.raises(ConfigError, match=f"HTTP {status}.*JUDGE_KEY") as caught:
        judge.judge("text")
    assert ("is no key" in str(caught.value) or "xxx" in str(caught.value)) == (
        status not in (401, 403)
    )  # those may say more of the key than that it is wrong
    assert len(endpoint.requests) == 1
    assert endpoint.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    for shown in (str(caught.value), repr(judge), str(asdict(judge))):
        assert KEY[:6] not in shown


def test_the_key_follows_no_redirect(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint.replies = [(302, {"Location": endpoint.url + "/elsewhere"}, b""), GOOD]
    with pytest.raises(ConfigError, match="HTTP 302"):
        EndpointJudge(endpoint.url, "judge-1").judge("text")
    assert len(endpoint.requests) == 1


def test_no_proxy_sees_a_request_to_this_machine(endpoint, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert EndpointJudge(endpoint.url, "judge-1").judge("text") == Verdict(1.5, 2, 1)


@pytest.mark.parametrize("host", ["localhost.example.org", "10.0.0.1", "127.0.0.1.example.org"])
def test_a_key_goes_to_other_machines_by_https_only(monkeypatch, host):
    judge = EndpointJudge(f"http://{host}/v1", "judge-1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ConfigError, match="in the clear") as caught:
        EndpointJudge(f"http://{host}/v1", "judge-1")
    assert KEY not in str(caught.value)
    with pytest.raises(ConfigError, match="in the clear"):
        judge.judge("text")  # made before the key was set
    EndpointJudge(f"https://{host}/v1", "judge-1")


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "127.1.2.3:80", "[::1]:8000"])
def test_a_key_may_go_to_this_machine_by_http(monkeypatch, host):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    EndpointJudge(f"http://{host}/v1", "judge-1")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.example.org/v1",
        "file:///etc/passwd",
        "ftp://h/v1",
        "https://",
        "https://[::1/v1",
        "https://me:secret@h/v1",
        "https://h/v1?key=secret",
        "https://h/v1#secret",
        "https://h:x/v1",
        "https://h/v 1",
        "https://h/v\n1",
        "https://h/é",
    ],
)
def test_what_is_no_plain_url_is_refused(url):
    with pytest.raises(ConfigError, match="URL") as caught:
        EndpointJudge(url, "judge-1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}é"])
def test_a_key_that_cannot_be_one_is_refused_unseen(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        EndpointJudge("https://h/v1", "judge-1")
    assert KEY not in str(caught.value)
