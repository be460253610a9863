"""Terms refuse what they must, against every combination worked out by hand."""

import datetime
import itertools
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.bundle.terms import PURPOSES, PurposeName, make_terms, purposes_around
from flexolmo.errors import ConfigError

TODAY = datetime.date(2026, 11, 22)
ALL = sorted(PURPOSES)
GROUPS = ["clinic", "library", "staff"]
day = st.none() | st.dates(TODAY - datetime.timedelta(3), TODAY + datetime.timedelta(3))


def includes(wide, narrow):
    """Whether a permission for `wide` includes `narrow`, walked from the top down."""
    inner = [n for n in ALL if PURPOSES[n].within == wide]
    return wide == narrow or any(includes(n, narrow) for n in inner)


@st.composite
def made_terms(draw):
    first, last = draw(day), draw(day)
    if first and last and first > last:
        first, last = last, first
    return make_terms(
        "For tests.",
        draw(st.sets(st.sampled_from(ALL), min_size=1, max_size=3)),
        prohibited=draw(st.sets(st.sampled_from([n for n in ALL if n != "any"]), max_size=3)),
        audience=draw(st.sets(st.sampled_from(GROUPS), max_size=2)),
        valid_from=first,
        valid_until=last,
    )


def is_allowed(terms, purposes, groups, today):
    """What the terms' definitions say, word for word."""
    asked = set(purposes) or {"any"}
    return (
        all(any(includes(p, a) for p in terms.permitted) for a in asked)
        and not any(includes(p, a) or includes(a, p) for p in terms.prohibited for a in asked)
        and (not terms.audience or any(g in terms.audience for g in groups))
        and (terms.valid_from is None or terms.valid_from <= today)
        and (terms.valid_until is None or today <= terms.valid_until)
    )


@settings(max_examples=300)
@given(
    terms=made_terms(),
    purposes=st.sets(st.sampled_from(ALL), max_size=3),
    groups=st.sets(st.sampled_from(GROUPS), max_size=3),
)
def test_terms_refuse_what_their_definition_says(terms, purposes, groups):
    assert (not terms.refusals(purposes, groups, TODAY)) == is_allowed(
        terms, purposes, groups, TODAY
    )


@settings(max_examples=100)
@given(terms=made_terms(), purposes=st.sets(st.sampled_from(ALL), max_size=2))
def test_asking_for_more_or_being_fewer_people_never_allows_more(terms, purposes):
    def is_open(asked, groups):
        return not terms.refusals(asked, groups, TODAY)

    for more in ALL:
        if is_open(purposes | {more}, GROUPS) and purposes:
            assert is_open(purposes, GROUPS)
    for groups in itertools.combinations(GROUPS, 2):
        if is_open(purposes, groups):
            assert is_open(purposes, GROUPS)


def test_each_reason_is_named():
    terms = make_terms(
        "x",
        ["general-research"],
        prohibited=["methods-research"],
        audience=["clinic"],
        valid_from=TODAY,
    )
    yesterday = TODAY - datetime.timedelta(1)
    assert terms.refusals(["methods-research", "training"], ["staff"], yesterday) == [
        "the owner's terms begin on 2026-11-22",
        "the owner's terms prohibit methods-research",
        "the owner's terms permit general-research, not training",
        "the owner's terms are for clinic alone",
    ]
    assert terms.refusals([], ["clinic"], TODAY) == [
        "the owner's terms permit general-research, not any, which stands for no purpose stated"
    ]
    assert not terms.refusals(["health-research"], ["clinic"], TODAY)
    assert terms.refusals(["general-research"], ["clinic"], TODAY) == [
        "the owner's terms prohibit methods-research, which general-research includes"
    ]


def test_purposes_form_a_tree_whose_root_is_any():
    assert set(get_args(PurposeName)) == set(ALL)
    for name in ALL:
        around = purposes_around(name)
        assert around[0] == name and around[-1] == "any"
        assert PURPOSES[name].meaning.endswith(".") and PURPOSES[name].source


def test_the_norm_lists_the_same_purposes():
    page = (Path(__file__).parents[2] / "docs" / "bundle_format.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| ([^|]*) \| (?:`([a-z-]+)`)? \| ([^|]*) \|$", page, re.M)
    assert [(n, m, w or None, s) for n, m, w, s in rows] == [
        (name, p.meaning, p.within, p.source) for name, p in PURPOSES.items()
    ]


def test_terms_are_summed_up_for_people():
    terms = make_terms(
        "x",
        ["training", "education"],
        prohibited=["commercial"],
        audience=["staff", "clinic"],
        valid_from=TODAY,
        valid_until=TODAY,
        attribution="St Mary",
    )
    assert terms.summary() == (
        "permitted: education, training; prohibited: commercial; only for clinic, staff; "
        "from 2026-11-22; until 2026-11-22; to be credited: St Mary"
    )
    assert make_terms("x", ["any"]).summary() == "permitted: any"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"permitted": []}, "permitted: found "),
        ({"permitted": ["research"]}, "permitted: found 'research'.*'general-research'"),
        ({"prohibited": ["any"]}, "'any' is prohibited, so that no use is left"),
        ({"audience": ["a b"]}, "audience: found 'a b'"),
        ({"audience": ["\x1b[2J"]}, r"audience: found '\\x1b\[2J'"),
        ({"text": ""}, "text: found ''"),
        ({"attribution": ""}, "attribution: found ''"),
        (
            {"valid_from": TODAY, "valid_until": TODAY - datetime.timedelta(1)},
            "valid_from is after valid_until",
        ),
    ],
)
def test_what_no_terms_can_hold_is_refused_in_a_sentence(changes, said):
    with pytest.raises(ConfigError, match=rf"(?s){said}.*flexolmo expert purposes"):
        make_terms(**{"text": "x", "permitted": ["any"]} | changes)


def test_names_are_brought_into_order_each_once():
    terms = make_terms("x", ["training", "any", "training"], audience=["b", "a", "b"])
    assert terms.permitted == ("any", "training") and terms.audience == ("a", "b")
