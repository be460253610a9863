"""`flexolmo audit report` and `verify-report`, and what `flexolmo mix` demands of them."""

import json
import stat

import pytest

from flexolmo.bundle.release import read_release
from flexolmo.merge.index import read_about
from made_mixtures import flip, tree
from made_reports import attack, write_made_report


@pytest.fixture(scope="module")
def attacked(house, pico_sets, tmp_path_factory):
    """An owner's bundle, and results of attacks on it."""
    return attack(house, pico_sets["maths"], tmp_path_factory.mktemp("attacked"))


@pytest.fixture
def given(attacked, house, pico_set_dirs, owner_keys, tmp_path):
    """Words of a report into `tmp_path`."""
    out = ["--out", tmp_path / "maths.report", "--stays", tmp_path / "stays"]
    results = [word for path in attacked.results.values() for word in ("--results", path)]
    words = [attacked.bundle, "--data", pico_set_dirs["maths"], *results, *out]
    return [*words, "--public", pico_set_dirs["public"], "--key", owner_keys["Ann"]]


def test_a_report_is_written_checked_and_refused_when_altered(
    works, run, given, attacked, tmp_path
):
    said = works("audit", "report", *given)
    assert "may leave, signed, sha256:" in said and "Not made: canaries" in said
    out = tmp_path / "maths.report"
    assert "in place of the one before" not in said
    assert f"{out}, in place of the one before: may leave" in works("audit", "report", *given)
    for name in ("report.json", "page.html"):
        assert stat.S_IMODE((tmp_path / "stays" / name).stat().st_mode) == 0o600
    stays = json.loads((tmp_path / "stays" / "report.json").read_text())
    begins = [x["begins"] for x in stays["worst_documents"]]
    assert begins and not any(b[:24] in p.decode() for b in begins for p in tree(out).values())
    check = ("audit", "verify-report", out, "--bundle", attacked.bundle)
    said = works(*check)
    assert "extraction: " in said and "signed by Ann" in said
    assert "epsilon: none, the bundle states no guarantee" in said
    code, _, err = run(*check, "--require", "extraction<=0.001%,epsilon<=8")
    assert (
        code == 2
        and "the upper end of its interval" in err
        and "the bundle states no guarantee" in err
    )
    assert works(*check, "--require", "extraction<=99%").count("Warning") == 0
    code, _, err = run(*check, "--require", "extraction<=20")
    assert code == 2 and "demands nothing" in err
    assert run(*check, "--require", "public<=1%")[0] == 2
    flip(out / "report.json", 0.5, 1)
    code, _, err = run(*check)
    assert code == 2 and "report.json: found sha256" in err


def test_a_report_is_signed_by_the_bundles_key_and_lies_apart_from_what_stays(
    run, given, owner_keys, tmp_path
):
    code, _, err = run("audit", "report", *given[:-1], owner_keys["Bob"])
    assert code == 2 and "Sign the report with the bundle's own key" in err
    place = given.index("--stays") + 1
    bundle = given[0]
    link = tmp_path / "linked"
    link.symlink_to(bundle)
    before = tree(bundle)
    for stays in (
        tmp_path / "maths.report",
        tmp_path / "maths.report" / "stays",
        tmp_path,  # beside the report
        bundle,
        bundle / "in" / "it",
        bundle.parent,  # the outbox
        bundle.parent / "x" / "..",
        link,
    ):
        words = [bundle, "--data", tmp_path / "none", *given[3:place], stays, *given[place + 1 :]]
        code, _, err = run("audit", "report", *words)  # before the set is read
        assert code == 2 and "which may leave" in err, stays
    assert not (tmp_path / "maths.report").exists() and tree(bundle) == before


def test_a_coordinator_demands_reports(works, run, given, attacked, house, tmp_path, trust_dir):
    build = ("mix", "build", house.anchor_dir, attacked.bundle, "-o", tmp_path / "m")
    limits = "extraction<=99%"
    code, _, err = run(*build, "--require", limits)
    assert code == 2 and "maths: found no release report at" in err and "audit report" in err
    place = given.index("--out")
    works("audit", "report", *given[:place], *given[place + 2 :])  # beside the bundle
    code, _, err = run(*build, "--require", "extraction<=20")
    assert code == 2 and "demands nothing" in err
    code, _, err = run(*build, "--require", "membership_auc<=0.01")
    assert code == 2 and "maths: membership_auc: the report has no such attack, or one on" in err
    code, _, err = run(*build, "--require", "extraction<=0.01%")
    assert code == 2 and "maths: extraction is" in err and not (tmp_path / "m").exists()
    works(*build, "--require", limits)
    kept = read_about(tmp_path / "m")["release"]
    assert kept["limits"] == {"extraction": 0.99}
    assert (tmp_path / "m" / "experts" / "maths.report" / "page.html").is_file()
    code, _, err = run("mix", "add", tmp_path / "m", house.bundle("amber"))
    assert code == 2 and "amber: found no release report at" in err
    works("mix", "remove", tmp_path / "m", "maths")
    code, _, err = run("mix", "build", *build[2:], "--require", "claims<=1%,epsilon<=8")
    assert code == 2 and "give --public" in err


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_page_that_does_not_show_the_claims_is_warned_of(
    works, run, given, attacked, house, tmp_path, is_whole
):
    works("audit", "report", *given)
    out = tmp_path / "maths.report"
    findings = read_release(out).report.findings if is_whole else {"attacks": 3}
    write_made_report(attacked.bundle, house.keys["Ann"], out, findings=findings)
    code, said, err = run("audit", "verify-report", out, "--bundle", attacked.bundle)
    assert code == 0 and "holds, of" in said and "Believe report.json" in err
    assert "page.html, bom.json, data_card.json is not what" in err


def test_a_file_in_place_of_a_directory_is_refused_by_name(run, given, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    code, _, err = run("audit", "summary", "--model", tmp_path, "--out", file)
    assert code == 2 and f"--out {file} is a file, expected a directory" in err
    place = given.index("--stays") + 1
    code, _, err = run("audit", "report", *given[:place], file, *given[place + 1 :])
    assert code == 2 and f"--stays {file} is a file, expected a directory" in err
    assert file.read_text() == "mine"
