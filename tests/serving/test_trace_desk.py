"""An owner's desk: who may ask, what each is told, and that no client can rebuild the text."""

import itertools
import json
import math
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.bundle.signing import create_key, key_id, read_private_key
from flexolmo.errors import AuditError, BusyError, ConfigError
from flexolmo.serving.audit_check import check_log, public_key
from flexolmo.serving.audit_log import AuditLog
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.trace_app import create_trace_app
from flexolmo.serving.trace_desk import Budget, TraceDesk, read_clients, read_spending
from flexolmo.trace.questions import LEVELS, MAX_COUNT_BITS, Question, sign_question
from flexolmo.trace.remote import RemoteIndex
from flexolmo.trace.spans import find_spans
from flexolmo.trace.words import split_words
from made_server import MadeLog, serving
from made_sets import made_text
from made_traces import documents_of, made_index

NOON = 1_800_014_400.0  # 2027-01-15 12:00 UTC
DAY = 86_400.0
AMPLE = Budget(min_tokens=4, requests_per_minute=10**6)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    texts = [made_text(n) for n in range(12)]
    return made_index(tmp_path_factory.mktemp("desk"), [*texts, *(t + " again" for t in texts[:4])])


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Private keys of two clients and a stranger; public halves of the clients."""
    where = tmp_path_factory.mktemp("keys")
    for name in ("ann", "bob", "eve"):
        create_key(where / name)
    (where / "eve.pub").rename(where / "eve.public")
    return {n: read_private_key(where / n) for n in ("ann", "bob", "eve")}, read_clients(where)


class Time:
    """A clock that a test sets."""

    def __init__(self):
        self.seconds = NOON

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Time()


@pytest.fixture
def ask(index, keys, clock):
    """Ask a desk of given settings; each question has a higher number than the one before."""
    numbers = itertools.count(1)

    def make(level="yes", budget=AMPLE, log=None, spent=None):
        desk = TraceDesk(index, keys[1], level, budget, log or MadeLog(), spent or {}, clock)

        def ask_desk(*spans, who="ann", **changed):
            return desk.answer(signed(keys[0][who], clock, next(numbers), spans, **changed))

        return ask_desk

    return make


def signed(key, clock, number, spans, **changed):
    fields = {
        "format": "flexolmo-trace-question",
        "format_version": 1,
        "source": "clinic",
        "number": int(clock.seconds * 1e6) + number,
        "spans": [list(span) for span in spans],
    }
    return sign_question(Question(**(fields | changed)), key)


@pytest.fixture(scope="module")
def text(index):
    """Ids of one document, which no other goes on from."""
    return max((ids for ids, _ in documents_of(index)), key=len)


ABSENT = [1, 1, 1, 1, 1, 1]


def refused(code, call):
    with pytest.raises(Refusal) as e:
        call()
    assert e.value.code == code
    return e.value


# --- answers ------------------------------------------------------------------------------------


def test_spans_are_answered_up_to_the_first_that_occurs(ask, text):
    answer = ask()(ABSENT, text[:6], text[6:12], ABSENT)
    assert (answer.answered, answer.found is not None) == (2, True)
    answer = ask()(ABSENT, ABSENT)
    assert (answer.answered, answer.found) == (2, None)


def test_ids_that_the_index_cannot_hold_occur_nowhere(ask, text):
    assert ask()([*text[:5], 1 << 20], [70_000] * 6).found is None
    assert ask()([i + 65_536 for i in text[:6]]).found is None  # the same two low bytes


def test_no_span_leads_from_one_document_into_the_next(ask, index):
    shard = index.shards[0]
    end = int(shard.documents[1])
    assert ask()(shard.ids(end - 6, end + 6)).found is None
    assert ask()(shard.ids(end - 6, end)).found is None
    assert ask()(shard.ids(end - 7, end - 1)).found is not None


@pytest.mark.parametrize("level", LEVELS)
def test_no_more_is_told_than_the_level_allows(ask, index, text, level):
    found = ask(level)(text[3:12]).found
    told = json.loads(found.model_dump_json())
    allowed = {"yes": [], "count": ["at_least"], "document": ["at_least", "documents"]}
    allowed["text"] = ["at_least", "documents", "places"]
    assert [name for name, value in told.items() if value is not None] == allowed[level]
    if level == "text":
        decode = index.tokenizer.decode
        assert told["places"][0]["text"] == decode(text[3:12])
        assert told["places"][0]["before"] == decode(text[:3])


def test_a_count_is_told_as_a_power_of_two(ask, index):
    desk = ask("count")
    counts = set()
    for run in [document[:4] for document, _ in documents_of(index)]:
        count = index.count(index.encode(run))
        told = desk(run).found.at_least
        assert told <= count < 2 * told and told.bit_count() == 1
        counts.add(count)
    assert len(counts) > 1


# --- who and when -------------------------------------------------------------------------------


def test_only_a_client_s_own_signed_question_is_answered(ask, index, keys, clock, text):
    log = MadeLog()
    desk = ask(log=log)
    refused("unknown_client", lambda: desk(text[:6], who="eve"))
    refused("another_source", lambda: desk(text[:6], source="bank"))
    refused("span_too_short", lambda: desk(text[:6], text[:3]))
    data = signed(keys[0]["ann"], clock, 1, [text[:6]])
    made = TraceDesk(index, keys[1], "yes", AMPLE, log, {}, clock)
    envelope = json.loads(data)
    forged = json.loads(signed(keys[0]["eve"], clock, 1, [text[:6]]))
    forged["signatures"][0]["keyid"] = envelope["signatures"][0]["keyid"]
    for wrong, code in (
        (b"", "no_question"),
        (b"{}", "no_question"),
        (b"[" * 100_000, "no_question"),
        (data + b" ", "no_question"),
        (data.replace(b"trace-question", b"trace-answer"), "no_question"),
        (json.dumps(forged, separators=(",", ":"), sort_keys=True).encode(), "wrong_signature"),
    ):
        refused(code, lambda wrong=wrong: made.answer(wrong))
    assert log.entries == []
    assert made.answer(data).found


def test_a_question_is_answered_once_and_in_time(ask, index, keys, clock, text):
    desk = TraceDesk(index, keys[1], "yes", AMPLE, MadeLog(), {}, clock)
    first = signed(keys[0]["ann"], clock, 5, [text[:6]])
    desk.answer(first)
    refused("not_fresh", lambda: desk.answer(first))
    refused("not_fresh", lambda: desk.answer(signed(keys[0]["ann"], clock, 4, [text[:6]])))
    desk.answer(signed(keys[0]["bob"], clock, 4, [text[:6]]))  # has numbers of its own
    late = signed(keys[0]["ann"], clock, 6, [text[:6]])
    clock.seconds += 301
    refused("not_fresh", lambda: desk.answer(late))
    clock.seconds -= 700
    refused("not_fresh", lambda: desk.answer(late))


def test_what_is_answered_is_in_the_log_first_and_without_a_word_of_it(ask, text, keys):
    log = MadeLog()
    desk = ask(log=log)
    desk(ABSENT, text[:6])
    ((kind, entry),) = log.entries
    assert (kind, entry["questions"], entry["found"], entry["level"]) == ("traced", 2, True, "yes")
    assert entry["client"] in keys[1]
    assert str(text[:6])[1:-1] not in json.dumps(entry)
    log.is_full = True
    refused("no_audit_log", lambda: desk(text[:6]))
    log.is_full = False
    desk(text[:6])


# --- the budget ---------------------------------------------------------------------------------


def test_each_client_has_a_budget_of_questions_and_of_finds_for_each_day(ask, clock, text):
    budget = AMPLE.model_copy(update={"questions_per_day": 5, "finds_per_day": 2})
    desk = ask(budget=budget)
    assert desk(ABSENT, ABSENT, ABSENT).answered == 3
    assert desk(ABSENT, ABSENT, ABSENT, ABSENT).answered == 2
    assert refused("day_spent", lambda: desk(ABSENT)).status == 429
    assert desk(text[:6], who="bob").found
    assert desk(text[:6], who="bob").found
    refused("day_spent", lambda: desk(ABSENT, who="bob"))
    clock.seconds += DAY
    assert desk(text[:6]).found and desk(text[:6], who="bob").found


def test_a_clock_that_is_set_back_gives_no_new_day(index, keys, clock, text):
    desk = TraceDesk(index, keys[1], "yes", AMPLE, MadeLog(), {}, clock)
    midnight = NOON + DAY / 2
    clock.seconds = midnight + 1
    desk.answer(signed(keys[0]["ann"], clock, 0, [text[:6]]))
    clock.seconds = midnight - 1
    later = signed(keys[0]["ann"], clock, 3_000_000, [text[:6]])
    refused("day_spent", lambda: desk.answer(later))


def test_finds_in_all_do_not_come_back(ask, clock, text):
    desk = ask(budget=AMPLE.model_copy(update={"finds_in_all": 3}))
    for _ in range(3):
        assert desk(text[:6]).found
        clock.seconds += DAY
    refused("all_spent", lambda: desk(text[:6]))


def test_questions_a_minute_are_limited(ask, clock):
    desk = ask(budget=AMPLE.model_copy(update={"requests_per_minute": 3}))
    for _ in range(3):
        desk(ABSENT)
    refused("too_fast", lambda: desk(ABSENT))
    desk(ABSENT, who="bob")
    clock.seconds += 61
    desk(ABSENT)


def greedy_client(ask_desk, known, vocabulary):
    """Ids that a client learns after `known`, by trying every id until nothing is answered."""
    learned = []
    try:
        while True:
            run = [*known, *learned][-8:]
            candidates = [[*run, i] for i in vocabulary]
            for start in range(0, len(candidates), 500):
                answer = ask_desk(*candidates[start : start + 500])
                if answer.found is not None:
                    learned.append(candidates[start + answer.answered - 1][-1])
                    break
            else:
                return learned
    except Refusal as e:
        assert e.code in ("day_spent", "all_spent")
        return learned


def test_a_client_that_extends_a_span_greedily_learns_an_id_for_each_find_and_no_more(
    ask, index, clock, text
):
    """With no limit it would have the rest of the document."""
    vocabulary = range(index.tokenizer.vocab_size)
    ample = AMPLE.model_copy(update={"questions_per_day": 10**9, "finds_per_day": 10**6})
    assert greedy_client(ask(budget=ample), text[-38:-30], vocabulary) == text[-30:]

    budget = AMPLE.model_copy(update={"finds_per_day": 5, "finds_in_all": 12})
    desk = ask(budget=budget)
    learned = []
    for day, most in enumerate((5, 10, 12, 12)):
        learned += greedy_client(desk, [*text[:8], *learned], vocabulary)
        assert learned == text[8 : 8 + most], day
        clock.seconds += DAY


def test_a_killed_server_forgets_nothing_that_was_spent(ask, index, keys, clock, text, tmp_path):
    clock.seconds = time.time()  # the log has the machine's clock
    budget = AMPLE.model_copy(update={"questions_per_day": 100, "finds_per_day": 3})
    log = AuditLog.open(tmp_path / "audit")
    desk = ask(budget=budget, log=log)
    last = signed(keys[0]["ann"], clock, 10**6, [text[:6]])
    desk(text[:6])
    TraceDesk(index, keys[1], "yes", budget, log, {}, clock).answer(last)
    spent = read_spending(tmp_path / "audit")  # while the log is open: no orderly end
    ann = key_id(next(pem for name, pem in keys[1].items() if name in spent))
    assert (spent[ann].questions, spent[ann].finds, spent[ann].finds_in_all) == (2, 2, 2)
    again = TraceDesk(index, keys[1], "yes", budget, log, spent, clock)
    refused("not_fresh", lambda: again.answer(last))
    assert again.answer(signed(keys[0]["ann"], clock, 10**6 + 1, [text[:6]])).found
    refused("day_spent", lambda: again.answer(signed(keys[0]["ann"], clock, 10**6 + 2, [text[:6]])))
    log.close()
    assert not check_log(tmp_path / "audit", public_key(tmp_path / "audit")).findings


def test_a_log_that_was_altered_gives_no_budget(ask, text, tmp_path):
    log = AuditLog.open(tmp_path / "audit")
    desk = ask(log=log)
    desk(text[:6])
    log.close()
    (segment,) = (tmp_path / "audit").glob("0*.jsonl")
    segment.write_bytes(segment.read_bytes().replace(b'"found":true', b'"found":false'))
    with pytest.raises(AuditError, match="does not hold up"):
        read_spending(tmp_path / "audit")
    assert read_spending(tmp_path / "none") == {}


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_day_has_no_more_outcomes_than_its_bits_say(questions, finds):
    """Outcomes counted one by one: each sequence of answers with at most so many yes."""
    budget = Budget(questions_per_day=questions, finds_per_day=finds)
    outcomes = [a for a in itertools.product([0, 1], repeat=questions) if sum(a) <= finds]
    assert 2 ** budget.bits_per_day("yes", 9) == pytest.approx(len(outcomes))
    extra = min(questions, finds) * math.log2(MAX_COUNT_BITS)
    assert budget.bits_per_day("count", 9) == pytest.approx(math.log2(len(outcomes)) + extra)
    assert budget.bits_per_day("document", 9) > budget.bits_per_day("count", 9)
    assert budget.bits_per_day("text", 9) == math.inf


def test_the_figures_in_the_guide_are_those_of_the_defaults():
    assert round(Budget().bits_per_day("yes", 10**6)) == 3367


# --- served -------------------------------------------------------------------------------------


def test_a_served_index_gives_the_spans_that_a_look_gives(index, keys):
    log = MadeLog()
    desk = TraceDesk(index, keys[1], "text", AMPLE, log, {})
    decode = index.tokenizer.decode
    documents = documents_of(index)
    copied = decode(documents[1][0][10:50]) + " never written " + decode(documents[5][0][:30])
    words = split_words(copied, index.tokenizer)
    truth = find_spans(index, words, AMPLE.min_tokens)
    assert len(truth) >= 2
    with serving(create_trace_app(desk)) as address:
        remote = RemoteIndex("clinic", address, keys[0]["ann"])
        found = remote.find_spans(words, index.card.tokenizer)
        assert [(s.start, s.end, s.first, s.last) for s in found] == [
            (s.start, s.end, s.first, s.last) for s in truth
        ]
        assert [s.occurrences for s in found] == [s.occurrences for s in truth]
        assert sum(entry["found"] for _, entry in log.entries) <= 2 * len(truth)
        stranger = RemoteIndex("clinic", address, keys[0]["eve"])
        with pytest.raises(Exception, match="signed by no client's key"):
            stranger.find_spans(words, index.card.tokenizer)
        post = f"{address}/v1/trace"
        json_type = {"Content-Type": "application/json"}
        assert httpx.post(post, content=b"{}").status_code == 415
        assert httpx.post(post, content=b"0" * (3 << 20), headers=json_type).status_code == 413
        reply = httpx.post(post, content=b"{}", headers=json_type)
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "no_question"
        assert httpx.get(f"{address}/nothing").json()["error"]["message"] == "Not Found."
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert "x-request-id" in reply.headers and reply.headers["cache-control"] == "no-store"


def test_a_spent_budget_is_said_to_the_client(index, keys):
    budget = AMPLE.model_copy(update={"questions_per_day": 3})
    desk = TraceDesk(index, keys[1], "yes", budget, MadeLog(), {})
    words = split_words("none of these words is there at all " * 3, index.tokenizer)
    with serving(create_trace_app(desk)) as address:
        remote = RemoteIndex("clinic", address, keys[0]["ann"])
        with pytest.raises(BusyError, match="budget is spent"):
            remote.find_spans(words, index.card.tokenizer)


def test_a_directory_without_a_client_s_key_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no client's key"):
        read_clients(tmp_path)
    (tmp_path / "a.pub").write_bytes(b"-----BEGIN PUBLIC KEY-----\n")
    with pytest.raises(ConfigError, match=r"a\.pub"):
        read_clients(tmp_path)
