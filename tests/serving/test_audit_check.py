"""Whoever changes the audit log is found out, and what was changed is named."""

import itertools
import json
import re
import shutil

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.errors import AuditError
from flexolmo.files import canonical_json
from flexolmo.serving import audit_check
from flexolmo.serving.audit_check import MAX_FINDINGS, check_log, newest_checkpoint, public_key
from flexolmo.serving.audit_log import AuditLog
from flexolmo.serving.checkpoint import decode_kept, encode_kept, sign_checkpoint
from flexolmo.serving.entries import MAX_ENTRY_BYTES, Entry, digest_leaf, utc_now
from flexolmo.serving.tree import Frontier, hash_leaf
from made_audit import decision, fill

FILE = f"{0:020}.jsonl"
COUNT = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A closed log of six entries in one file, with checkpoints of 0, 4 and 6."""
    directory = tmp_path_factory.mktemp("made") / "audit"
    log = AuditLog.open(directory, checkpoint_entries=4)
    fill(log, COUNT)
    log.close()
    return directory


@pytest.fixture(scope="module")
def lines(made):
    return (made / FILE).read_bytes().splitlines(keepends=True)


@pytest.fixture
def audit(made, tmp_path, monkeypatch):
    """A copy of it, to be changed; nobody waits for a server to end a line."""
    monkeypatch.setattr(audit_check, "_PATIENCE_SECONDS", 0.0)
    return shutil.copytree(made, tmp_path / "audit")


def findings(directory, against=()):
    return check_log(directory, public_key(directory), against).findings


def names(found, number):
    """True if a sentence names this entry, by number or by its line."""
    return any(re.search(rf"Entry {number} |{FILE}, line {number + 1}\b", s) for s in found)


def test_a_sound_log_holds(audit):
    report = check_log(audit, public_key(audit))
    assert (report.findings, report.num_findings, report.num_removed) == ([], 0, 0)
    assert (report.num_entries, report.newest.size) == (COUNT, COUNT)


# --- every change ---------------------------------------------------------------------------------


def test_every_changed_byte_is_found_and_its_entry_named(audit, lines):
    for number, line in enumerate(lines):
        for at in range(len(line)):
            changed = bytearray(line)
            changed[at] ^= 1
            before, after = b"".join(lines[:number]), b"".join(lines[number + 1 :])
            (audit / FILE).write_bytes(before + changed + after)
            assert names(findings(audit), number), (number, at)


def test_one_changed_entry_is_the_only_one_named(audit, lines):
    for number in range(COUNT):
        for old, new in [(b"reason", b"season"), (b'"kind":"stopped"', b'"kind":"started"')]:
            changed = [*lines]
            changed[number] = lines[number].replace(old, new)
            (audit / FILE).write_bytes(b"".join(changed))
            (found,) = findings(audit)
            assert found.startswith(f"Entry {number} ({FILE}, line {number + 1})")
            assert "altered" in found


def with_fields(line, **changes):
    return canonical_json(json.loads(line) | changes) + b"\n"


def test_an_entry_whose_link_was_changed_is_named_and_not_the_one_before(audit, lines):
    changed = [*lines]
    changed[2] = with_fields(lines[2], previous="sha256:" + "7" * 64)
    (audit / FILE).write_bytes(b"".join(changed))
    (found,) = findings(audit)
    assert found.startswith(f"Entry 2 ({FILE}, line 3) was altered, and perhaps Entry 1")
    changed = [with_fields(lines[0], previous="sha256:" + "7" * 64), *lines[1:]]
    (audit / FILE).write_bytes(b"".join(changed))
    assert names(findings(audit), 0)


def test_a_changed_number_is_named_and_the_rest_is_not(audit, lines):
    for number in (1, 7, 900):
        changed = [*lines]
        changed[2] = with_fields(lines[2], number=number)
        (audit / FILE).write_bytes(b"".join(changed))
        (found,) = findings(audit)
        assert found == f"Entry 2 ({FILE}, line 3) was altered: it says that it is number {number}."


def test_every_removed_run_is_found_and_named(audit, lines):
    for start, stop in itertools.combinations(range(COUNT + 1), 2):
        (audit / FILE).write_bytes(b"".join(lines[:start] + lines[stop:]))
        (found,) = findings(audit)
        run = f"Entries {start} to {stop - 1} are" if stop - start > 1 else f"Entry {start} is"
        assert found.startswith(f"{run} missing")


def test_every_other_order_is_found_and_a_moved_entry_named(audit, lines):
    for order in itertools.permutations(range(4)):
        (audit / FILE).write_bytes(b"".join([*(lines[i] for i in order), *lines[4:]]))
        found = findings(audit)
        assert bool(found) == (order != (0, 1, 2, 3))
        if found:
            assert any(names(found, i) for i, at in enumerate(order) if i != at)


def test_every_doubled_entry_is_found_and_named(audit, lines):
    for number, at in itertools.product(range(COUNT), range(COUNT + 1)):
        (audit / FILE).write_bytes(b"".join([*lines[:at], lines[number], *lines[at:]]))
        found = findings(audit)
        assert names(found, number), (number, at)
        if at > number:
            assert len(found) == 1 and "stands after entry" in found[0]


def test_an_entry_that_was_put_in_is_found_and_named(audit, lines):
    for number in range(COUNT):
        false = with_fields(lines[number], fields={"why": "false"})
        for at in (number, number + 1):
            (audit / FILE).write_bytes(b"".join([*lines[:at], false, *lines[at:]]))
            assert names(findings(audit), number), (number, at)


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"\xff\n", b"x" * (MAX_ENTRY_BYTES + 10) + b"\n"])
def test_a_line_that_is_no_entry_is_named_and_nothing_else(audit, lines, line):
    for at in range(COUNT + 1):
        (audit / FILE).write_bytes(b"".join([*lines[:at], line, *lines[at:]]))
        (found,) = findings(audit)
        assert found.startswith(f"{FILE}, line {at + 1} is no entry")


def chain(entries):
    """Lines of a log that says `entries` (kind, fields, time) and holds together."""
    previous, made = "sha256:" + "0" * 64, []
    for number, e in enumerate(entries):
        line = Entry.model_validate(e | {"number": number, "previous": previous}).encode()
        made.append(line + b"\n")
        previous = digest_leaf(hash_leaf(line))
    return made


def test_a_history_that_was_written_anew_disagrees_with_the_signed_checkpoints(audit, lines):
    for number in range(COUNT):
        entries = [json.loads(line) for line in lines]
        entries[number]["fields"] = {"why": "false"}
        (audit / FILE).write_bytes(b"".join(chain(entries)))
        (found,) = findings(audit)
        first, last = (0, 3) if number < 4 else (4, 5)
        assert found.startswith(
            f"Entry {last} ({FILE}, line {last + 1}), or entries before it from"
        )
        assert f"from {first} on" in found and "checkpoints.jsonl, line" in found


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_several_changes_at_once_are_found(audit, lines, data):
    changed = list(lines)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(changed) - 1)))
        how = data.draw(st.sampled_from(["drop", "swap", "double", "alter", "cut"]))
        if how == "drop":
            changed[at : at + 1] = []
        elif how == "swap":
            changed[at : at + 2] = changed[at : at + 2][::-1]
        elif how == "double":
            changed[at:at] = changed[at : at + 1]
        elif how == "alter":
            changed[at : at + 1] = [x.replace(b"reason", b"season") for x in changed[at : at + 1]]
        else:
            changed = changed[:at]
    (audit / FILE).write_bytes(b"".join(changed))
    assert bool(findings(audit)) == (changed != lines)


def test_findings_are_counted_and_only_so_many_named(audit, lines):
    (audit / FILE).write_bytes(b"".join(lines) + b"x\n" * 500)
    report = check_log(audit, public_key(audit))
    assert (report.num_findings, len(report.findings)) == (500, MAX_FINDINGS)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def audit_in_files(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_check, "_PATIENCE_SECONDS", 0.0)
    log = AuditLog.open(tmp_path / "audit", segment_bytes=1)
    fill(log, 4)
    log.close()
    return tmp_path / "audit"


def test_a_removed_renamed_or_emptied_file_is_found(audit_in_files):
    files = sorted(audit_in_files.glob("0*.jsonl"))
    contents = {f: f.read_bytes() for f in files}
    for number, file in enumerate(files):
        file.unlink()
        assert any(f"Entry {number} is missing" in s for s in findings(audit_in_files))
        file.write_bytes(b"")
        assert any(f"Entry {number} is missing" in s for s in findings(audit_in_files))
        (audit_in_files / f"{number:019}7.jsonl").write_bytes(contents[file])
        assert findings(audit_in_files)
        (audit_in_files / f"{number:019}7.jsonl").unlink()
        file.write_bytes(contents[file])
    assert findings(audit_in_files) == []
    files[3].rename(audit_in_files / f"{77:020}.jsonl")
    assert findings(audit_in_files) == [f"{77:020}.jsonl begins with entry 3: it was renamed."]


def test_hashes_in_the_place_of_no_entries_or_of_others_are_found(audit_in_files):
    files = sorted(audit_in_files.glob("0*.jsonl"))
    (audit_in_files / f"{4:020}.hashes").write_bytes(b"7" * 32)
    assert findings(audit_in_files) == []  # after the newest checkpoint, which covers 4
    (audit_in_files / f"{4:020}.hashes").rename(audit_in_files / f"{2:020}.hashes")
    assert findings(audit_in_files) == []  # the entries are there
    files[2].unlink()
    (audit_in_files / f"{2:020}.hashes").write_bytes(b"7" * 31)
    assert any("is cut short" in s for s in findings(audit_in_files))
    (audit_in_files / f"{2:020}.hashes").write_bytes(b"7" * 32)
    files[1].unlink()
    assert f"Entry 1 is missing before {2:020}.hashes." in findings(audit_in_files)


def test_hashes_among_entries_of_one_file_are_found(audit, lines):
    (audit / f"{3:020}.hashes").write_bytes(b"7" * 32)
    (found,) = findings(audit)
    assert found.startswith(f"{3:020}.hashes stands for entries that are there")


def test_a_changed_entry_before_hashes_or_before_a_gap_is_named(audit, lines):
    altered = [lines[0], lines[1].replace(b"reason", b"season"), lines[2]]
    said = f"Entry 1 ({FILE}, line 2) was altered, or Entry 2 ({FILE}, line 3)."
    (audit / FILE).write_bytes(b"".join([*altered, *lines[4:]]))
    assert findings(audit) == [said, f"Entry 3 is missing before Entry 4 ({FILE}, line 4)."]
    (audit / FILE).write_bytes(b"".join(altered))
    (audit / f"{3:020}.hashes").write_bytes(b"7" * 96)
    assert findings(audit) == [said]


def test_a_history_that_was_written_anew_before_a_gap_is_found(audit, lines):
    entries = [json.loads(line) | {"fields": {"why": "false"}} for line in lines[:4]]
    (audit / FILE).write_bytes(b"".join([*chain(entries), lines[5]]))
    found = findings(audit)
    assert len(found) == 2
    assert found[0].startswith(f"Entry 3 ({FILE}, line 4), or entries before it from 0 on")
    assert found[1].startswith("Entry 4 is missing")


@pytest.mark.parametrize(
    "spell",
    [
        lambda line: line.replace(b'","', b'", "'),
        lambda line: b" " + line,
        lambda line: line.replace(b'{"fields', b'{"kind":"started","fields'),
        lambda line: line.replace(b"reason", b"\\u0072eason"),
        lambda line: line.replace(b'"number":0', b'"number":0.0'),
        lambda line: line.replace(b'"number":0', b'"number":-0'),
    ],
)
def test_an_entry_has_one_spelling(lines, spell):
    line = lines[0].rstrip(b"\n")
    assert Entry.decode(line).number == 0
    assert spell(line) != line
    with pytest.raises(ValueError):
        Entry.decode(spell(line))


@pytest.mark.parametrize("name", [FILE, "checkpoints.jsonl", "log.pem.pub"])
def test_a_link_is_not_followed(audit, tmp_path, name):
    (audit / name).rename(tmp_path / "elsewhere")
    (audit / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AuditError, match=name):
        findings(audit)


def test_a_directory_without_a_log_is_an_error(tmp_path):
    with pytest.raises(AuditError, match=r"log\.pem\.pub cannot be read"):
        findings(tmp_path)


# --- checkpoints ----------------------------------------------------------------------------------


def test_every_changed_byte_of_a_checkpoint_is_found(audit):
    path = audit / "checkpoints.jsonl"
    content = path.read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    for at in range(start, len(content)):
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        (found,) = findings(audit)
        assert "checkpoints.jsonl, line 3 was altered" in found, at


def keep(directory, checkpoint, tree):
    with open(directory / "checkpoints.jsonl", "ab") as f:
        f.write(encode_kept(checkpoint, tree) + b"\n")


def tree_of(lines):
    tree = Frontier()
    for line in lines:
        tree.append(hash_leaf(line.rstrip(b"\n")))
    return tree


def test_a_checkpoint_by_another_key_is_found(audit, lines):
    tree, key = tree_of(lines), ec.generate_private_key(ec.SECP256R1())
    origin = newest_checkpoint(audit, public_key(audit)).origin
    keep(audit, sign_checkpoint(origin, 6, tree.root(), utc_now(), key), tree)
    (found,) = findings(audit)
    assert "line 4 was altered" in found and "not signed with this log's key" in found


@pytest.fixture
def key(audit):
    from flexolmo.bundle.signing import read_private_key

    return read_private_key(audit / "log.pem")


@pytest.mark.parametrize("size", [2, 6])
def test_a_checkpoint_of_the_logs_own_key_over_another_history_is_found(audit, lines, key, size):
    """Its holder wrote two histories."""
    origin = newest_checkpoint(audit, public_key(audit)).origin
    tree = tree_of(lines[:1] * size)
    other = sign_checkpoint(origin, size, tree.root(), utc_now(), key)
    (found,) = findings(audit, [other])
    assert found.startswith(f"Entry {size - 1} (") and "kept elsewhere" in found
    keep(audit, other, tree)
    assert findings(audit)


def test_a_checkpoint_of_more_entries_than_there_are_is_found(audit, lines, key):
    origin = newest_checkpoint(audit, public_key(audit)).origin
    later = sign_checkpoint(origin, 9, b"7" * 32, utc_now(), key)
    (found,) = findings(audit, [later])
    assert found.startswith("Entries 6 to 8 are missing at the end")
    assert "kept elsewhere" in found


def test_a_log_that_was_replaced_as_a_whole_is_found_by_a_checkpoint_kept_elsewhere(audit, key):
    kept = newest_checkpoint(audit, public_key(audit))
    for path in audit.glob("*.jsonl"):
        path.unlink()
    log = AuditLog.open(audit)
    fill(log, COUNT)
    log.close()
    assert findings(audit) == []
    (found,) = findings(audit, [kept])
    assert "it was replaced as a whole" in found


def test_a_history_cut_back_and_signed_anew_is_found_only_from_elsewhere(audit, lines):
    kept = newest_checkpoint(audit, public_key(audit))
    (audit / FILE).write_bytes(b"".join(lines[:2]))
    content = (audit / "checkpoints.jsonl").read_bytes().splitlines(keepends=True)
    (audit / "checkpoints.jsonl").write_bytes(content[0])
    AuditLog.open(audit).close()
    assert findings(audit) == []
    (found,) = findings(audit, [kept])
    assert found.startswith("Entries 2 to 5 are missing at the end")


def test_moved_and_missing_checkpoints_are_found(audit):
    path = audit / "checkpoints.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1]]))
    assert "line 3 was altered, moved" in findings(audit)[0]
    path.write_bytes(b"")
    assert findings(audit) == ["checkpoints.jsonl holds no checkpoint of this log."]
    path.unlink()
    with pytest.raises(AuditError, match="holds no audit log that can be read"):
        findings(audit)


def test_subtrees_that_do_not_fold_to_the_root_are_refused(audit):
    line = (audit / "checkpoints.jsonl").read_bytes().splitlines()[-1]
    kept = json.loads(line)
    kept["frontier"].reverse()
    with pytest.raises(ValueError, match="another root"):
        decode_kept(canonical_json(kept), public_key(audit))


# --- while a server writes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FILE, "checkpoints.jsonl"])
def test_a_line_that_a_server_is_still_writing_is_waited_for(made, tmp_path, monkeypatch, name):
    audit = shutil.copytree(made, tmp_path / "audit")
    content = (audit / name).read_bytes()
    (audit / name).write_bytes(content + b'{"fields"')
    monkeypatch.setattr("time.sleep", lambda _: (audit / name).write_bytes(content + b"{}\n"))
    assert findings(audit) == []


@pytest.mark.parametrize("file, words", [(FILE, "Entry 6"), ("checkpoints.jsonl", "line 4")])
def test_a_line_that_stays_torn_is_named(audit, file, words):
    with open(audit / file, "ab") as f:
        f.write(b'{"fields"')
    (found,) = findings(audit)
    assert words in found and "cut short" in found


def test_entries_after_the_newest_checkpoint_are_chained_and_counted(tmp_path):
    log = AuditLog.open(tmp_path / "audit")
    fill(log, 2)
    log.append("decision", decision())
    report = check_log(tmp_path / "audit", public_key(tmp_path / "audit"))
    assert (report.findings, report.num_entries, report.newest.size) == ([], 3, 0)
    log.close()
