import io
import json
import os
import shutil
import stat
import tarfile
import zipfile

import pytest
from typer.testing import CliRunner

from flexolmo.cli import data
from flexolmo.cli.data import app
from flexolmo.data.documents import read_documents
from flexolmo.data.tokenizer import train_tokenizer
from flexolmo.errors import DataError, SourceUnavailable
from flexolmo.files import digest_file
from flexolmo.research.corpora import extract_system, fetch, sources
from flexolmo.research.corpora.archives import Archive
from flexolmo.research.corpora.fetch import download, fetch_set
from flexolmo.research.corpora.sources import CLIENTS, SETS, SOURCES, Source, sources_of
from made_sets import made_text

DEMO_SETS = data._DEMO.split(",")


def _wheel(path, members):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)
        info = "tiny_texts-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def _extract(package: Archive):
    yield from package.texts(r"\.txt$")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder that pip takes for its only registry, with one wheel; two sources of set `news`."""
    links = tmp_path / "links"
    links.mkdir()
    _wheel(
        links / "tiny_texts-1.0-py3-none-any.whl", {f"tiny/{i}.txt": made_text(i) for i in range(9)}
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(
        sources,
        "SOURCES",
        (
            Source("news", "tiny", "pip", "tiny-texts", "1.0", "CC0-1.0", _extract),
            Source("news", "absent", "pip", "no-such-package", "1.0", "CC0-1.0", _extract),
            Source("news", "other", "npm", "other", None, "CC0-1.0", _extract),
        ),
    )
    return links


@pytest.fixture
def copied(registry, monkeypatch):
    """The same folder, of which `cp` gets the wheel: for tests of what is in it, as pip takes half
    a second."""
    wheel = str(registry / "tiny_texts-1.0-py3-none-any.whl")
    monkeypatch.setattr(fetch, "_download_command", lambda *asked: ["cp", wheel, str(asked[-1])])
    return registry


def test_what_a_download_leaves_out_or_mends_is_counted(tmp_path, copied, monkeypatch):
    texts = {f"tiny/{i}.txt": made_text(i).encode() + b"\xff" * (i == 4) for i in range(9)}
    _wheel(copied / "tiny_texts-1.0-py3-none-any.whl", texts)
    room = 4 * len(made_text(0)) + 200
    small = Source("news", "tiny", "pip", "tiny-texts", "1.0", "CC0-1.0", _extract, room)
    monkeypatch.setattr(sources, "SOURCES", (small,))
    said = []
    card = fetch_set("news", tmp_path / "out", cache=tmp_path / "cache", say=said.append)
    [entry] = card["sources"]
    left = 9 - entry["documents"]
    assert 0 < left < 9
    assert entry["left_out"] == {"beyond the size wanted": left}
    assert entry["texts_with_bytes_replaced"] == 1
    found = sum(map(len, texts.values())) + 2  # the byte replaced takes three
    assert entry["left_out_bytes"] == {"beyond the size wanted": found - entry["bytes"]}
    assert said == [
        f"news: {found - entry['bytes']:,} of {found:,} bytes of text were left out of the "
        f"download: {left} beyond the size wanted."
    ]


def _extract_long(package: Archive):
    for name, text in package.texts(r"\.txt$"):
        if len(text) < 100:
            package.leave_out("texts under 100 characters", text)
        else:
            yield name, text


@pytest.mark.parametrize("count, is_loud", [(1, False), (9, True)])
def test_a_loss_is_said_when_it_is_over_a_fifth_and_stays_with_the_set(
    tmp_path, copied, monkeypatch, count, is_loud
):
    texts = {f"tiny/{i}.txt": made_text(i) for i in range(9)}
    texts |= {f"tiny/short{i}.txt": made_text(i)[:99] for i in range(count)}
    _wheel(copied / "tiny_texts-1.0-py3-none-any.whl", texts)
    monkeypatch.setattr(
        sources,
        "SOURCES",
        (Source("news", "tiny", "pip", "tiny-texts", "1.0", "CC0-1.0", _extract_long),),
    )
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    counted = f"the download left out {99 * count} bytes, {count} texts under 100 characters"
    loud = f"bytes of text were left out of the download: {count} texts under"
    first = CliRunner().invoke(app, ["fetch", "--sets", "news"])
    settings = ["--tokenizer", str(tmp_path / "tokenizer.json")]
    train_tokenizer(texts.values(), 300).save(tmp_path / "tokenizer.json")
    second = CliRunner().invoke(app, ["prepare", "corpus/news", *settings])
    for result in (first, second):
        shown = " ".join(result.output.split())
        assert result.exit_code == 0, shown
        assert counted in shown and (loud in shown) == is_loud
    card = json.loads((tmp_path / "prepared/news/card.json").read_text())
    assert card["sources"][0]["left_out"] == {"texts under 100 characters": count}


@pytest.mark.parametrize("content", ['{"year": ', "[" * 100_000, '{"year": 1900}', "[]"])
def test_a_package_laid_out_otherwise_is_a_message(tmp_path, copied, monkeypatch, content):
    _wheel(copied / "tiny_texts-1.0-py3-none-any.whl", {"p/data/1900_x.json": content})
    extract = extract_system.presidential_messages
    monkeypatch.setattr(
        sources, "SOURCES", (Source("news", "tiny", "pip", "tiny-texts", "1.0", "CC0", extract),)
    )
    with pytest.raises(DataError, match=r"tiny: .*tiny_texts.* is not laid out as expected"):
        fetch_set("news", tmp_path / "out", cache=tmp_path / "cache")
    assert not list((tmp_path / "out").iterdir())


def test_a_set_is_fetched_and_what_cannot_be_had_is_skipped_by_name(tmp_path, registry):
    said = []
    card = fetch_set("news", tmp_path / "out", cache=tmp_path / "cache", say=said.append)
    assert [s["source"] for s in card["sources"]] == ["tiny"]
    assert [s["source"] for s in card["skipped"]] == ["absent"]
    assert len(said) == 1 and "absent" in said[0] and "no-such-package" in said[0]
    documents = list(read_documents(tmp_path / "out" / "news" / "documents.jsonl.zst"))
    assert [d.text for d in documents] == [made_text(i) for i in range(9)]
    [entry] = card["sources"]
    assert entry["documents"] == 9 and entry["version"] == "1.0"
    assert entry["bytes"] == sum(len(made_text(i)) for i in range(9))
    assert entry["licence"] == "CC0-1.0"
    assert entry["digest"] == digest_file(registry / "tiny_texts-1.0-py3-none-any.whl")
    assert json.loads((tmp_path / "out" / "news" / "card.json").read_text()) == card


def test_a_finished_set_is_not_fetched_again(tmp_path, registry, monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", sources.SOURCES[:1])
    card = fetch_set("news", tmp_path, cache=tmp_path / "cache")
    monkeypatch.setattr(fetch, "_fetch_source", None)  # calling it would fail
    assert fetch_set("news", tmp_path, cache=tmp_path / "cache") == card


def test_the_cache_serves_without_a_registry_and_is_checked(tmp_path, registry):
    cache = tmp_path / "cache"
    file, version, digest = download("pip", "tiny-texts", "1.0", cache)
    shutil.move(registry / file.name, tmp_path / "away.whl")
    assert download("pip", "tiny-texts", "1.0", cache) == (file, version, digest)
    file.write_bytes(b"damaged")
    with pytest.raises(SourceUnavailable, match=r"tiny-texts 1\.0"):
        download("pip", "tiny-texts", "1.0", cache)
    shutil.move(tmp_path / "away.whl", registry / file.name)
    assert download("pip", "tiny-texts", "1.0", cache)[2] == digest


def test_a_set_with_no_source_to_be_had_is_refused_and_leaves_nothing(
    tmp_path, registry, monkeypatch
):
    monkeypatch.setattr(sources, "SOURCES", sources.SOURCES[1:2])
    with pytest.raises(SourceUnavailable, match="absent"):
        fetch_set("news", tmp_path / "out", cache=tmp_path / "cache", say=lambda _: None)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("client, program", [("npm", "npm"), ("apt", "dpkg-deb")])
def test_a_missing_client_is_named(tmp_path, monkeypatch, client, program):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceUnavailable, match=program):
        download(client, "anything", None, tmp_path / "cache")


def _program(directory, name, script):
    file = directory / name
    file.write_text("#!/bin/sh\n" + script)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_npm_and_apt_packages_are_kept_with_their_version(tmp_path, monkeypatch):
    _program(tmp_path, "npm", 'test "$1 $4" = "pack @a/b@2" && echo x > a-b-2.tgz')
    _program(tmp_path, "apt-get", "echo x > some-doc_1%3a2.3-4_all.deb")
    _program(tmp_path, "dpkg-deb", "")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    file, version, _ = download("npm", "@a/b", "2", tmp_path / "cache")
    assert (file.name, version) == ("a-b-2.tgz", "2")
    file, version, _ = download("apt", "some-doc", None, tmp_path / "cache")
    assert version == "1:2.3-4"


def test_a_client_that_fails_says_why_without_naming_a_host(tmp_path, monkeypatch):
    _program(tmp_path, "apt-get", "echo E: no package at http://host.example/x >&2; exit 100")
    _program(tmp_path, "dpkg-deb", "")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SourceUnavailable, match="apt-get update") as refused:
        download("apt", "some-doc", None, tmp_path / "cache")
    assert "no package at its registry" in str(refused.value)


def test_a_source_with_a_limit_keeps_the_lowest_hashes_in_order(tmp_path):
    texts = [(str(i), made_text(i)) for i in range(20)]
    package = Archive(tmp_path)
    kept = fetch._lowest_hashes(texts, 2000, package)
    assert package.losses.documents == {"beyond the size wanted": 20 - len(kept)}
    assert sum(len(text) for _, text in kept) <= 2000 and len(kept) >= 3
    assert kept == [pair for pair in texts if pair in kept]
    assert set(kept) == set(fetch._lowest_hashes(texts[::-1], 2000, package))


def test_unknown_sets_and_clients_are_refused():
    with pytest.raises(DataError, match="the sets are public"):
        sources_of("nothing")
    with pytest.raises(DataError, match="gem"):
        sources_of("public", ("gem",))


def test_the_registry_is_consistent():
    assert len({(source.set, source.name) for source in SOURCES}) == len(SOURCES)
    for source in SOURCES:
        assert source.set in SETS and source.client in CLIENTS and source.licence
        assert source.version or source.client in ("stdlib", "apt")
    for name in DEMO_SETS:
        assert {source.client for source in sources_of(name)} <= {"stdlib", "pip"}


@pytest.mark.parametrize("kind", ["whl", "tgz", "directory"])
def test_packages_of_every_kind_are_read_alike(tmp_path, kind):
    path = tmp_path / f"p.{kind}"
    if kind == "whl":
        _wheel(path, {"a/b.txt": "text"})
    elif kind == "tgz":
        with tarfile.open(path, "w:gz") as tar:
            member = tarfile.TarInfo("./a/b.txt")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"text"))
    else:
        (path / "a").mkdir(parents=True)
        (path / "a" / "b.txt").write_text("text")
    package = Archive(path)
    assert list(package.texts(r"\.txt$")) == [("a/b.txt", "text")]
    with pytest.raises(DataError, match="laid out differently"):
        package.names("nothing")


@pytest.mark.parametrize("name", ["a.whl", "a.tgz", "a.deb"])
def test_a_damaged_package_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"damaged")
    if name == "a.deb" and shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not on this machine")
    with pytest.raises(DataError, match=name):
        Archive(tmp_path / name)


@pytest.mark.skipif(
    os.environ.get("FLEXOLMO_NETWORK_TESTS") != "1",
    reason="set FLEXOLMO_NETWORK_TESTS=1 to fetch the demo's sets from registries",
)
@pytest.mark.parametrize("name", DEMO_SETS)
def test_the_demo_sets_have_a_megabyte_each(tmp_path, name):
    card = fetch_set(name, tmp_path)
    assert card["skipped"] == [] and card["bytes"] >= 1_000_000
