"""The console in a real browser, and what it asks of the server."""

import hashlib
import json
import re
import shutil
from itertools import pairwise

import httpx
import pytest

from flexolmo.errors import BusyError
from flexolmo.serving import console
from flexolmo.serving.app import create_app
from flexolmo.serving.audit_check import public_key
from flexolmo.serving.audit_log import AuditLog
from flexolmo.serving.audit_proof import read_proof
from flexolmo.serving.console import Trail
from flexolmo.serving.policy import Policies
from flexolmo.serving.tracing import Tracer
from made_server import serving
from made_sets import made_text
from made_traces import CLINIC_POLICY, TRACE_POLICY, Named, made_index

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture
def gateway(make_gateway, tmp_path):
    """A gateway of a server with a console, which tells shares."""
    return make_gateway(audit=Trail(AuditLog.open(tmp_path / "audit")), tells_shares=True)


@pytest.fixture
def address(gateway):
    """Address of that server."""
    with serving(create_app(gateway)) as address:
        yield address


@pytest.fixture
def ask(address, keys):
    """`ask(path, who)`: what somebody gets."""

    def get(path, who="alice", **options):
        headers = {"Authorization": f"Bearer {keys[who]}"} if who else {}
        return httpx.get(f"{address}{path}", headers=headers, **options)

    return get


@pytest.fixture
def complete(address, keys):
    """`complete(who)`: the number of the entry that a request of theirs has in the log."""

    def post(who="alice"):
        body = {"model": "made", "prompt": "Hello", "max_tokens": 3}
        headers = {"Authorization": f"Bearer {keys[who]}"}
        reply = httpx.post(f"{address}/v1/completions", json=body, headers=headers)
        return reply.json()["flexolmo"]["entry"]

    return post


# --- what the page asks -------------------------------------------------------------------------


def test_sources_are_told_with_the_policys_verdict_and_reasons(ask):
    found = ask("/v1/sources?purpose=general-research").json()
    assert found["principal"] == {"subject": "alice", "groups": ["clinic"], "roles": []}
    enabled = {source["name"]: source["is_enabled"] for source in found["sources"]}
    assert enabled == {"notes": True, "papers": True, "secret": False, "trials": True}
    assert all(source["reasons"] for source in found["sources"] if not source["is_enabled"])
    assert not {s["name"]: s for s in ask("/v1/sources").json()["sources"]}["trials"]["is_enabled"]


def test_a_source_that_nobody_may_use_is_told_with_the_reason(ask, gateway):
    gateway.withdraw({"notes": "notes was revoked."})
    found = {source["name"]: source for source in ask("/v1/sources").json()["sources"]}
    assert len(found) == 4 and not found["notes"]["is_enabled"]
    assert found["notes"]["reasons"] == ["notes was revoked."]
    experts = ask("/v1/models").json()["data"][0]["flexolmo"]["experts"]
    barred = {name: expert["barred"] for name, expert in experts.items()}
    assert barred == dict.fromkeys(found) | {"notes": "notes was revoked."}


def test_whoever_is_unknown_is_told_nothing(ask):
    for path in ("/v1/sources", "/v1/decisions", "/v1/decisions/0/proof"):
        assert ask(path, who=None).status_code == 401


def test_an_unknown_purpose_is_refused(ask):
    reply = ask("/v1/sources?purpose=reserch")
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "unknown_purpose"


def test_people_see_their_own_decisions_alone(ask, complete):
    numbers = [complete(), complete()]
    other = complete("bob")
    assert [e["number"] for e in ask("/v1/decisions").json()["entries"]] == numbers[::-1]
    assert [e["number"] for e in ask("/v1/decisions", "bob").json()["entries"]] == [other]
    for number in (other, 0, 10**6):
        assert ask(f"/v1/decisions/{number}/proof").status_code == 404
    assert ask("/v1/decisions/x/proof").status_code == 404


def test_a_proof_holds_offline_under_the_logs_own_key(ask, complete, tmp_path):
    number = complete()
    found = ask(f"/v1/decisions/{number}/proof").json()
    (tmp_path / "proof.json").write_text(json.dumps(found["proof"]))
    proof = read_proof(tmp_path / "proof.json")
    assert f"Entry {number} is in the log" in proof.claim(public_key(tmp_path / "audit"))
    assert found["public_key"] == (tmp_path / "audit" / "log.pem.pub").read_text()


