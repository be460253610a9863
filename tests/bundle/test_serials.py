"""An owner's serials grow, and none is taken twice."""

import stat
import threading
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo import files
from flexolmo.bundle.serials import carry_serials, record_of, take_serial
from flexolmo.errors import BundleError, FlexOlmoError, SignatureError

names = st.sampled_from(["maths", "news"])
owners = st.sampled_from(["Ann", "Bob & Co"])


@pytest.fixture
def key(tmp_path):
    (tmp_path / "key.pem").write_text("a key")
    return tmp_path / "key.pem"


@settings(max_examples=30)
@given(steps=st.lists(st.tuples(owners, names, st.none() | st.integers(1, 5)), max_size=8))
def test_each_serial_is_above_all_before_of_its_owner_and_name(tmp_path_factory, steps):
    key = tmp_path_factory.mktemp("key") / "key.pem"
    key.touch()
    last = {}
    for owner, name, asked in steps:
        before = last.get((owner, name), 0)
        if asked is not None and asked <= before:
            with pytest.raises(BundleError, match=f"Serial {asked} is not higher than {before}"):
                take_serial(key, owner, name, asked)
            continue
        taken = take_serial(key, owner, name, asked)
        assert taken == (before + 1 if asked is None else asked)
        last[owner, name] = taken


def test_the_record_is_private_and_beside_the_key(key):
    take_serial(key, "Ann", "maths")
    assert record_of(key) == key.parent / "key.pem.serials.json"
    assert stat.S_IMODE(record_of(key).stat().st_mode) == 0o600
    assert sorted(p.name for p in key.parent.iterdir()) == ["key.pem", "key.pem.serials.json"]


def test_two_at_once_get_two_serials(key):
    taken = []
    threads = [
        threading.Thread(target=lambda: taken.append(take_serial(key, "Ann", "maths")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 9))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"A": 3}', '{"A": {"b": 0}}', '{"A": {"b": "1"}}', '{"A": {"b": true}}']
)
def test_a_record_that_is_none_is_refused_and_kept(key, text):
    record_of(key).write_text(text)
    with pytest.raises(BundleError, match=r"key\.pem\.serials\.json"):
        take_serial(key, "Ann", "maths", 9)
    assert record_of(key).read_text() == text


def test_nothing_is_recorded_for_a_key_that_is_not_there(tmp_path):
    with pytest.raises(SignatureError, match="flexolmo expert key"):
        take_serial(tmp_path / "key.pem", "Ann", "maths")
    assert not list(tmp_path.iterdir())


def test_without_a_lock_no_serial_is_taken(key, monkeypatch):
    monkeypatch.setattr(files, "lock_directory", lambda path, wait: nullcontext(False))
    with pytest.raises(FlexOlmoError, match="cannot be locked"):
        take_serial(key, "Ann", "maths")


def test_a_new_key_goes_on_where_the_old_one_ended(key):
    new = key.with_name("new.pem")
    new.touch()
    carry_serials(key, new)
    assert take_serial(new, "Ann", "news") == 1
    take_serial(key, "Ann", "maths", 7)
    take_serial(new, "Ann", "news", 4)
    take_serial(key, "Ann", "news")
    carry_serials(key, new)
    assert take_serial(new, "Ann", "maths") == 8
    assert take_serial(new, "Ann", "news") == 5
