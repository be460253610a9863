"""`flexolmo policy`: explained on the examples, tested on tables, and facts out of mixtures."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from flexolmo.bundle.terms import PURPOSES
from flexolmo.cli import policy
from flexolmo.serving.expectations import try_expectations
from flexolmo.serving.facts import encode_facts, read_facts
from flexolmo.serving.policy import Policies
from flexolmo.serving.rules import SCHEMA_FILE
from made_owners import entry, revoke
from made_policies import PERMIT_ALL, facts, load_policies, write_policies
from made_shell import ROOT, blocks_of

EXAMPLES = ROOT / "examples" / "policies"
GUIDE = ROOT / "docs" / "guides" / "policies.md"
CHECK = ("policy", "check", "--policy", EXAMPLES, "--experts", EXAMPLES / "experts.json")
ALICE = ("--as", "alice", "--groups", "clinic", "--at", "2026-11-30T09:00:00Z")


@pytest.fixture
def table(tmp_path):
    """`table(cases)`: a file of these, on a policy that permits all, with the experts a and b."""
    write_policies(tmp_path / "policies", PERMIT_ALL)
    experts = {"a": facts(), "b": facts(audience=("clinic",))}
    (tmp_path / "experts.json").write_bytes(encode_facts(experts))

    def write(cases, head='policies = "policies"\nmodel = "experts.json"\n'):
        (tmp_path / "table.toml").write_text(head + cases, encoding="utf-8")
        return tmp_path / "table.toml"

    return write


CASE = '[[cases]]\nname = "one"\nas = "alice"\nat = 2026-11-30T09:00:00Z\non = ["a"]\n'


# --- the examples --------------------------------------------------------------------------------


def test_the_examples_hold_and_have_the_schema_that_counts(works):
    said = works("policy", "test", EXAMPLES / "expectations.toml")
    assert said.endswith("11 of 11 cases hold.\n") and said.count("ok  ") == 11
    assert (EXAMPLES / SCHEMA_FILE.name).read_bytes() == SCHEMA_FILE.read_bytes()


def test_each_example_policy_is_needed(works, run, tmp_path):
    """Without any one of them, the examples' own expectations fail."""
    for name in Policies.load(EXAMPLES).names:
        copy = shutil.copytree(EXAMPLES, tmp_path / "copy", dirs_exist_ok=True)
        file, rule = name.split(": ")
        text = (copy / file).read_text(encoding="utf-8")
        (copy / file).write_text(
            re.sub(rf'@id\("{rule}"\)[^;]*;', "", text, flags=re.S), encoding="utf-8"
        )
        assert run("policy", "test", copy / "expectations.toml")[0] == 1, name


