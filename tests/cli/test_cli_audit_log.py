"""`flexolmo audit` on a server's log."""

import json

import pytest

from flexolmo.serving.audit_log import AuditLog
from made_audit import decision, fill, finished


@pytest.fixture
def audit(tmp_path):
    """A log of a decision and what ended it."""
    log = AuditLog.open(tmp_path / "audit")
    log.append("decision", decision())
    log.append("finished", finished(0))
    log.close()
    return tmp_path / "audit"


def test_a_sound_log_is_said_to_hold_and_a_changed_one_exits_with_1(audit, run, works):
    said = works("audit", "verify", audit)
    assert "2 entries hold." in said and "covers 2; 0 came after it" in said
    assert "The key was taken from the log's own directory" in said
    assert "own directory" not in works("audit", "verify", audit, "--key", audit / "log.pem.pub")
    file = audit / f"{0:020}.jsonl"
    file.write_bytes(file.read_bytes().replace(b"alice", b"carol", 1))
    code, out, _ = run("audit", "verify", audit)
    assert code == 1
    assert out.startswith(f"Entry 0 ({file.name}, line 1) was altered")
    assert "does not hold up. Found: 1." in out


def test_checkpoints_kept_elsewhere_are_compared_with(audit, run, works, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text(works("audit", "checkpoint", audit))
    log = AuditLog.open(audit)
    fill(log, 3)
    log.close()
    assert "5 entries hold." in works("audit", "verify", audit, "--against", kept)
    for path in audit.glob("*.jsonl"):
        path.unlink()
    log = AuditLog.open(audit)
    fill(log, 5)
    log.close()
    code, out, _ = run("audit", "verify", audit, "--against", kept)
    assert code == 1 and "replaced as a whole" in out
    for path in audit.iterdir():
        path.unlink()
    AuditLog.open(audit).close()
    code, _, err = run("audit", "verify", audit, "--against", kept)
    assert code == 2 and "was not signed with this log's key" in err
    kept.write_bytes(b"\xff\x1b[2J")
    code, _, err = run("audit", "verify", audit, "--against", kept)
    assert code == 2 and "it is no checkpoint of an audit log" in err


def test_an_entry_and_the_logs_growth_are_proved_with_the_public_key_alone(
    audit, run, works, tmp_path
):
    kept, proof, key = tmp_path / "kept.txt", tmp_path / "proof.json", tmp_path / "log.pub"
    kept.write_text(works("audit", "checkpoint", audit))
    key.write_bytes((audit / "log.pem.pub").read_bytes())
    log = AuditLog.open(audit)
    fill(log, 3)
    log.close()
    proof.write_text(works("audit", "prove", audit, 1))
    said = works("audit", "verify-proof", proof, "--key", key)
    assert said.startswith("Entry 1 is in the log") and '"written_tokens":70' in said
    proof.write_text(proof.read_text().replace("alice", "carol"))
    code, out, _ = run("audit", "verify-proof", proof, "--key", key)
    assert code == 1 and "proves nothing" in out
    proof.write_text(works("audit", "prove", audit, "--since", kept))
    assert "begins with the 2 entries" in works("audit", "verify-proof", proof, "--key", key)
    for wrong in ([], [1, "--since", kept]):
        code, _, err = run("audit", "prove", audit, *wrong)
        assert code == 2 and "Give the number of an entry, or --since" in err
    code, _, err = run("audit", "prove", audit, 5)
    assert code == 2 and "no entry 5 is among them" in err


def test_usage_is_printed_as_a_table_as_csv_and_as_json(audit, run, works):
    period = ("--from", "2000-01-01", "--to", "2999-01-01")
    table = works("audit", "usage", audit, *period)
    assert "Ann" in table and "(public text)" in table and "75" in table
    assert works("audit", "usage", audit, *period, "--csv") == (
        '"name","requests","prompt_tokens","written_tokens","tokens"\n'
        '"Ann",1,30,70,25.0\n"",1,30,70,75.0\n'
    )
    found = json.loads(works("audit", "usage", audit, *period, "--json", "--by", "principal"))
    assert found == {
        "from": "2000-01-01",
        "to": "2999-01-01",
        "by": "principal",
        "usage": [
            {
                "name": "alice",
                "requests": 1,
                "prompt_tokens": 30,
                "written_tokens": 70,
                "tokens": 100.0,
            }
        ],
    }
    code, _, err = run("audit", "usage", audit, *period, "--csv", "--json")
    assert code == 2 and "not both" in err


def test_old_entries_are_pruned_from_the_command_line(audit, works):
    assert works("audit", "prune", audit, "--before", "2000-01-01") == "Removed 0 entries.\n"


@pytest.mark.parametrize("verb", ["verify", "checkpoint", "prove"])
def test_a_directory_without_a_log_is_an_error_in_words(run, tmp_path, verb):
    code, _, err = run("audit", verb, tmp_path / "none", *(["0"] if verb == "prove" else []))
    assert code == 2 and "log.pem.pub cannot be read" in err
