"""A release report is what its owner's key signed, of the bundle it names, and nothing else."""

import shutil
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flexolmo.bundle.bundle import open_bundle
from flexolmo.bundle.limits import parse_limits
from flexolmo.bundle.release import (
    DEMANDS,
    EXAMPLE,
    MAX_BYTES,
    NO_PERCENT,
    UP_TO_ONE,
    Figure,
    check_release,
    demanded_values,
    find_excess,
    origin_of,
    place_of,
    read_release,
    stated_epsilon,
    take_release,
)
from flexolmo.errors import BundleError, ConfigError, FlexOlmoError, SignatureError
from made_mixtures import IN_SESSION, flip
from made_reports import BUDGET, figure, write_made_report


@pytest.fixture(scope="module")
def reported(house, tmp_path_factory):
    """A bundle of Ann's and its report."""
    here = tmp_path_factory.mktemp("reported")
    bundle = here / "amber.bundle"
    shutil.copytree(house.bundle("amber"), bundle)
    measures = {"extraction": figure(0.01), "membership_auc": figure(0.6)}
    write_made_report(bundle, house.keys["Ann"], place_of(bundle), measures=measures)
    return bundle


@pytest.fixture
def copied(reported, tmp_path):
    """A copy of it to spoil, and the bundle, opened."""
    bundle = tmp_path / "amber.bundle"
    shutil.copytree(reported, bundle)
    shutil.copytree(place_of(reported), place_of(bundle))
    return place_of(bundle), open_bundle(bundle, None, allow_unknown_signer=True)


def test_a_report_is_read_as_it_was_signed(copied):
    path, bundle = copied
    found = check_release(path, bundle)
    assert found.report.bundle_digest == bundle.digests["manifest.json"]
    assert found.report.measures["extraction"] == figure(0.01)
    assert set(found.files) == set(MAX_BYTES) and found.key_id == bundle.key_id


@IN_SESSION
@given(st.sampled_from(sorted(MAX_BYTES)), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_one_byte_changed_in_any_file_is_refused(reported, name, place, change):
    file = place_of(reported) / name
    old = flip(file, place, change)
    try:
        with pytest.raises(BundleError):
            read_release(place_of(reported))
    finally:
        file.write_bytes(old)


def test_other_files_are_refused_by_name(copied):
    path, _ = copied
    (path / "extra.txt").write_text("x")
    (path / "bom.json").rename(path / "elsewhere")
    with pytest.raises(BundleError, match=r"missing: bom.json[\s\S]*extra: 'elsewhere'"):
        read_release(path)
    (path / "extra.txt").unlink()
    (path / "bom.json").symlink_to(path / "elsewhere")
    with pytest.raises(BundleError, match=r"bom\.json"):
        read_release(path)
    with pytest.raises(BundleError, match="Name a report's directory"):
        read_release(path / "report.json")


def test_a_report_by_another_key_or_of_another_bundle_is_refused(house, copied, tmp_path):
    path, bundle = copied
    write_made_report(tmp_path / "amber.bundle", house.keys["Bob"], tmp_path / "bobs.report")
    with pytest.raises(SignatureError, match="expected one by"):
        check_release(tmp_path / "bobs.report", bundle)
    again = house.write(
        tmp_path / "newer", "amber", house.tensors("amber", "evidence"), "evidence", serial=2
    )
    newer = open_bundle(again, None, allow_unknown_signer=True)
    with pytest.raises(BundleError, match=r"serial 1, bundle[\s\S]*serial 2"):
        check_release(path, newer)


@pytest.mark.parametrize("change", [{"name": "zinc"}, {"owner": "Bob"}, {"serial": 7}])
def test_a_report_that_calls_the_bundle_something_else_is_refused(house, copied, change):
    path, bundle = copied
    write_made_report(path.with_suffix(".bundle"), house.keys["Ann"], path, **change)
    with pytest.raises(BundleError, match="it is the report of"):
        check_release(path, bundle)


@pytest.mark.parametrize(
    "change",
    [{"high": 0.1}, {"low": 0.3}, {"model": "off"}, {"high": 1.5}, {"value": float("nan")}],
)
def test_a_figure_lies_in_its_interval_and_is_of_a_model_with_the_expert(change):
    claims = {"value": 0.2, "low": 0.1, "high": 0.4, "model": "on"}
    assert Figure(**claims).high == 0.4
    with pytest.raises(ValidationError):
        Figure(**(claims | change))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extraction<=20", "below 1, or below 100%"),
        ("extraction<=100%", "below 1, or below 100%"),
        ("membership_auc<=55", "one below 1, as"),
        ("membership_auc<=1", "one below 1, as"),
        ("membership_auc<=55%", "percent sign"),
        ("epsilon<=8%", "percent sign"),
        ("epsilon<=" + "9" * 800, "one that is finite"),
    ],
)
def test_a_limit_that_demands_nothing_is_refused(text, said):
    with pytest.raises(ConfigError) as e:
        parse_limits(text, DEMANDS, EXAMPLE, up_to_one=UP_TO_ONE, no_percent=NO_PERCENT)
    assert said in str(e.value) and len(str(e.value)) < 300