def test_the_guide_is_true(tmp_path, capsys, monkeypatch):
    """Its policies load, its table and its Python run, and it has every purpose and attribute."""
    guide = GUIDE.read_text(encoding="utf-8")
    names = load_policies(tmp_path / "guide", *blocks_of(GUIDE, "cedar")).names
    assert len(names) == guide.count("@id(") > 5
    (expectations,) = blocks_of(GUIDE, "toml")
    copy = shutil.copytree(EXAMPLES, tmp_path / "policies")
    (copy / "expectations.toml").write_text(expectations, encoding="utf-8")
    assert set(map(tuple, try_expectations(copy / "expectations.toml").values())) == {()}
    shutil.copy(EXAMPLES / "experts.json", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec("".join(blocks_of(GUIDE, "python")), {})
    assert Policies.load(EXAMPLES).digest in capsys.readouterr().out
    for name, purpose in PURPOSES.items():
        within = f"`{purpose.within}`" if purpose.within else ""
        assert f"| `{name}` | {within} | {purpose.meaning} | {purpose.source} |" in guide
    for attribute in re.findall(r"^ +(\w+)\??:", SCHEMA_FILE.read_text(encoding="utf-8"), re.M):
        assert re.search(rf"[`.]{attribute}\b", guide), attribute


# --- check ---------------------------------------------------------------------------------------


def test_each_yes_and_no_is_explained(works, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = works(*CHECK, *ALICE, "--purpose", "clinical-care")
    assert "7 policies in" in said and Policies.load(EXAMPLES).digest in said
    rows = [line.split("│")[1:-1] for line in said.splitlines() if line.startswith("│")]
    switched = {row[0].strip(): row[1].strip() for row in rows if row[0].strip()}
    assert switched == {"journals": "off", "library": "on", "wards": "on"}
    assert "permitted by permits.cedar: clinicians care with the wards' notes" in said
    assert "the owner's terms permit education, general-research, not clinical-care" in said


def test_machines_read_the_same(works):
    words = ("--purpose", "clinical-care,training", "--roles", "on-call", "--without", "journals")
    found = json.loads(works(*CHECK, *ALICE, *words, "--json"))
    assert found["enabled"] == []
    assert found["decided"] == "2026-11-30T09:00:00+00:00"
    assert found["policy_digest"] == Policies.load(EXAMPLES).digest
    assert found["experts"]["library"]["reasons"] == [
        "for training: forbidden by limits.cedar: no answer trains another model"
    ]
    assert {n: e["is_asked"] for n, e in found["experts"].items()} == {
        "journals": False, "library": True, "wards": True,
    }  # fmt: skip
    night = ("--at", "2026-11-30T23:00:00Z", "--purpose", "clinical-care", "--json")
    for roles, expected in ((), ["library"]), (("--roles", "on-call"), ["library", "wards"]):
        assert json.loads(works(*CHECK, *ALICE, *night, *roles))["enabled"] == expected
    asked = ("--purpose", "education", "--only", "public,library", "--json")
    assert json.loads(works(*CHECK, *ALICE, *asked))["enabled"] == ["library"]
    asked = ("--only", "public", "--json")
    assert json.loads(works(*CHECK, *ALICE, *asked))["enabled"] == []


def test_without_a_time_it_is_now(works, tmp_path):
    ends = {"over": facts(valid_until="2026-01-01"), "free": facts()}
    (tmp_path / "experts.json").write_bytes(encode_facts(ends))
    write_policies(tmp_path / "policies", PERMIT_ALL)
    words = ("--policy", tmp_path / "policies", "--model", tmp_path / "experts.json")
    said = works("policy", "check", *words, "--as", "alice", "--json")
    assert json.loads(said)["enabled"] == ["free"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--purpose", "reserch"), "No purpose reserch"),
        (("--purpose", ""), "empty name"),
        (("--groups", "a,,b"), "--groups 'a,,b' has an empty name"),
        (("--only", "wrds"), "Unknown expert wrds"),
        (("--only", "wards", "--without", "library"), "not both"),
        (("--at", "2026-11-30T09:00:00"), "no time with a zone"),
        (("--at", "noon"), "no time with a zone"),
        (("--as", ""), "1 to 256 printable characters"),
        (("--experts", "nothing.json"), "nothing.json cannot be read"),
        (("--policy", "nothing"), "The policies in nothing cannot be read"),
    ],
)
def test_a_typing_error_is_said_in_a_sentence(run, words, said):
    code, out, err = run(*CHECK, *ALICE, *words)
    assert code == 2 and said in err and not out
    assert "Traceback" not in err


def test_a_file_of_other_facts_is_refused(run, tmp_path):
    good = encode_facts({"amber": facts()})
    file = tmp_path / "experts.json"
    for bad in (
        good.replace(b"amber", b"a\\u001b[2J"),
        good.replace(b'"serial"', b'"seriall": 1, "serial"'),
        good.replace(b'"any"', b'"reserch"'),
        good.replace(b'"audience"', b'"audiences"'),
    ):
        file.write_bytes(bad)
        code, _, err = run(*CHECK[:4], "--experts", file, *ALICE)
        assert code == 2 and "does not describe experts" in err
    file.write_bytes(good)
    assert run(*CHECK[:4], "--experts", file, *ALICE)[0] == 0


def test_explaining_needs_no_torch_and_cedar_is_asked_for_by_name(monkeypatch, run):
    command = [sys.executable, "-c", "import sys; sys.modules['torch'] = None; "
               "from flexolmo.cli import main; main()", *map(str, (*CHECK, *ALICE))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(policy, "find_spec", lambda _: None)
    for words in ((*CHECK, *ALICE), ("policy", "test", EXAMPLES / "expectations.toml")):
        code, _, err = run(*words)
        assert code == 2 and "pip install -e '.[serve]'" in err


# --- test ----------------------------------------------------------------------------------------


def test_a_case_that_fails_is_shown_with_its_reasons(run, table):
    cases = CASE + CASE.replace('"one"', '"two"').replace('["a"]', '["b"]')
    code, out, err = run("policy", "test", table(cases))
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        "ok      one",
        "FAILED  two",
        "        a: expected off, found on: the owner's terms allow it; for any: permitted by "
        "p0.cedar: all",
        "        b: expected on, found off: the owner's terms are for clinic alone",
        "1 of 2 cases hold.",
    ]


def test_every_part_of_a_case_counts(works, run, table, tmp_path):
    write_policies(
        tmp_path / "policies",
        """@id("one") permit (
          principal == FlexOlmo::User::"alice", action, resource == FlexOlmo::Expert::"b"
        ) when {
          principal in FlexOlmo::Role::"doctor" && context.time < datetime("2027-01-01") &&
          context.purpose == FlexOlmo::Purpose::"training"
        };""",
    )
    parts = {
        'as = "alice"': 'as = "bob"',
        'groups = ["clinic"]': "groups = []",
        'roles = ["doctor"]': "roles = []",
        'purposes = ["training"]': "purposes = []",
        "at = 2026-12-31T23:59:59Z": "at = 2027-01-01T00:00:00Z",
        'only = ["b"]': 'only = ["a"]',
    }
    case = "\n".join(['[[cases]]\nname = "one"\non = ["b"]', *parts])
    works("policy", "test", table(case))
    for part, other in parts.items():
        assert run("policy", "test", table(case.replace(part, other)))[0] == 1, part
    without = case.replace('only = ["b"]', 'without = ["b"]')
    assert run("policy", "test", table(without))[0] == 1


@pytest.mark.parametrize(
    ("cases", "said"),
    [
        ("", "cases"),
        (CASE + CASE, "two cases have the name 'one'"),
        (CASE.replace('["a"]', '["c"]'), "Case 'one': Unknown expert c"),
        (CASE.replace("on =", "onn ="), "cases.0.onn: unknown key"),
        (CASE + 'purposes = ["reserch"]', "cases.0.purposes.0"),
        (CASE + 'groups = "clinic"', "cases.0.groups"),
        (CASE + 'only = ["c"]', "Case 'one': Unknown expert c"),
        (CASE.replace("00Z", "00"), "cases.0.at"),
        (CASE.replace("at = 2026-11-30T09:00:00Z\n", ""), "cases.0.at"),
        (CASE.replace("alice", ""), "printable characters"),
        ("a" * 40, "cannot be read as TOML"),
        ("a = " + "[" * 100_000, "cannot be read as TOML"),
    ],
)
def test_a_table_that_is_none_is_refused(run, table, cases, said):
    code, out, err = run("policy", "test", table(cases))
    assert code == 2 and said in err and not out
    assert "Traceback" not in err


# --- facts ---------------------------------------------------------------------------------------


def test_facts_of_a_mixture_are_what_its_manifests_say(works, house, tmp_path):
    model = house.mixture_dir(("amber", "basalt", "zinc"))
    found = read_facts(model)
    index = json.loads((model / "mixture.json").read_text(encoding="utf-8"))
    assert sorted(found) == sorted(index["experts"])
    for name, expert in found.items():
        said = index["experts"][name]
        assert (expert.owner, expert.licence, expert.key_id, expert.bundle_digest) == (
            said["owner"], said["licence"], said["key_id"], said["files"]["manifest.json"],
        )  # fmt: skip
        assert expert.terms.text == "For tests."
    (tmp_path / "experts.json").write_text(works("policy", "describe", model), encoding="utf-8")
    assert read_facts(tmp_path / "experts.json") == found


def test_terms_of_a_mixture_are_enforced(works, house, tmp_path):
    write_policies(tmp_path / "policies", PERMIT_ALL)
    words = ("--policy", tmp_path / "policies", "--model", house.mixture_dir(("amber", "zinc")))
    said = works("policy", "check", *words, "--as", "alice", "--json")
    assert json.loads(said)["enabled"] == ["amber", "zinc"]


def test_a_mixture_that_was_altered_has_no_facts(run, house, tmp_path):
    model = house.build(("amber", "zinc"), tmp_path / "model")
    manifest = model / "experts" / "zinc.bundle" / "manifest.json"
    good = manifest.read_bytes()
    for bad in (good.replace(b"For tests.", b"For test5."), b"{}", b" " * (5 << 20)):
        manifest.write_bytes(bad)
        code, out, err = run("policy", "describe", model)
        assert code == 2 and "zinc.bundle/manifest.json cannot be used" in err and not out
    manifest.write_bytes(good)
    index = model / "mixture.json"
    index.write_text(index.read_text().replace('"zinc"', '"../zinc"'))
    code, _, err = run("policy", "describe", model)
    assert code == 2 and "does not describe experts" in err
    index.unlink()
    assert "mixture.json cannot be read" in run("policy", "describe", model)[2]


def test_what_an_owner_has_revoked_is_explained_with_the_trusted_owners(
    works, house, trust_dir, tmp_path
):
    write_policies(tmp_path / "policies", PERMIT_ALL)
    trust = shutil.copytree(trust_dir, tmp_path / "trust")
    revoke(trust, house.keys["Ann"], entry("expert", name="amber", up_to_serial=1))
    words = ("policy", "check", "--policy", tmp_path / "policies", "--as", "alice", "--json")
    words += ("--model", house.mixture_dir(["amber", "zinc"]))
    found = json.loads(works(*words, "--trust", trust))["experts"]
    assert {name: verdict["is_enabled"] for name, verdict in found.items()} == {
        "amber": False,
        "zinc": True,
    }
    assert found["amber"]["reasons"] == [
        "amber was revoked by its owner on 2026-11-23: A patient objected."
    ]