def test_only_the_newest_decisions_of_the_last_people_are_kept_in_mind(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "MOST_PEOPLE", 2)
    log = AuditLog.open(tmp_path / "audit")
    trail = Trail(log)
    fields = {
        "request_id": "1",
        "groups": [],
        "roles": [],
        "purposes": [],
        "asked": [],
        "enabled": [],
        "refused": {},
        "model_digest": "sha256:" + 64 * "0",
        "policy_digest": "sha256:" + 64 * "0",
    }
    for who in ["ann"] * (console.MOST_ENTRIES + 1) + ["bob", "cho"]:
        trail.append("decision", fields | {"principal": who})
    assert trail.of("ann") == []
    assert len(trail.of("bob")) == len(trail.of("cho")) == 1
    for _ in range(console.MOST_ENTRIES + 1):
        number = trail.append("decision", fields | {"principal": "bob"})
    found = [e.number for e in trail.of("bob")]
    assert len(found) == console.MOST_ENTRIES and found[0] == number
    assert all(a == b + 1 for a, b in pairwise(found))
    trail.close()


@pytest.mark.parametrize("name", ["", *console.FILES])
def test_files_come_with_a_policy_that_lets_nothing_else_in(address, name):
    reply = httpx.get(f"{address}/console/{name}")
    assert reply.status_code == 200
    said = reply.headers["content-security-policy"]
    assert said.startswith("default-src 'none'; ") and "unsafe" not in said
    assert reply.headers["content-type"] == console.FILES[name or "index.html"]
    assert "http" not in reply.text  # nothing from elsewhere


def test_no_other_file_is_given_away(address):
    for name in ("console.py", "..%2fapp.py", "%2e%2e/app.py", "nothing"):
        assert httpx.get(f"{address}/console/{name}").status_code == 404
    assert httpx.get(f"{address}/").headers["location"] == "console/"


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    if BROWSER is None:
        pytest.skip("no Chromium here: install Debian's chromium to test the console")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The console's page; fails the test for any error that the browser logs."""
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if "Security Policy" in m.text else None)
    page.goto(f"{address}/console/")
    yield page
    page.close()
    assert not errors


def enter(page, key):
    """Say who asks, with the keyboard alone."""
    page.focus("#secret")
    page.keyboard.type(key)
    page.keyboard.press("Enter")
    page.wait_for_selector("#who:not(:empty)")


def test_a_person_sees_what_a_source_changes(page, keys):
    page.wait_for_selector("#trouble:not([hidden])")  # no key yet
    enter(page, keys["alice"])
    assert page.inner_text("#who") == "You are alice: group clinic."
    assert page.locator("#sources tr").count() == 4
    page.select_option("#purpose", "general-research")
    page.wait_for_selector("#sources tr:nth-child(4) .yes")  # trials
    page.fill("#prompt", "Hello")
    page.select_option("#without", "notes")
    page.click("#go")
    page.wait_for_selector("#right .facts p")
    page.wait_for_selector("#left .facts p")
    assert "Hello" in page.inner_text("#left .answer")
    assert "from notes+papers+trials" in page.inner_text("#left .answer")
    assert "from papers+trials" in page.inner_text("#right .answer")
    assert "Notes of Ann's ward." in page.inner_text("#left .facts")
    assert "Notes of Ann's ward." not in page.inner_text("#right .facts")
    assert page.locator("#left progress").count() == 4
    assert page.locator("#right progress").count() == 3


def test_a_person_proves_their_entries(page, keys, complete):
    number = complete()
    complete()
    enter(page, keys["alice"])
    page.click("#refresh")
    page.click(f"button[aria-label='Prove entry {number}']")
    page.wait_for_selector("#trail .yes")
    assert "in the log" in page.inner_text("#trail .yes")


def test_a_false_proof_is_found_out(page, keys, complete):
    number = complete()
    enter(page, keys["alice"])

    def forge(route):
        answer = route.fetch().json()
        answer["proof"]["entry"] = answer["proof"]["entry"].replace("alice", "alicf")
        route.fulfill(json=answer)

    page.route("**/proof", forge)
    page.click("#refresh")
    page.click(f"button[aria-label='Prove entry {number}']")
    page.wait_for_selector("#trail .no")


