"""Which experts a request enables: laws over sets of names."""

import datetime
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.bundle.terms import make_terms
from flexolmo.errors import PolicyError
from flexolmo.inference.policy import choose_experts

names = st.sets(st.sampled_from(["amber", "basalt", "cobalt", "iron", "zinc"]))
CONTAINERS = st.sampled_from([list, tuple, set, frozenset, iter])


@given(available=names, without=names, kind=CONTAINERS)
def test_without_takes_away_exactly_what_it_names(available, without, kind):
    without &= available
    assert choose_experts(available, without=kind(without)) == available - without


@given(available=names, only=names, kind=CONTAINERS)
def test_only_enables_exactly_what_it_names(available, only, kind):
    only &= available
    assert choose_experts(available, only=kind(only)) == only


@given(available=names, chosen=names)
def test_only_and_without_are_complements(available, chosen):
    chosen &= available
    assert choose_experts(available, only=chosen) == choose_experts(
        available, without=available - chosen
    )


@given(available=names)
def test_saying_nothing_enables_all_and_only_nothing_none(available):
    assert choose_experts(available) == available
    assert choose_experts(available, only=None, without=[]) == available
    assert choose_experts(available, only=[]) == frozenset()


@given(chosen=names, early=names, late=names)
def test_an_expert_outside_its_days_is_refused_by_name_if_it_is_chosen(chosen, early, late):
    now = datetime.datetime.now(datetime.UTC).date()
    day = datetime.timedelta(days=400)
    available = {
        name: make_terms(
            "x",
            ["any"],
            valid_from=now + day if name in early else now - day,
            valid_until=now - day if name in late - early else now + 2 * day,
        )
        for name in chosen | early | late
    }
    outside = chosen & (early | late)
    if not outside:
        assert choose_experts(available, only=chosen) == chosen
        return
    with pytest.raises(PolicyError) as caught:
        choose_experts(available, only=chosen)
    assert all(f"{name}: the owner's terms " in str(caught.value) for name in outside)
    assert not any(f"{name}: " in str(caught.value) for name in available.keys() - outside)


@given(available=names, asked=names.filter(bool), word=st.sampled_from(["without", "only"]))
def test_an_unknown_name_is_refused_and_every_unknown_one_is_named(available, asked, word):
    unknown = asked - available
    if not unknown:
        choose_experts(available, **{word: asked})
        return
    with pytest.raises(PolicyError) as caught:
        choose_experts(available, **{word: asked})
    found, _, held = str(caught.value).partition(": ")
    assert found == f"Unknown expert {', '.join(sorted(unknown))}"
    assert all(name in held for name in available)
    assert available or "none" in held


@given(available=names, only=names, without=names.filter(bool))
def test_both_at_once_are_refused_even_when_they_agree(available, only, without):
    with pytest.raises(PolicyError, match="not both"):
        choose_experts(available, only=only & available, without=without & available or without)


@pytest.mark.parametrize("name", ["public", "Amber", "amber ", "", "anchor"])
@pytest.mark.parametrize("word", ["without", "only"])
def test_a_near_miss_switches_nothing(word, name):
    with pytest.raises(PolicyError, match="Unknown expert"):
        choose_experts(["amber"], **{word: [name]})


@given(available=names, without=names)
def test_the_answer_never_holds_more_than_is_available(available, without):
    before = set(available), set(without)
    chosen = choose_experts(available, without=without & available)
    assert isinstance(chosen, frozenset) and chosen <= available
    assert (available, without) == before


def test_the_policy_can_be_audited_without_torch():
    code = (
        "import sys, flexolmo.inference.policy as p; p.choose_experts(['a']); "
        "sys.exit(any(m.split('.')[0] in ('torch', 'numpy') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
