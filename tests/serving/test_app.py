"""The HTTP interface, as OpenAI's own client sees it, and as clients that mean harm or go away."""

import json
import re
import socket
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from starlette.testclient import TestClient

from flexolmo.serving.app import create_app
from flexolmo.serving.chat import ChatTemplate
from flexolmo.serving.identity import NoIdentity
from flexolmo.serving.logs import JsonLines
from flexolmo.serving.prompts import TextModel
from made_engine import said
from made_server import MadeLog, serving, wait_until

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture
def ask(client, alice):
    """`ask(path, **fields)`: Alice's request for a completion, or for a chat."""

    def post(path="/v1/completions", headers=alice, **fields):
        usual = {"model": "made", "max_tokens": 100, "seed": 3}
        usual |= {"prompt": "Hello"} if "chat" not in path else {}
        body = {name: value for name, value in (usual | fields).items() if value is not None}
        return client.post(path, json=body, headers=headers)

    return post


@pytest.fixture
def gateway(make_gateway, engine, tokenizer):
    """A gateway of a model that has a chat template."""
    texts = TextModel(engine.facts.digest, tokenizer, ChatTemplate(TEMPLATE, tokenizer))
    return make_gateway(texts=texts, limits={"stall_seconds": 2, "max_body_bytes": 20_000})


@pytest.fixture
def address(gateway):
    """Address of a real server."""
    with serving(create_app(gateway)) as address:
        yield address


@pytest.fixture
def official(address, keys):
    """OpenAI's client, as anybody would set it up."""
    with openai.OpenAI(api_key=keys["alice"], base_url=f"{address}/v1", max_retries=0) as client:
        yield client


# --- OpenAI's client ----------------------------------------------------------------------------


def test_a_completion_and_its_sources(official):
    found = official.completions.with_raw_response.create(
        model="made", prompt="Hello", max_tokens=100, seed=3, extra_body={"purpose": "education"}
    )
    reply = found.parse()
    assert reply.choices[0].text == said(["notes", "papers"], 3)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.flexolmo["enabled"] == ["notes", "papers"]
    assert found.headers["X-FlexOlmo-Decision"] == reply.flexolmo["decision"]
    assert found.headers["X-FlexOlmo-Entry"] == str(reply.flexolmo["entry"])
    assert found.headers["X-FlexOlmo-Enabled"] == "notes, papers"
    assert found.headers["X-FlexOlmo-Model"] == reply.flexolmo["model_digest"]
    assert reply.flexolmo["attributions"]["notes"] == "Notes of Ann's ward."
    assert "shares" not in reply.flexolmo or reply.flexolmo["shares"] is None


def test_sources_are_chosen_by_extra_body(official):
    reply = official.completions.create(
        model="made", prompt="x", max_tokens=100, seed=1, extra_body={"experts": {"only": []}}
    )
    assert reply.choices[0].text == said([], 1)
    with pytest.raises(openai.PermissionDeniedError, match="no policy permits it"):
        official.completions.create(
            model="made", prompt="x", extra_body={"experts": {"only": ["secret"]}}
        )
    with pytest.raises(openai.BadRequestError, match="Unknown expert note") as caught:
        official.completions.create(
            model="made", prompt="x", extra_body={"experts": {"without": ["note"]}}
        )
    assert (caught.value.code, caught.value.param) == ("unknown_expert", "experts")
    with pytest.raises(openai.BadRequestError, match="Did you mean 'experts'"):
        official.completions.create(model="made", prompt="x", extra_body={"expert": {"only": []}})


@pytest.mark.parametrize("asks_usage", [False, True])
def test_a_stream_is_the_whole_answer_in_whole_characters(official, asks_usage):
    options = {"stream_options": {"include_usage": True}} if asks_usage else {}
    chunks = list(
        official.completions.create(
            model="made", prompt=["a", "b"], max_tokens=100, seed=5, n=2, stream=True, **options
        )
    )
    texts = {
        number: "".join(c.text for chunk in chunks for c in chunk.choices if c.index == number)
        for number in range(4)
    }
    assert texts == {number: said(["notes", "papers"], 5 + number) for number in range(4)}
    pieces = [choice.text for chunk in chunks for choice in chunk.choices]
    assert len(pieces) > 60 and not any("\ufffd" in piece for piece in pieces)
    finishes = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert finishes == ["stop"] * 4
    *before, last = chunks
    assert last.flexolmo["enabled"] == ["notes", "papers"]
    assert not any(hasattr(chunk, "flexolmo") for chunk in before)
    assert (last.choices == []) == asks_usage == (last.usage is not None)
    assert not any(chunk.usage for chunk in before)
    if asks_usage:
        assert last.usage.completion_tokens > 120 and last.usage.prompt_tokens == 8


