"""The public summary of training content: it is of what is on, and of nothing else."""

import datetime
import json
import re
import shutil
import tomllib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.audit.summary import SIZES, About, find_unstated, make_summary
from flexolmo.bundle.release import place_of
from flexolmo.config import parse_settings, read_recipe
from flexolmo.errors import BundleError, ConfigError, MergeError, PolicyError, SignatureError
from flexolmo.merge.mixture import build_mixture
from flexolmo.report.summary_page import write_summary_page
from made_bundles import TERMS, terms_until
from made_mixtures import IN_SESSION, NAMES, flip, owner_of
from made_reports import BUDGET, figure, write_made_report

TODAY = datetime.date(2026, 11, 27)
TOKENS_SEEN = 7_654_321
COUNTED = 1_234_567  # as if an owner's report did not round
FOUND = {"membership_auc": figure(0.5)}  # which a mixture demands, so that it keeps reports
FINDINGS = {
    "least_documents": 23,
    "data": {"licences": ["CC-BY-4.0 as reported"]},
    "text": {
        "counts": {"tokens": COUNTED, "documents": 4242},
        "personal": {"IBAN": {"documents": 40}, "e-mail": {"documents": None}},
    },
}
ABOUT = {
    "provider": {"name": "Example Library", "contact": "ai@example.org"},
    "model": {"name": "Library 1.0", "placed_on_market": "2026-11-30"},
    "sources": {
        name: {
            "kinds": [kind],
            "description": f"described-{name}",
            "languages": [f"tongue-{name}"],
            "reservations": f"reserved-{name}",
            "tokens": COUNTED,
        }
        for name, kind in zip(
            ("public", *NAMES), ("public-dataset", "licensed", "licensed", "user-data"), strict=True
        )
    },
}
SUBSETS = st.sets(st.sampled_from(NAMES))


def about(**changes):
    return parse_settings(ABOUT | changes, About, "a test")


@pytest.fixture(scope="module")
def workshop(house, tmp_path_factory):
    """`workshop(names, findings, **changes)`: a mixture of experts that have words of their own,
    with release reports that found `findings`."""
    root = tmp_path_factory.mktemp("summaries")

    @cache
    def bundle(name, findings, changes):
        claims = {
            "licence": f"LicenseRef-{name}",
            "tokens_seen": TOKENS_SEEN,
            "terms": TERMS.model_copy(update={"attribution": f"credit-{name}"}),
        } | dict(changes)
        if "recipe" in claims:
            claims["recipe"] = json.loads(claims["recipe"])
        here = root / str(bundle.cache_info().misses)
        path = house.write(here, name, house.tensors(name, "evidence"), "evidence", **claims)
        key, report = house.keys[owner_of(name)], place_of(path)
        write_made_report(path, key, report, measures=FOUND, findings=json.loads(findings))
        return path

    @cache
    def mixture(names, findings, changes):
        out = root / f"model{mixture.cache_info().misses}"
        bundles = [bundle(name, findings, changes) for name in names]
        build_mixture(house.anchor_dir, bundles, out, house.trusted, demands={"membership_auc": 1})
        return out

    def make(names, findings=FINDINGS, **changes):
        return mixture(tuple(sorted(names)), json.dumps(findings), tuple(changes.items()))

    return make


@pytest.fixture
def summary(workshop, house):
    """`summary(on)`: of the mixture that holds all, with these on."""

    def make(on=NAMES, said=None, names=NAMES, **changes):
        model = workshop(names, **changes)
        return make_summary(model, house.trusted, said or about(), only=on, created=TODAY)

    return make


def pages(found, out: Path) -> dict[str, str]:
    """The summary in its three forms, without the list of what is off."""
    write_summary_page(found, out)
    shown = {"json": json.dumps({k: v for k, v in found.items() if k != "held"})}
    for form in ("html", "md"):
        whole = (out / f"page.{form}").read_text().replace("<wbr>", "")
        assert whole.count("Held, but off") == 1
        shown[form] = whole[: whole.index("Held, but off")]
    return shown


@IN_SESSION
@given(on=SUBSETS)
def test_nothing_of_a_source_that_is_off_is_said_but_in_the_list(summary, tmp_path, on):
    found = summary(on)
    digests = summary()["model"]["bundle_digests"]
    assert found["held"]["off"] == {n: digests[n] for n in NAMES if n not in on}
    for form, text in pages(found, tmp_path).items():
        for name in NAMES:
            own = [name, digests[name], f"LicenseRef-{name}", f"credit-{name}"]
            own += [f"described-{name}", f"tongue-{name}", f"reserved-{name}"]
            assert [x in text for x in own] == [name in on] * len(own), (form, name)


