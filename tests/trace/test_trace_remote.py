"""Asking a served index span by span: the same spans as by looking, from few answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.bundle.signing import create_key, read_private_key
from flexolmo.errors import BusyError, ConfigError, DataError, PolicyError
from flexolmo.trace.questions import MAX_IDS, MAX_SPANS, Answer, Found, Offer, read_question
from flexolmo.trace.remote import CutShortError, RemoteIndex, _in_questions, ask_spans
from flexolmo.trace.words import Words
from made_traces import places_of, slow_spans

FOUND = Found(at_least=None, documents=None, places=None)
IDS = st.lists(st.integers(1, 2), min_size=1, max_size=30)


@given(
    IDS,
    st.lists(st.lists(st.integers(1, 2), max_size=20), max_size=4),
    st.sets(st.integers(1, 29)),
    st.integers(1, 4),
)
def test_the_spans_are_those_of_all_pairs_of_cuts(ids, documents, inner, min_tokens):
    cuts = sorted({0, len(ids)} | {k for k in inner if k < len(ids)})
    finds = 0

    def ask(spans):
        nonlocal finds
        assert spans and all(b - a >= min_tokens for a, b in spans)
        for number, (a, b) in enumerate(spans):
            if any(places_of(ids[a:b], d) for d in documents):
                finds += 1
                return number, FOUND
        return None

    found = [span for span, _ in ask_spans(cuts, min_tokens, ask)]
    assert found == slow_spans(ids, cuts, documents, min_tokens)
    assert finds <= 2 * len(found)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5000)), max_size=2000))
def test_questions_are_no_larger_than_a_service_takes(pairs):
    spans = [(start, start + size) for start, size in pairs]
    questions = list(_in_questions(spans))
    assert [s for q in questions for s in q] == [s for s in spans if s[1] - s[0] <= 4096]
    for some in questions:
        assert 0 < len(some) <= MAX_SPANS
        assert sum(end - start for start, end in some) <= MAX_IDS


@pytest.mark.parametrize(
    "url",
    [
        "http://owner.example",
        "http://127.0.0.1.example",
        "ftp://127.0.0.1",
        "owner.example",
        "https://",
        "https://owner.example/path",
        "https://owner.example?x=1",
        "file:///etc/passwd",
    ],
)
def test_an_address_that_sends_in_the_clear_is_refused(url):
    with pytest.raises(ConfigError, match="no address of a service"):
        RemoteIndex("clinic", url, None)


@pytest.fixture
def remote(tmp_path):
    """A client whose service is made: `replies` is what it sends, by kind of reply."""
    create_key(tmp_path / "key.pem")
    made = RemoteIndex("clinic", "https://clinic.example", read_private_key(tmp_path / "key.pem"))
    made.asked = []
    made.replies = {
        Offer: Offer(source="clinic", tokenizer=f"sha256:{'0' * 64}", level="yes", min_tokens=2),
        Answer: Answer(answered=1, found=None),
    }

    def exchange(body, kind):
        made.asked += [] if body is None else [read_question(body)[0]]
        return made.replies[kind]

    made._exchange = exchange
    return made


WORDS = Words("a b c", [1, 2, 3], [(0, 1), (1, 3), (3, 5)], [0, 1, 2, 3])
DIGEST = f"sha256:{'0' * 64}"


def test_a_service_that_answers_less_is_spent_and_one_that_answers_more_is_wrong(remote):
    with pytest.raises(BusyError, match="budget"):
        remote.find_spans(WORDS, DIGEST)
    remote.replies[Answer] = Answer(answered=3, found=None)
    with pytest.raises(DataError, match="more than it was asked"):
        remote.find_spans(WORDS, DIGEST)
    remote.replies[Answer] = Answer(answered=0, found=FOUND)
    with pytest.raises(DataError, match="more than it was asked"):
        remote.find_spans(WORDS, DIGEST)
    numbers = [question.number for question in remote.asked]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(("number", "kept"), [(0, []), (1, [(0, 2)]), (2, [(0, 5)])])
def test_what_was_found_before_a_budget_ended_is_kept(remote, number, kept):
    """First a span of two tokens, then the longest from there, of all five, then no answer."""
    answers = [Answer(answered=1, found=FOUND)] * number + [Answer(answered=0, found=None)]
    remote._exchange = lambda body, kind: remote.replies[Offer] if kind is Offer else answers.pop(0)
    places = [(2 * i, 2 * i + 1) for i in range(5)]
    words = Words("a b c d e", [1, 2, 3, 4, 5], places, [0, 1, 2, 3, 4, 5])
    if number == 2:  # all of the text was found, so nothing is left to ask
        assert [(s.start, s.end) for s in remote.find_spans(words, DIGEST)] == kept
        return
    with pytest.raises(CutShortError, match="budget") as e:
        remote.find_spans(words, DIGEST)
    assert [(s.start, s.end) for s in e.value.spans] == kept


def test_another_source_or_another_tokenizer_is_never_asked(remote):
    with pytest.raises(DataError, match="tokenizer"):
        remote.find_spans(WORDS, f"sha256:{'1' * 64}")
    remote.replies[Offer] = remote.replies[Offer].model_copy(update={"source": "\x1b[2Jbank"})
    with pytest.raises(DataError, match="not of 'clinic'") as e:
        remote.find_spans(WORDS, DIGEST)
    assert "\x1b" not in str(e.value)
    assert remote.asked == []


def test_no_answer_is_followed_elsewhere_or_believed_in_another_form(tmp_path):
    import http.server
    import threading

    sent = {"status": 200, "body": b"", "headers": {}}
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(sent["status"])
            for name, value in sent["headers"].items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent["body"])

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = RemoteIndex("clinic", f"http://127.0.0.1:{server.server_port}", None)
        sent |= {"status": 302, "headers": {"Location": "/elsewhere"}}
        with pytest.raises(PolicyError, match="302"):
            remote.offer()
        sent |= {"status": 200, "headers": {}}
        for body in (b"", b"{}", b"[" * 10_000, b"\xff", b'{"source":"clinic"}', b"0" * (9 << 20)):
            sent["body"] = body
            with pytest.raises(DataError, match="something else"):
                remote.offer()
        for status, kind in ((403, PolicyError), (429, BusyError)):
            sent |= {"status": status, "body": b'{"error":{"message":"\\u001b[2Jno"}}'}
            with pytest.raises(kind, match=r"\\x1b\[2Jno"):
                remote.offer()
        server.shutdown()
    assert set(paths) == {"/v1/trace"}
    with pytest.raises(DataError, match="cannot be asked"):
        remote.offer()