def test_a_chat_is_answered_and_streamed(official, engine, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    usual = dict(model="made", messages=messages, max_completion_tokens=100, seed=2)
    reply = official.chat.completions.create(**usual)
    assert reply.choices[0].message.content == said(["notes", "papers"], 2)
    assert reply.choices[0].message.role == "assistant"
    prompt = tokenizer.decode(engine.seen[0].ids)
    assert prompt == "system: Be brief.\nuser: Hi\nassistant:"
    chunks = list(official.chat.completions.create(**usual, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content for chunk in chunks for choice in chunk.choices)
    assert text == said(["notes", "papers"], 2)
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].flexolmo["entry"] > 0


def test_log_probabilities_of_a_chat(official):
    reply = official.chat.completions.create(
        model="made",
        messages=[{"role": "user", "content": "Hi"}],
        seed=2,
        logprobs=True,
        top_logprobs=2,
    )
    content = reply.choices[0].logprobs.content
    assert content[0].token == "G" == bytes(content[0].bytes).decode()
    assert [len(token.top_logprobs) for token in content] == [2] * len(content)
    assert content[2].bytes is None  # half of a character
    assert content[0].logprob == content[0].top_logprobs[0].logprob < 0


def test_a_text_is_scored_without_writing_any(official, engine):
    reply = official.completions.create(
        model="made", prompt="Grüße", max_tokens=0, echo=True, logprobs=1
    )
    (choice,) = reply.choices
    assert choice.text == "Grüße" and reply.usage.completion_tokens == 0
    request = engine.seen[0]
    assert request.scores_prompt and not request.writes
    assert choice.logprobs.token_logprobs == [-token / 100 for token in request.ids[1:]]
    assert choice.logprobs.text_offset == [0, 1, 2, 2, 3, 3, 4]
    assert choice.logprobs.tokens[0] == "G" and len(choice.logprobs.top_logprobs) == 7


def test_an_echoed_prompt_stands_before_the_answer(official):
    for stream in (False, True):
        found = official.completions.create(
            model="made",
            prompt="Oh é",
            max_tokens=100,
            seed=1,
            echo=True,
            logprobs=0,
            stream=stream,
        )
        chunks = list(found) if stream else [found]
        text = "".join(c.text for chunk in chunks for c in chunk.choices)
        assert text == "Oh é" + said(["notes", "papers"], 1)
        offsets = [o for x in chunks for c in x.choices for o in c.logprobs.text_offset]
        tokens = [t for x in chunks for c in x.choices for t in c.logprobs.tokens]
        assert len(offsets) == len(tokens) and offsets == sorted(offsets)
        for offset, token in zip(offsets, tokens, strict=True):
            assert "\ufffd" in token or text[offset:].startswith(token)
    plain = official.completions.create(model="made", prompt="Oh é", seed=1, echo=True)
    assert plain.choices[0].text.startswith("Oh éGr") and plain.choices[0].logprobs is None


def test_stop_strings_are_never_shown_in_whole_or_part(official):
    stops = ["from no", "\U0001f642 x"]
    for stream in (False, True):
        found = official.completions.create(
            model="made", prompt="x", max_tokens=100, seed=1, stop=stops, stream=stream
        )
        chunks = list(found) if stream else [found]
        shown = ["".join(c.text for c in chunk.choices) for chunk in chunks]
        assert "".join(shown) == "Grüße \U0001f642 "
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_answer_ends_at_the_number_of_tokens_asked_for(official, engine):
    reply = official.completions.create(model="made", prompt="x", max_tokens=2, seed=1)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("Gr", "length")
    assert official.completions.create(model="made", prompt="x").usage.completion_tokens == 16
    official.chat.completions.create(model="made", messages=[{"role": "user", "content": "x"}])
    assert engine.seen[-1].sampling.max_new_tokens == 256 - len(engine.seen[-1].ids)
    assert (engine.seen[-1].sampling.temperature, engine.seen[-1].sampling.top_p) == (1.0, 1.0)


def test_models_are_listed_with_their_sources_and_terms(official, address):
    (model,) = official.models.list().data
    assert model.id == "made" and set(model.flexolmo["experts"]) == {
        "notes",
        "papers",
        "secret",
        "trials",
    }
    assert model.flexolmo["experts"]["trials"]["terms"]["permitted"] == ["general-research"]
    assert official.models.retrieve("made").id == "made"
    with pytest.raises(openai.NotFoundError):
        official.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="'made'"):
        official.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(api_key="x", base_url=f"{address}/v1").models.list()


# --- what goes wrong on the way -----------------------------------------------------------------


def stream_events(official, **fields):
    return official.completions.create(
        model="made", prompt="x", max_tokens=100, seed=1, stream=True, **fields
    )