@IN_SESSION
@given(on=SUBSETS)
def test_a_source_that_is_off_is_as_one_never_held(summary, on):
    parts = summary(on)
    alone = summary(on, parse_settings(only_of(on), About, "a test"), names=tuple(sorted(on)))
    assert alone["held"]["off"] == {}
    assert {k: v for k, v in parts.items() if k != "held"} == {
        k: v for k, v in alone.items() if k != "held"
    }


def only_of(on):
    """What the publisher says, of these sources alone."""
    return ABOUT | {"sources": {n: ABOUT["sources"][n] for n in ("public", *on)}}


@IN_SESSION
@given(on=SUBSETS, name=st.sampled_from(NAMES))
def test_one_more_source_adds_its_section_alone(summary, on, name):
    fewer, more = summary(on - {name}), summary(on | {name})
    added = more["sources"].pop(name)
    assert more["sources"] == fewer["sources"]
    assert more["processing"] == fewer["processing"] and more["provider"] == fewer["provider"]
    assert set(more["overall"]["languages"]) - {f"tongue-{name}"} == {
        *fewer["overall"]["languages"]
    }
    assert added["description"] == f"described-{name}"
    assert more["model"]["digest"] != fewer["model"]["digest"]


def test_counts_of_an_owner_are_never_printed(summary, tmp_path):
    found = summary()
    shown = "\n".join(pages(found, tmp_path).values())
    for count in (TOKENS_SEEN, COUNTED, 4242):
        assert str(count) not in shown and f"{count:,}" not in shown
    assert SIZES[0] in shown and "CC-BY-4.0 as reported" in shown
    assert found["sources"]["amber"]["personal_data"] == ["IBAN"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, "epsilon 8, delta 1e-06, for each document"), ({"epsilon": 10**400}, None)],
)
def test_a_guarantee_is_told_if_it_is_whole(summary, changes, said):
    recipe = {"budget": BUDGET | changes, "privacy": {"epsilon": 8.0}}
    found = summary(["zinc"], About(), ["zinc"], recipe=json.dumps(recipe))
    assert found["sources"]["zinc"]["privacy"] == said


def test_what_fewer_documents_hold_is_not_told_as_none(summary, tmp_path):
    md = pages(summary(["zinc"], About(), ["zinc"]), tmp_path)["md"]
    assert "found in at least 23 documents: IBAN |" in md
    few = FINDINGS | {"text": {"personal": {"IBAN": {"documents": None}}}}
    md = pages(summary(["zinc"], About(), ["zinc"], findings=few), tmp_path)["md"]
    assert "found in at least 23 documents: no kind in so many documents |" in md
    assert ": none" not in md


@pytest.mark.parametrize(
    ("seen", "said", "reported", "size", "overall"),  # overall: with one token of public text
    [
        (10**9 - 1, None, None, SIZES[0], None),  # it cannot be more than training read
        (10**9, None, None, None, None),  # it may be less
        (10**9, 5, None, SIZES[0], SIZES[0]),
        (10**14, 10**9, None, SIZES[1], SIZES[1]),
        (10**14, None, 10**13, SIZES[1], SIZES[2]),
        (10**14, 10**13 + 1, None, SIZES[2], SIZES[2]),
        (5, 10**14, 10**14, SIZES[0], SIZES[0]),
    ],
)
def test_a_size_is_a_range_that_follows_from_what_is_said(
    summary, seen, said, reported, size, overall
):
    sources = {"public": {"tokens": 1}, "zinc": {"tokens": said} if said else {}}
    findings = {"text": {"counts": {"tokens": reported}}}
    found = summary(["zinc"], about(sources=sources), ["zinc"], tokens_seen=seen, findings=findings)
    assert found["sources"]["zinc"]["size"] == size
    assert found["overall"]["size"] == overall
    assert ("zinc.size" in find_unstated(found)["Bob"]) == (size is None)


def test_the_publisher_comes_before_a_report_and_one_source_may_be_of_two_kinds(summary, tmp_path):
    zinc = {"licences": ["CC0-1.0", "MIT"], "kinds": ["crawled", "synthetic"]}
    md = pages(summary(["zinc"], about(sources={"zinc": zinc})), tmp_path)["md"]
    assert "| Licences of the text | CC0-1.0; MIT |" in md and "as reported" not in md
    assert "**zinc** is described under 2.3." in md and md.count("| Licences of the text") == 2


