"""Usage is what the log's requests sum up to, by whichever name, and nothing finer."""

import csv
import datetime
import io

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.errors import AuditError
from flexolmo.serving.audit_check import public_key
from flexolmo.serving.audit_log import AuditLog
from flexolmo.serving.metering import Usage, measure_usage, usage_as_csv
from flexolmo.serving.retention import remove_entries
from made_audit import decision, fill, finished

OWNERS = {"amber": "Ann", "birch": "Bob", "alder": "Ann"}
FIRST, LAST = datetime.date(2026, 11, 1), datetime.date(2026, 11, 30)


def write(directory, entries, days):
    """A log of `finished` entries, each on its day."""
    with pytest.MonkeyPatch.context() as patch:
        log = AuditLog.open(directory)
        for fields, day in zip(entries, days, strict=True):
            now = f"{day}T23:59:59.999999Z"
            patch.setattr("flexolmo.serving.audit_log.utc_now", lambda now=now: now)
            log.append("finished", fields)
        log.close()
    return directory


def usage(directory, by="owner", first=FIRST, last=LAST):
    return measure_usage(directory, first, last, by, public_key(directory))


@st.composite
def requests(draw):
    experts = draw(st.lists(st.sampled_from(sorted(OWNERS)), unique=True))
    weights = {name: draw(st.integers(0, 9)) for name in experts} | {"public": 1}
    total = sum(weights.values())
    return finished(
        0,
        draw(st.sampled_from(["alice", "bob"])),
        prompt_tokens=draw(st.integers(0, 1000)),
        written_tokens=draw(st.integers(0, 1000)),
        shares={name: weight / total for name, weight in weights.items()},
        owners={name: OWNERS[name] for name in experts},
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(requests(), max_size=8))
def test_usage_is_summed_as_by_hand_and_owners_tokens_are_all_tokens(tmp_path_factory, asked):
    directory = write(tmp_path_factory.mktemp("x") / "a", asked, ["2026-11-30"] * len(asked))
    rows = {row.name: row for row in usage(directory)}
    for name in {"Ann", "Bob", None}:
        experts = {e for e, owner in OWNERS.items() if owner == name} or {"public"}
        own = [r for r in asked if experts & r["shares"].keys()]
        if not own:
            assert name not in rows
            continue
        row = rows[name]
        assert row.requests == len(own)
        assert row.prompt_tokens == sum(r["prompt_tokens"] for r in own)
        assert row.written_tokens == sum(r["written_tokens"] for r in own)
        tokens = sum(
            share * (r["prompt_tokens"] + r["written_tokens"])
            for r in own
            for expert, share in r["shares"].items()
            if expert in experts
        )
        assert row.tokens == pytest.approx(tokens)
    people = usage(directory, "principal")
    assert sum(p.requests for p in people) == len(asked)
    assert sum(p.tokens for p in people) == pytest.approx(sum(r.tokens for r in rows.values()))


def test_only_days_of_the_period_count_both_ends_included(tmp_path):
    days = ["2026-10-31", "2026-11-01", "2026-11-02", "2026-11-03"]
    directory = write(tmp_path / "a", [finished(0, d) for d in days], days)
    first, last = datetime.date(2026, 11, 1), datetime.date(2026, 11, 2)
    assert [row.name for row in usage(directory, "principal", first, last)] == days[1:3]


def test_other_entries_count_nothing(tmp_path):
    log = AuditLog.open(tmp_path / "a")
    log.append("decision", decision())
    fill(log, 1)
    log.close()
    assert usage(tmp_path / "a", last=datetime.date.max) == []


def test_usage_of_a_log_that_does_not_hold_up_is_refused(tmp_path):
    directory = write(tmp_path / "a", [finished(0)] * 2, ["2026-11-02"] * 2)
    file = directory / f"{0:020}.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"written_tokens":70', b'"written_tokens":10', 1))
    with pytest.raises(AuditError, match=r"Entry 0 .* was altered"):
        usage(directory)


def test_usage_of_days_that_were_removed_is_refused(tmp_path):
    days = ["2026-11-01", "2026-11-02", "2026-11-03"]
    directory = write(tmp_path / "a", [finished(0, d) for d in days], days)
    remove_entries(directory, datetime.date(2026, 11, 2), public_key(directory))
    with pytest.raises(AuditError, match="Ask --from 2026-11-02"):
        usage(directory)
    kept = usage(directory, "principal", datetime.date(2026, 11, 2))
    assert [row.name for row in kept] == days[1:]


def test_csv_holds_every_field_and_no_formula():
    rows = [
        Usage("Ann", 1, 2, 3, 4.5),
        Usage("=1+1,2"),
        Usage('@"a"\n'),
        Usage("\r=1"),
        Usage(None, 7),
    ]
    found = list(csv.DictReader(io.StringIO(usage_as_csv(rows), newline="")))
    assert found[0] == {
        "name": "Ann",
        "requests": "1",
        "prompt_tokens": "2",
        "written_tokens": "3",
        "tokens": "4.5",
    }
    assert [row["name"] for row in found[1:]] == ["'=1+1,2", '\'@"a"\n', "'\r=1", ""]