def test_roots_are_those_of_the_definition(page):
    """RFC 9162, section 2.1.3, for every leaf of small trees."""

    def root(leaves):
        if len(leaves) == 1:
            return leaves[0]
        split = 1 << ((len(leaves) - 1).bit_length() - 1)
        return hashlib.sha256(b"\x01" + root(leaves[:split]) + root(leaves[split:])).digest()

    def path(leaves, index):
        if len(leaves) == 1:
            return []
        split = 1 << ((len(leaves) - 1).bit_length() - 1)
        if index < split:
            return [*path(leaves[:split], index), root(leaves[split:])]
        return [*path(leaves[split:], index - split), root(leaves[:split])]

    cases, roots = [], []
    for size in range(1, 18):
        leaves = [hashlib.sha256(bytes([0, i])).digest() for i in range(size)]
        for index in range(size):
            steps = [list(step) for step in path(leaves, index)]
            cases.append([list(leaves[index]), index, size, steps])
            roots.append(list(root(leaves)))
    script = """async (cases) => {
      const { rootOf } = await import("./proof.js");
      const bytes = (list) => Uint8Array.from(list);
      return Promise.all(cases.map(async ([leaf, index, size, steps]) =>
        Array.from(await rootOf(bytes(leaf), index, size, steps.map(bytes)))));
    }"""
    assert page.evaluate(script, cases) == roots


def test_what_a_model_writes_is_never_markup(page, keys, engine, monkeypatch):
    monkeypatch.setattr("made_engine.said", lambda enabled, seed: "<img src=x onerror=alert(1)>")
    enter(page, keys["alice"])
    page.fill("#prompt", "<b>Hello</b>")
    page.click("#go")
    page.wait_for_selector("#left .facts p")
    assert "<img src=x onerror=alert(1)>" in page.inner_text("#left .answer")
    assert page.locator(".answer img, .answer b").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_scrolls_no_page_sideways(page, keys, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 320, "height": 700})
    enter(page, keys["alice"])
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


# --- where an answer may come from --------------------------------------------------------------

LEARNT = "Die Schwester liest am Abend <b>leise</b> vor, und 🙂 alle hören zu, bis es dunkel wird."


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """An index of documents that hold LEARNT, among other text."""
    texts = [f"{made_text(n)} {LEARNT} {made_text(n + 50)}" for n in range(12)]
    return made_index(tmp_path_factory.mktemp("learnt"), texts)


@pytest.fixture
def tracing(make_gateway, learnt, policy_dir, monkeypatch, tmp_path):
    """Address of a server that may look papers up for all and notes for the clinic; what it writes
    has parts of LEARNT."""
    words = LEARNT.split()
    answer = f"🙂🙂 Gut: {' '.join(words[:-3])} heute. {' '.join(words[4:])}"
    monkeypatch.setattr("made_engine.said", lambda enabled, seed: answer)
    (policy_dir / "trace.cedar").write_text(TRACE_POLICY + CLINIC_POLICY)
    gateway = make_gateway(
        audit=Trail(AuditLog.open(tmp_path / "traced")),
        tracer=Tracer({name: Named(learnt, name) for name in ("papers", "notes")}, "text"),
        policies=Policies.load(policy_dir),
    )
    with serving(create_app(gateway)) as address:
        yield address


@pytest.fixture
def traced(browser, tracing):
    """`traced(key, without)`: the console after an answer to somebody was looked up."""
    page = browser.new_page(viewport={"width": 1200, "height": 1600})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if "Security Policy" in m.text else None)

    def write(key, without=""):
        page.goto(f"{tracing}/console/")
        enter(page, key)
        page.fill("#prompt", "<i>Erzähl</i> ")
        page.fill("#most", "200")
        page.select_option("#without", without)
        page.check("#trace")
        page.click("#go")
        page.wait_for_selector("#left .trace")
        if without:
            page.wait_for_selector("#right .trace")
        return page

    yield write
    page.close()
    assert not errors