def test_a_report_is_replaced_but_nothing_else_is(house, copied):
    path, bundle = copied
    write_made_report(path.with_suffix(".bundle"), house.keys["Ann"], path)
    assert not check_release(path, bundle).report.measures
    with pytest.raises(FlexOlmoError, match="is not replaced"):
        write_made_report(path.with_suffix(".bundle"), house.keys["Ann"], path.parent)


@given(
    st.dictionaries(st.sampled_from(sorted(DEMANDS)), st.floats(0.001, 20)),
    st.fixed_dictionaries({d: st.none() | st.floats(0.001, 20) for d in DEMANDS}),
)
def test_a_demand_is_met_by_a_value_that_is_known_and_not_above_it(limits, values):
    lines = find_excess("amber", values, limits)
    missed = [d for d, limit in limits.items() if values[d] is None or values[d] > limit]
    assert [line.split(":")[1].split()[0] for line in lines] == missed
    assert all(line.startswith("amber: ") for line in lines)


def test_the_upper_end_of_an_interval_is_held_against_a_limit(copied):
    path, bundle = copied
    values = demanded_values(check_release(path, bundle), bundle.manifest)
    assert values == {"extraction": 0.01, "membership_auc": 0.6, "epsilon": None}
    _, lines = take_release(
        path.with_suffix(".bundle"), bundle, {"extraction": 0.005, "epsilon": 8}
    )
    assert lines == [
        "amber: extraction is 1.00\u00a0%, the upper end of its interval, demanded is at most "
        "0.50\u00a0%",
        "amber: epsilon: the bundle states no guarantee, or none that training here can give, "
        "demanded is at most 8",
    ]


def test_no_report_and_a_spoilt_one_are_each_a_line(copied, tmp_path):
    path, bundle = copied
    found, lines = take_release(tmp_path / "away" / "amber.bundle", bundle, {})
    assert found is None and "found no release report at" in lines[0]
    flip(path / "page.html", 0.5, 1)
    found, lines = take_release(path.with_suffix(".bundle"), bundle, {})
    assert found is None and "page.html: found sha256" in lines[0]


@pytest.mark.parametrize(
    ("changes", "epsilon"),
    [
        ({}, 7.9961),
        ({"epsilon": 8}, 8.0),
        ({"epsilon": 0}, None),
        ({"epsilon": True}, None),
        ({"epsilon": "8"}, None),
        ({"epsilon": 1_000_001}, None),
        ({"epsilon": 10**400}, None),
        ({"delta": 1}, None),
        ({"delta": 0.0}, None),
        ({"delta": 0.001}, 7.9961),
        ({"delta": 0.002}, None),
        ({"neighbours": "none"}, None),
        ({"accountant": "ours"}, None),
        ({"sampling": "Poisson"}, None),  # from before windows were secret
        ({"noise": 10**400}, None),
        ({"unit": "house"}, None),
        ({"more": 1}, None),
    ],
)
def test_epsilon_is_what_the_manifest_states(changes, epsilon):
    budget = BUDGET | changes
    recipe = {"budget": budget, "privacy": {"epsilon": 8.0}}
    assert stated_epsilon(SimpleNamespace(recipe=recipe)) == epsilon
    assert stated_epsilon(SimpleNamespace(recipe=recipe | {"privacy": None})) is None


@pytest.mark.parametrize("key", BUDGET)
def test_a_guarantee_of_which_something_is_missing_is_none(key):
    short = {k: v for k, v in BUDGET.items() if k != key}
    for budget in (short, None, "8", [8]):
        recipe = {"budget": budget, "privacy": {}}
        assert stated_epsilon(SimpleNamespace(recipe=recipe)) is None


def test_an_origin_leaves_out_the_budget_alone():
    one = origin_of("b", "a", {"seed": 1, "budget": {"sampling_rate": 0.1}})
    assert one == origin_of("b", "a", {"seed": 1})
    assert one != origin_of("b", "a", {"seed": 2})
