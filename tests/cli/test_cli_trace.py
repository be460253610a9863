"""`flexolmo trace` as a program: index, query, serve."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from flexolmo.bundle.signing import create_key
from flexolmo.errors import ConfigError
from made_sets import made_text
from made_traces import documents_of, prepare_text


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """A prepared set, in a directory of its own."""
    return prepare_text(tmp_path_factory.mktemp("clinic"), [made_text(n) for n in range(12)])


@pytest.fixture
def place(works, clinic, tmp_path):
    """An index, and a text a part of which is in it."""
    from flexolmo.trace.index import open_index

    said = works("trace", "index", "--data", clinic, "-o", tmp_path / "index", "--workers", 1)
    assert "for each byte of text" in said
    index = open_index(tmp_path / "index")
    document, _ = documents_of(index)[1]
    copied = index.tokenizer.decode(document[:40])
    (tmp_path / "answer.txt").write_text(f"{copied} and <b>never\x1b[2J</b> written")
    return tmp_path


def test_a_text_is_traced_to_its_document(works, run, place, monkeypatch):
    words = ["trace", "query", place / "index", "--text", place / "answer.txt"]
    found = json.loads(works(*words, "--json"))
    assert found["sources"] == ["clinic"]
    (span,) = [s for s in found["spans"] if s["end"] - s["start"] >= 30]
    assert span["occurrences"][0]["position"] == 0
    assert span["text"] == span["occurrences"][0]["text"]
    assert (place / "answer.txt").read_text().startswith(span["text"])
    assert "byte 0" in works(*words)
    code, _, err = run(*words, "--html", place / "page.html")
    assert code == 0 and "page.html" in err
    page = (place / "page.html").read_text()
    assert "<mark>" in page and "<b>never" not in page
    assert len(json.loads(works(*words, "--json", "--min-tokens", 1, "--keep", 2))["spans"]) == 2
    assert "No span of at least 500 tokens" in works(*words, "--min-tokens", 500)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--text", "none.txt"], "none.txt"),
        (["--text", "bad.txt"], "cannot be traced"),
        (["--text", "large.txt"], "1,048,576"),
        (["--text", "answer.txt", "--html", "page.pdf"], r"\.html"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(run, place, monkeypatch, words, named):
    import re

    monkeypatch.chdir(place)
    (place / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (place / "large.txt").write_bytes(b"a " * (1 << 19) + b"a")
    code, out, err = run("trace", "query", "index", *words)
    assert code == 2 and out == "" and re.search(named, err) and "Traceback" not in err


def test_a_source_that_is_no_index_or_has_no_key_is_refused(run, place):
    text = ["--text", place / "answer.txt"]
    code, _, err = run("trace", "query", place, *text)
    assert code == 2 and "card.json" in err
    code, _, err = run("trace", "query", "clinic=https://clinic.example", *text)
    assert code == 2 and "--key" in err
    code, _, err = run("trace", "query", place / "a=b", *text)
    assert code == 2 and "card.json" in err


def test_an_index_is_served_to_a_client_by_signed_questions(works, run, place):
    create_key(place / "coordinator.pem")
    (place / "clients").mkdir()
    (place / "clients/coordinator.pub").write_bytes((place / "coordinator.pem.pub").read_bytes())
    words = ["trace", "serve", place / "index", "--clients", place / "clients"]
    words += ["--audit", place / "audit", "--level", "document", "--min-tokens", 8, "--port", 0]
    program = [sys.executable, "-c", "from flexolmo.cli import main; main()", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stderr.readline()
            assert "A day's answers tell each client at most" in line
            while "listening" not in line:
                line = process.stderr.readline()
                assert line
            host, port = json.loads(line)["address"]
            ask = ["trace", "query", f"clinic=http://{host}:{port}", "--json", "--text"]
            ask += [place / "answer.txt", "--key", place / "coordinator.pem"]
            served = json.loads(works(*ask, "--tokenizer", place / "index"))["spans"]
            direct = ["trace", "query", place / "index", "--json", "--text", place / "answer.txt"]
            looked = json.loads(works(*direct))["spans"]
            places = sorted((s["start"], s["end"], s["documents"]) for s in served)
            assert places == sorted((s["start"], s["end"], s["documents"]) for s in looked)
            assert all(s["occurrences"] == [] and s["bits"] is None for s in served)
            asked = run(*ask, "--tokenizer", place / "index", "--min-tokens", 4)
            assert "clinic: the owner answers for spans of at least 8 tokens" in asked[2]
            create_key(place / "stranger.pem")
            ask[ask.index(place / "coordinator.pem")] = place / "stranger.pem"
            code, _, err = run(*ask, "--tokenizer", place / "index")
            assert code == 2 and "signed by no client's key" in err
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)
    said = works("audit", "verify", place / "audit")
    assert "entries hold" in said or "1 entry holds" in said


def test_indexes_of_a_server_are_given_by_name(place, pico_anchor, pico_anchor_dir):
    from flexolmo.cli.serve import open_tracer

    create_key(place / "key.pem")
    words = [f"notes={place / 'index'}", "bank=https://bank.example"]
    tracer = open_tracer(words, "yes", place / "key.pem", pico_anchor_dir)
    sources = tracer.sources
    shares = np.exp(pico_anchor.public.unigram)
    np.testing.assert_allclose(tracer._public_bits, -np.log2(shares), rtol=1e-5)
    assert {name: source.name for name, source in sources.items()} == {
        "notes": "clinic",
        "bank": "bank",
    }
    for wrong, key in (
        (["index"], None),
        (["=index"], None),
        (["notes="], None),
        ([words[0], words[0]], None),
        ([words[1]], None),
        (["bank=http://bank.example"], place / "key.pem"),
    ):
        with pytest.raises(ConfigError):
            open_tracer(wrong, "yes", key, pico_anchor_dir)


def test_settings_of_a_service_are_checked(run, place):
    words = ["trace", "serve", place / "index", "--clients", place, "--audit", place / "audit"]
    for more, named in (
        (["--level", "all"], "level"),
        (["--finds-per-day", 0], "finds_per_day"),
        (["--min-tokens", 1], "min_tokens"),
        ([], "no client's key"),
    ):
        code, _, err = run(*words, *more)
        assert code == 2 and named in err
    assert not (place / "audit").exists()