def told(address, key):
    """The spans that the server tells somebody of, and the answer."""
    body = {"model": "made", "prompt": "<i>Erzähl</i> ", "max_tokens": 200, "trace": True}
    headers = {"Authorization": f"Bearer {key}"}
    reply = httpx.post(f"{address}/v1/completions", json=body, headers=headers).json()
    return reply["flexolmo"]["traces"][0]["spans"], reply["choices"][0]["text"]


def marked(page, side, number):
    """The words that a span of a side is marked by in the answer."""
    return "".join(
        page.locator(f"#{side} .answer mark[data-spans~='{number}']").all_text_contents()
    )


def test_spans_are_marked_and_lead_to_their_sources(traced, tracing, keys):
    page = traced(keys["alice"])
    spans, text = told(tracing, keys["alice"])
    assert {span["source"] for span in spans} == {"notes", "papers"} and len(spans) >= 4
    assert page.locator("#left .trace details").count() == len(spans)
    for number, span in enumerate(spans, 1):
        words = text[span["first"] : span["last"]]
        assert marked(page, "left", number) == words
        entry = page.locator("#left .trace details").nth(number - 1)
        assert entry.locator("q").text_content() == words.strip()
        assert entry.locator("summary").text_content().startswith(f"{number}. {span['source']}: ")
        assert entry.locator("blockquote").count() == len(span["places"]) > 0
        assert entry.locator("blockquote mark").first.text_content() == span["places"][0]["text"]
    answer = page.locator("#left .answer")
    shown = "".join(answer.locator(":scope > *:not(button)").all_text_contents())
    assert shown.startswith("<i>Erzähl</i> ")
    assert answer.locator("b, i").count() == page.locator(".trace b").count() == 0


def test_the_keyboard_alone_leads_to_a_source_and_back(traced, keys):
    page = traced(keys["alice"])
    page.focus("#left .answer button[data-span='2']")
    page.keyboard.press("Enter")
    entry = page.locator("#left .trace details").nth(1)
    assert entry.get_attribute("open") is not None
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    chosen = page.locator("#left .answer mark.chosen")
    chosen.first.wait_for()
    assert "".join(chosen.all_text_contents()) == marked(page, "left", 2)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.span") == "2"
    entry.locator("summary").press("Enter")
    chosen.first.wait_for(state="detached")


def test_a_source_that_is_off_or_not_allowed_is_not_shown(traced, keys):
    page = traced(keys["alice"], without="notes")
    assert "notes: " in page.inner_text("#left .trace")
    assert "notes: " not in page.inner_text("#right .trace")
    assert page.locator("#right .trace details").count() > 0
    page = traced(keys["bob"])  # may not use notes
    assert "of papers," in page.inner_text("#trace-note")
    assert "notes" not in page.inner_text("#trace-note") + page.inner_text("#left .trace")
    page.uncheck("#trace")
    page.click("#go")
    page.wait_for_selector("#left .facts p")
    assert page.locator("#left .trace, #left mark").count() == 0


def test_it_is_said_that_nothing_was_found_and_what_was_not_looked_up(traced, keys, monkeypatch):
    def fail(index, *args, **kwargs):
        if index.name_here == "notes":
            raise BusyError("spent")
        return []

    monkeypatch.setattr("flexolmo.serving.tracing.find_spans", fail)
    said = traced(keys["alice"]).inner_text("#left .trace")
    assert "No span of it occurs word for word in training text of papers." in said
    assert "Not looked up in notes: spent" in said


def test_a_server_that_traces_nothing_offers_nothing(page, keys):
    enter(page, keys["alice"])
    assert not page.is_visible("#trace")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_traces_fit_a_narrow_screen(traced, keys, scheme):
    page = traced(keys["alice"])
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 320, "height": 700})
    page.click("#left .answer button[data-span='1']")
    page.wait_for_selector("mark.chosen")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    ink, paper = page.evaluate(
        "(() => { const s = getComputedStyle(document.querySelector('mark.chosen'));"
        " return [s.color, s.backgroundColor]; })()"
    )
    assert contrast(ink, paper) >= 4.5


def contrast(one, other):
    """Ratio of two colours' brightness, as WCAG 2.2 defines it."""

    def brightness(colour):
        parts = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((brightness(one), brightness(other)))
    return (light + 0.05) / (dark + 0.05)