def test_a_revocation_in_the_middle_of_a_stream_ends_it_with_an_error(
    official, engine, gateway, entries
):
    engine.hold()
    chunks = stream_events(official)
    engine.let(2)
    assert next(chunks).choices[0].text == "G"
    gateway.withdraw({"notes": "The owner revoked it."})
    with pytest.raises(openai.APIError, match=r"withdrawn\. The owner revoked it\.") as caught:
        list(chunks)
    assert caught.value.code == "source_withdrawn"
    engine.free()
    assert entries("finished")[0]["reason"] == "withdrawn"
    text = "".join(c.choices[0].text for c in stream_events(official))
    assert text == said(["papers"], 1)


def test_a_client_that_goes_away_frees_its_place_and_its_end_is_logged(
    official, engine, entries, gateway
):
    engine.hold()
    chunks = stream_events(official)
    engine.let(1)
    next(chunks)
    chunks.close()
    wait_until(lambda: entries("finished") and gateway.num_answers == 0)
    assert entries("finished")[0]["reason"] == "cancelled" and engine.stats().running == 0


def test_a_client_that_goes_away_before_a_whole_reply_frees_its_place_too(
    address, alice, engine, entries, gateway
):
    engine.hold()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{address}/v1/completions",
            json={"model": "made", "prompt": "x"},
            headers=alice,
            timeout=0.3,
        )
    wait_until(lambda: entries("finished") and gateway.num_answers == 0)
    assert entries("finished")[0]["reason"] == "cancelled" and engine.stats().running == 0


