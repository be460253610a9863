"""Cedar files: where one is wrong, file and line are said; what is read is what is decided by."""

import os
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import PolicyError
from flexolmo.serving import rules
from flexolmo.serving.policy import Policies
from flexolmo.serving.rules import read_rules, split_policies
from made_policies import PERMIT_ALL, load_policies, write_policies


def when(test):
    return f'// a comment;\n\n@id("x")\npermit (principal, action, resource) when {{ {test} }};'


WRONG = {
    "no Cedar": ("let us in;", "unexpected token"),
    "an unfinished one": (PERMIT_ALL + "\n permit (principal", "policy at line 2: unexpected end"),
    "no semicolon": (PERMIT_ALL[:-1], "unexpected end"),
    "two without a semicolon": (PERMIT_ALL[:-1] + PERMIT_ALL, "unexpected token"),
    "an open text": (when('resource.owner == "Ann'), "line 3: invalid token"),
    "an open text with many escapes": (when('"' + r"\"" * 400_000), "expected at most 32768"),
    "no name": ("permit (principal, action, resource);", '@id("...")'),
    "a bare name": ("@id permit (principal, action, resource);", '@id("...")'),
    "a long name": (PERMIT_ALL.replace("all", "a" * 201), "1 to 200"),
    "a name of hidden characters": (PERMIT_ALL.replace("all", r"a\u{202e}b"), "printable"),
    "two of one name": (f"{PERMIT_ALL}\n{PERMIT_ALL}", "line 2: expected an @id of its own"),
    "two names of one": ('@id("b") ' + PERMIT_ALL, "duplicate annotation"),
    "another kind of user": (
        '@id("x") permit (principal == FlexOlmo::Usr::"a", action, resource);',
        "unrecognized entity type `FlexOlmo::Usr`",
    ),
    "a misspelled action": (
        '@id("x") permit (principal, action == FlexOlmo::Action::"activte", resource);',
        'unrecognized action `FlexOlmo::Action::"activte"`',
    ),
    "a misspelled attribute": (when('resource.onwer == "Ann"'), "line 3: attribute `onwer`"),
    "another type": (when("resource.owner == 3"), "types Long and String are not compatible"),
    "an attribute that may be missing": (
        when("context.time > resource.terms.valid_from"), "unable to guarantee safety"
    ),
    "a misspelled purpose": (
        when('context.purpose in FlexOlmo::Purpose::"reserch"'), "line 3: no purpose reserch"
    ),
    "a misspelled purpose among others": (
        when('[FlexOlmo::Purpose::"any", FlexOlmo::Purpose::"b"].contains(context.purpose)'),
        "no purpose b",
    ),
    "a template": (
        '@id("x") permit (principal == ?principal, action, resource);', "a template"
    ),
    "a hidden character": (when('resource.owner == "\u202eAnn"'), "line 4 has the invisible"),
    "a byte order mark": ("\ufeff" + PERMIT_ALL, "line 1 has the invisible character U+FEFF"),
    "a line of its own kind": (f"{PERMIT_ALL} // \u2028 {PERMIT_ALL}", "U+2028"),
    "a lone carriage return": (f"{PERMIT_ALL} // a\r forbid", "U+000D"),
    "many brackets": (when("(" * 101 + "true" + ")" * 101), "100 brackets"),
    "very many brackets": (when("(" * 9000 + "true" + ")" * 9000), "100 brackets"),
    "a long chain": (when(" || ".join(['resource.owner == "a"'] * 500)), "200 levels"),
    "a deep choice": (when("if true then true else " * 1000 + "true"), "200 levels"),
    "a long policy": (when(f'resource.owner == "{"a" * 33_000}"'), "at most 32768 characters"),
    "a long file": ("//" + "a" * (1 << 20), "at most 1,048,576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_policy_that_is_wrong_is_refused_with_file_and_line(tmp_path, kind):
    text, said = WRONG[kind]
    begin = time.perf_counter()
    with pytest.raises(PolicyError, match=re.escape(said)) as caught:
        load_policies(tmp_path, PERMIT_ALL, text)
    assert "  - p1.cedar" in str(caught.value) and "p0.cedar" not in str(caught.value)
    assert time.perf_counter() - begin < 5


def test_everything_that_is_wrong_is_listed_at_once(tmp_path):
    two = when("resource.serial == true") + "\n\n" + when("principal.age > 3").replace("x", "y")
    with pytest.raises(PolicyError) as caught:
        load_policies(tmp_path, "permit();", PERMIT_ALL, two)
    lines = [line.split(": ")[0] for line in str(caught.value).splitlines() if "  - " in line]
    assert lines == [
        "  - p0.cedar, policy at line 1",
        "  - p2.cedar, policy at line 3",
        "  - p2.cedar, policy at line 8",
    ]


def test_what_is_no_file_of_text_is_refused(tmp_path):
    (tmp_path / "directory.cedar").mkdir()
    os.mkfifo(tmp_path / "pipe.cedar")
    (tmp_path / "dangling.cedar").symlink_to(tmp_path / "nothing")
    (tmp_path / "latin.cedar").write_bytes(b"// \xe4")
    (tmp_path / "two\nlines.cedar").write_text("")
    (tmp_path / os.fsdecode(b"\xe4.cedar")).write_text("")
    with pytest.raises(PolicyError) as caught:
        Policies.load(tmp_path)
    for name in ("directory", "pipe", "dangling", "latin", "two\nlines", os.fsdecode(b"\xe4")):
        assert f"  - {name}.cedar: " in str(caught.value)
    for wrong in (tmp_path / "nothing", tmp_path / "latin.cedar"):
        with pytest.raises(PolicyError, match="Name a directory"):
            Policies.load(wrong)


def test_files_are_read_in_order_and_others_left_alone(tmp_path):
    write_policies(tmp_path, PERMIT_ALL + PERMIT_ALL.replace("all", "more"), PERMIT_ALL)
    for name in (".p0.cedar", ".#p0.cedar", "README.md", "p.cedarschema", "p.cedar.bak"):
        (tmp_path / name).write_text("no policy")
    (tmp_path / "a.cedar").symlink_to("p1.cedar")  # so do volumes of settings hold files
    assert Policies.load(tmp_path).names == (
        "a.cedar: all", "p0.cedar: all", "p0.cedar: more", "p1.cedar: all",
    )  # fmt: skip
    assert Policies.load(write_policies(tmp_path / "empty")).names == ()


def test_the_digest_changes_with_every_byte_name_and_file(tmp_path, monkeypatch):
    text = f"// why\n{PERMIT_ALL}\n"
    first = load_policies(tmp_path / "first", text)
    assert load_policies(tmp_path / "second", text).digest == first.digest
    found = {first.digest}
    changed = [text[:i] + " " + text[i:] for i in range(len(text) + 1)]
    changed = [other for other in dict.fromkeys(changed) if _is_readable(tmp_path, other)]
    assert len(changed) > 20
    for i, other in enumerate(changed):
        found.add(load_policies(tmp_path / str(i), other).digest)
    found.add(load_policies(tmp_path / "more", text, "").digest)
    found.add(load_policies(tmp_path / "split", "", text).digest)
    (tmp_path / "second" / "p0.cedar").rename(tmp_path / "second" / "q0.cedar")
    found.add(Policies.load(tmp_path / "second").digest)
    monkeypatch.setattr(rules, "SCHEMA_FILE", tmp_path / "schema")
    (tmp_path / "schema").write_text("another")
    found.add(load_policies(tmp_path / "last", text).digest)
    assert len(found) == 1 + len(changed) + 4


def _is_readable(tmp_path, text) -> bool:
    try:
        load_policies(tmp_path / "tried", text)
    except PolicyError:
        return False
    return True


PIECES = st.sampled_from(
    [PERMIT_ALL, "// ; \" ( {\n", "\n", "  ", "//\n", '// "\r\n',
     '@id("a;b\\"//c") forbid (principal, action, resource) when { "//;" == "\\\\" };',
     '@id("z") permit (principal, // ;"\n action, resource) when\n{ [(1), 2].contains(1) };']
)  # fmt: skip


@settings(max_examples=100, derandomize=True, database=None)
@given(st.lists(PIECES, max_size=12))
def test_a_text_is_split_into_the_policies_that_it_was_joined_from(pieces):
    text = "\n".join(pieces)
    found = list(split_policies(text))
    assert [policy for _, policy, _ in found] == [
        p for p in pieces if p.endswith("};") or "all" in p
    ]
    for line, policy, depth in found:
        assert "\n".join(text.splitlines()[line - 1 :]).startswith(policy)
        assert depth == (3 if "(1)" in policy else 1)


@settings(max_examples=200, derandomize=True, database=None)
@given(st.lists(st.sampled_from([*'";/({[\\ \n', "//", PERMIT_ALL, "a"]), max_size=12))
def test_no_text_is_read_otherwise_than_cedar_reads_it_whole(pieces):
    """Whatever the cut, either a policy is refused or Cedar finds the same ones in the whole."""
    import cedarpy

    text = "".join(pieces)
    try:
        for _, policy, depth in split_policies(text):
            rules.check_policy(policy, depth)
    except ValueError:
        return
    assert len(cedarpy.PolicySet.from_str(text)) == len(list(split_policies(text)))


def test_rules_are_given_as_they_stand(tmp_path):
    found, digest = read_rules(write_policies(tmp_path, f"// why\n{PERMIT_ALL} // because"))
    assert found == {"p0.cedar: all": PERMIT_ALL}
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
