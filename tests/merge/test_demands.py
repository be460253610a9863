"""Demands on release reports: who is let in, what the mixture keeps, and what comes along."""

import shutil

import pytest

from flexolmo.bundle.release import place_of, read_release
from flexolmo.errors import BundleError, MergeError
from flexolmo.merge.mixture import (
    add_experts,
    build_mixture,
    load_mixture,
    read_about,
    rebuild_mixture,
    remove_experts,
)
from made_mixtures import flip, owner_of, tree
from made_reports import figure, write_made_report

LIMITS = {"extraction": 0.02, "membership_auc": 0.6}


@pytest.fixture
def town(house, tmp_path):
    """`town(NAME, high)`: a bundle with a report whose figures end there; None: without one."""

    def send(name, high=None):
        bundle = tmp_path / "inbox" / f"{name}.bundle"
        shutil.copytree(house.bundle(name), bundle)
        if high is not None:
            measures = {"extraction": figure(high), "membership_auc": figure(0.5)}
            key = house.keys[owner_of(name)]
            write_made_report(bundle, key, place_of(bundle), measures=measures)
        return bundle

    return send


def build(house, out, bundles, **options):
    return build_mixture(house.anchor_dir, bundles, out, house.trusted, **options)


def test_who_is_within_the_limits_comes_in_and_brings_the_report(house, town, tmp_path):
    out = tmp_path / "m"
    amber = town("amber", 0.02)
    about = build(house, out, [amber], demands=LIMITS)
    kept = read_release(out / "experts" / "amber.report")
    assert tree(out / "experts" / "amber.report") == tree(place_of(amber))
    assert about["release"] == {
        "limits": LIMITS,
        "experts": {
            "amber": {
                "report_digest": kept.digest,
                "values": {"extraction": 0.02, "membership_auc": 0.5, "epsilon": None},
            }
        },
    }
    assert read_about(out) == about and load_mixture(out, house.trusted).expert_names == ["amber"]


@pytest.mark.parametrize("high", [None, 0.021])
def test_who_is_above_a_limit_or_has_no_report_is_refused_and_nothing_is_left(
    house, town, tmp_path, high
):
    said = "no release report at" if high is None else r"extraction is 2\.10.*at most 2\.00"
    with pytest.raises(MergeError, match=said):
        build(house, tmp_path / "m", [town("amber", 0.01), town("zinc", high)], demands=LIMITS)
    assert not (tmp_path / "m").exists()


def test_limits_that_are_kept_hold_for_whoever_joins_later(house, town, tmp_path):
    out = tmp_path / "m"
    build(house, out, [town("amber", 0.02)], demands=LIMITS)
    before = tree(out)
    with pytest.raises(MergeError, match="zinc: extraction is"):
        add_experts(out, [town("zinc", 0.5)], house.trusted)
    with pytest.raises(MergeError, match="basalt: extraction is"):
        bundle = town("basalt", 0.01)
        add_experts(out, [bundle], house.trusted, demands={"extraction": 0.005})
    assert tree(out) == before
    about = add_experts(out, [bundle], house.trusted, demands={"extraction": 0.015})
    assert about["release"]["limits"] == LIMITS | {"extraction": 0.015}
    assert set(about["release"]["experts"]) == {"amber", "basalt"}
    assert (out / "experts" / "amber.report").is_dir()
    about = remove_experts(out, ["amber"], house.trusted)
    assert set(about["release"]["experts"]) == {"basalt"}
    assert not (out / "experts" / "amber.report").exists()
    assert rebuild_mixture(out, [], tmp_path / "n", house.trusted)["release"] is None


def test_demands_may_begin_when_somebody_joins(house, town, tmp_path):
    out = tmp_path / "m"
    assert build(house, out, [town("amber")])["release"] is None
    about = add_experts(out, [town("zinc", 0.01)], house.trusted, demands=LIMITS)
    assert set(about["release"]["experts"]) == {"zinc"}


def test_a_report_in_a_mixture_that_was_altered_or_exchanged_is_refused(house, town, tmp_path):
    out = tmp_path / "m"
    build(house, out, [town("amber", 0.02)], demands=LIMITS)
    inside = out / "experts" / "amber.report"
    old = flip(inside / "page.html", 0.3, 1)
    with pytest.raises(BundleError, match=r"page\.html"):
        add_experts(out, [town("zinc", 0.01)], house.trusted)
    (inside / "page.html").write_bytes(old)
    write_made_report(out / "experts" / "amber.bundle", house.keys["Ann"], inside)
    with pytest.raises(MergeError, match="another report than"):
        add_experts(out, [tmp_path / "inbox" / "zinc.bundle"], house.trusted)