def test_a_client_that_takes_nothing_is_let_go(make_gateway, alice, engine, entries, caplog):
    """Its socket's buffers are small and fill up; then it has so long to read."""
    gateway = make_gateway(limits={"stall_seconds": 0.3})
    with serving(create_app(gateway)) as address:
        where = urlsplit(address)
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((where.hostname, where.port))
            fields = {"model": "made", "prompt": "x", "max_tokens": 200, "n": 20, "logprobs": 9}
            body = json.dumps(fields | {"stream": True}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            head += f"Content-Type: application/json\r\nAuthorization: {alice['Authorization']}\r\n"
            slow.sendall(head.encode() + b"\r\n" + body)
            wait_until(lambda: entries("decision"))
            wait_until(lambda: gateway.num_answers == 0)
            wait_until(lambda: "client stalled" in caplog.text)


def test_a_body_that_does_not_come_is_not_waited_for(address, alice):
    where = urlsplit(address)
    with socket.create_connection((where.hostname, where.port)) as slow:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n"
        head += f"Content-Type: application/json\r\nAuthorization: {alice['Authorization']}\r\n\r\n"
        slow.sendall(head.encode() + b"{")
        begun = time.monotonic()
        answer = slow.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408") and time.monotonic() - begun < 5


def test_a_full_disk_of_the_log_closes_the_server_and_room_opens_it(make_gateway, alice, engine):
    log = MadeLog()
    gateway = make_gateway(audit=log)
    with TestClient(create_app(gateway)) as client:
        body = {"model": "made", "prompt": "x"}
        log.is_full = True
        for path in ("/v1/completions", "/v1/completions"):
            answer = client.post(path, json=body, headers=alice)
            assert answer.status_code == 503 and answer.headers["Retry-After"] == "10"
            assert answer.json()["error"]["code"] == "audit_unavailable"
        assert not engine.seen
        assert client.get("/readyz").status_code == 503 and client.get("/healthz").is_success
        log.is_full = False
        assert client.post("/v1/completions", json=body, headers=alice).is_success
        assert client.get("/readyz").json() == {"problems": []}


def test_a_busy_server_says_when_to_come_back(ask, engine):
    engine.max_requests = 0
    answer = ask()
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_defect_is_told_as_one_without_its_words(ask, engine, caplog):
    def fail(*_):
        raise RuntimeError("secret prompt")

    engine.submit = fail
    answer = ask()
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text and "Traceback" not in answer.text
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    (said,) = [line for line in lines if line["event"] == "internal error"]
    assert said["detail"] == "RuntimeError" and "test_app.py" in said["places"][-1]
    assert "secret" not in json.dumps(lines)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_it_is_looked_after_before_the_first_request_and_from_then_on(make_gateway):
    class Upkeep:
        looks = 0

        def look(self):
            self.looks += 1

    upkeep = Upkeep()
    with TestClient(create_app(make_gateway(), upkeep)) as client:
        assert upkeep.looks == 1 and client.get("/readyz").is_success
        wait_until(lambda: upkeep.looks >= 2)


# --- bodies and headers -------------------------------------------------------------------------


def test_nobody_is_served_without_proof_and_no_body_is_read_before(ask, client):
    assert ask(headers={}).status_code == 401
    assert ask(headers={}).headers["WWW-Authenticate"] == "Bearer"
    answer = client.post("/v1/completions", content=b"\xff" * 10_000_000)
    assert answer.status_code == 401
    assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize(
    "content, status, code",
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"\xff", 400, "invalid_text"),
        (b"[" * 5000, 400, "invalid_json"),
        (b'{"model": NaN}', 400, "invalid_json"),
        (b'{"model":"made","prompt":"a","prompt":"b"}', 400, "invalid_json"),
        (b'{"model":"made","prompt":"\\ud800"}', 400, "invalid_text"),
        (b'{"model":"made"}', 400, "invalid_value"),
        (b"[]", 400, "invalid_value"),
        (b"1" * 3_000_000, 413, "body_too_large"),
        (b'{"model":"made","prompt":' + b"9" * 5000 + b"}", 400, "invalid_json"),
    ],
)
def test_a_body_that_is_not_one_is_refused(client, alice, content, status, code):
    headers = alice | {"Content-Type": "application/json"}
    answer = client.post("/v1/completions", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert len(answer.text) < 1000


def test_a_body_without_a_length_is_bounded_too(address, alice):
    pieces = (b" " * 1000 for _ in range(1000))
    headers = alice | {"Content-Type": "application/json"}
    try:
        answer = httpx.post(f"{address}/v1/completions", content=pieces, headers=headers)
    except httpx.WriteError:  # it stopped listening
        return
    assert answer.status_code == 413


def test_what_a_page_can_send_without_asking_is_refused(client, alice, ask):
    body = b'{"model":"made","prompt":"x"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = client.post(
            "/v1/completions", content=body, headers=alice | {"Content-Type": kind}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (
            415,
            "unsupported_media_type",
        )
    assert "access-control-allow-origin" not in ask().headers


def test_without_identity_the_server_answers_to_its_own_names_alone(make_gateway):
    app = create_app(make_gateway(identity=NoIdentity()), hosts=["localhost", "127.0.0.1", "[::1]"])
    with TestClient(app) as client:
        for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
            assert client.get("/v1/models", headers={"Host": host}).is_success, host
        for host in ("evil.example", "localhost.evil.example", "evil:80", "127.0.0.2", ""):
            answer = client.get("/v1/models", headers={"Host": host})
            assert answer.json()["error"]["code"] == "wrong_host", host


def test_every_response_has_an_id_and_safe_headers_and_errors_one_form(client, ask):
    answers = [ask(), ask(model="x"), client.get("/none"), client.get("/v1/completions")]
    answers += [client.get("/healthz"), client.get("/metrics"), ask(headers={})]
    assert [a.status_code for a in answers] == [200, 404, 404, 405, 200, 200, 401]
    assert len({a.headers["X-Request-Id"] for a in answers}) == len(answers)
    for answer in answers:
        assert answer.headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        if answer.is_error:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


# --- figures, logs and the document -------------------------------------------------------------


def test_figures_count_without_prompts_and_names(ask, client):
    ask(prompt="private words")
    ask(experts={"only": ["secret"]})
    ask(headers={})
    text = client.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert figures['flexolmo_http_responses_total{route="/v1/completions",status="200"}'] == "1.0"
    assert figures['flexolmo_refusals_total{code="not_permitted"}'] == "1.0"
    assert figures['flexolmo_refusals_total{code="missing_credentials"}'] == "1.0"
    assert figures['flexolmo_expert_requests_total{expert="notes"}'] == "1.0"
    assert figures['flexolmo_endings_total{reason="end_of_text"}'] == "1.0"
    assert figures["flexolmo_first_token_seconds_count"] == "1.0"
    assert float(figures["flexolmo_next_token_seconds_count"]) > 30
    assert float(figures["flexolmo_engine_written_tokens_total"]) > 30
    assert not re.search("private|alice|flexolmo_[0-9a-f]{12}", text)


def test_logs_hold_no_prompt_no_answer_and_nobodys_name(ask, caplog):
    caplog.set_level("INFO")
    ask(prompt="private words")
    ask(prompt="private words" * 100)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert {"response"} <= {line["event"] for line in lines}
    assert {"request_id", "route", "status", "seconds"} <= lines[-1].keys()
    text = json.dumps(lines)
    assert not re.search("private|alice|Gr|flexolmo_[0-9a-f]{12}", text)


def test_the_openapi_document_is_true(make_gateway, alice):
    """Requests that the document allows and requests that it does not: no response but those that
    it promises, in the form that it promises, and no server error."""
    import schemathesis  # here, for it takes seconds
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    # Whether a prompt fits a model, or an expert is known, no schema can say.
    excluded = [positive_data_acceptance]
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(make_gateway()))
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 7
    for operation in operations:
        positive = operation.as_strategy()
        negative = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @settings(max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=positive | negative)
        def holds(case):
            case.call_and_validate(headers=alice, excluded_checks=excluded)

        holds()