def test_what_nobody_said_is_not_stated_with_whom_to_ask(summary, tmp_path):
    found = summary(["zinc"], About(), findings={})
    asked = find_unstated(found)
    assert (
        "provider.name" in asked["the provider"]
        and "public.size" in asked["whoever made the anchor"]
    )
    assert asked["Bob"] == [
        f"zinc.{key}"
        for key in (
            "kinds", "description", "languages", "collected_until", "licences", "reservations",
            "illegal_content",
        )
    ]  # fmt: skip
    md = pages(found, tmp_path)["md"]
    assert md.count("not stated: ask Bob") >= 7 and "Ann" not in md


@pytest.mark.parametrize(
    "findings",
    [{"text": 1, "data": []}, {"data": {"licences": 3}}, {"text": {"personal": ["x"]}},
     {"text": {"personal": {"x": 1}, "counts": {"tokens": "many"}}}],
)  # fmt: skip
def test_a_report_of_another_form_says_nothing(summary, findings):
    found = summary(["zinc"], About(), ["zinc"], findings=findings)
    assert found["sources"]["zinc"]["licences"] is None
    assert not found["sources"]["zinc"]["personal_data"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[provider]\nnmae = "x"', "provider.nmae: unknown key"),
        ('[sources.zinc]\ndescripton = "x"', "sources.zinc.descripton: unknown key"),
        ('[sources.zinc]\nkinds = ["bought"]', "sources.zinc.kinds"),
        ("[sources.zinc]\nkinds = []", "sources.zinc.kinds"),
        ("[sources.zinc]\ntokens = true", "sources.zinc.tokens"),
        ('[provider]\nname = " "', "provider.name"),
        ("[model]\nplaced_on_market = 20260101", "model.placed_on_market"),
        ('[processing]\nsigned_code_of_practice = "yes"', "signed_code_of_practice"),
        ("[provider", "not readable TOML"),
    ],
)
def test_what_the_publisher_says_is_read_strictly(tmp_path, text, named):
    path = tmp_path / "about.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(named)):
        read_recipe(path, About)


def test_the_example_of_the_guide_can_be_read():
    guide = Path(__file__).parents[2] / "docs" / "guides" / "training_summary.md"
    (example,) = re.findall(r"```toml\n(.*?)```", guide.read_text(), re.DOTALL)
    said = parse_settings(tomllib.loads(example), About, str(guide))
    assert said.sources and said.provider.name


def test_unknown_names_and_changed_files_are_refused(workshop, house, tmp_path):
    model = workshop(NAMES)
    with pytest.raises(PolicyError, match="Unknown expert quartz"):
        make_summary(model, house.trusted, without=["quartz"])
    with pytest.raises(ConfigError, match="quartz is of no source here"):
        make_summary(model, house.trusted, about(sources={"quartz": {}}))
    with pytest.raises(SignatureError, match="Nobody was said to be trusted"):
        make_summary(model, None)


def test_a_report_that_was_exchanged_is_refused_unless_its_source_is_off(house, tmp_path):
    key, bundle = house.keys["Bob"], house.bundle("zinc")
    own = shutil.copytree(bundle, tmp_path / "zinc.bundle")
    write_made_report(own, key, place_of(own), measures=FOUND)
    model = tmp_path / "model"
    build_mixture(house.anchor_dir, [own], model, house.trusted, demands={"membership_auc": 1})
    write_made_report(own, key, model / "experts" / "zinc.report")
    with pytest.raises(MergeError, match=r"mixture\.json says"):
        make_summary(model, house.trusted)
    assert make_summary(model, house.trusted, without=["zinc"])["held"]["off"]


def test_a_source_whose_terms_have_expired_is_refused_unless_it_is_off(
    workshop, house, monkeypatch
):
    today = datetime.datetime.now(datetime.UTC).date()
    model = workshop(["zinc"], terms=terms_until(today + datetime.timedelta(days=1)))
    later = today + datetime.timedelta(days=3)
    monkeypatch.setattr("flexolmo.bundle.bundle._today", lambda: later)
    with pytest.raises(BundleError, match="expired"):
        make_summary(model, house.trusted)
    assert make_summary(model, house.trusted, without=["zinc"])["held"]["off"]


def test_a_bundle_that_is_on_is_checked_and_one_that_is_off_is_not_opened(house, tmp_path):
    model = house.build(["amber", "zinc"], tmp_path / "model")
    before = make_summary(model, house.trusted, without=["zinc"], created=TODAY)
    flip(model / "experts" / "zinc.bundle" / "expert.safetensors", 0.9, 1)
    with pytest.raises(SignatureError, match=r"expert\.safetensors"):
        make_summary(model, house.trusted)
    shutil.rmtree(model / "experts" / "zinc.bundle")
    assert make_summary(model, house.trusted, without=["zinc"], created=TODAY) == before
