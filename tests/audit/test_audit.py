"""The attacks against experts that tell, and those that do not."""

import dataclasses
import json
from itertools import pairwise
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.audit.intervals import area, share
from flexolmo.audit.statistics import (
    _read_pairs,
    audit_statistics,
    count_bounds,
    find_members,
    open_expert,
    recover_counts,
    spell_rare_words,
)
from flexolmo.bundle.signing import create_key
from flexolmo.errors import ConfigError
from flexolmo.model.private_statistics import find_sigma
from flexolmo.model.router import LinearSettings
from flexolmo.model.statistics import EvidenceSettings, OwnerTable, count_tokens, fit_table
from flexolmo.train.expert import ExpertRecipe, pack_expert, train_expert
from flexolmo.train.loop import TrainSettings
from made_bundles import TERMS

BRIEF = TrainSettings(steps=3, batch_size=2, seq_len=32, warmup_steps=1)


def recipe_of(**changes):
    return ExpertRecipe(router=EvidenceSettings(**changes), train=BRIEF)


@pytest.fixture(scope="module")
def expert(pico_anchor, pico_sets):
    return train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of())


@pytest.fixture(scope="module")
def found(pico_anchor, pico_sets, expert):
    return audit_statistics(pico_anchor, expert, pico_sets["maths"])


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=5))
def test_each_different_pair_is_weighed_once_and_every_document_finds_its_own(documents):
    found = _read_pairs([np.array(ids) for ids in documents], 7)
    assert found.pairs.tolist() == sorted({7 * u + v for d in documents for u, v in pairwise(d)})
    told = [[divmod(key, 7) for key in found.pairs[x].tolist()] for x in found.places]
    assert told == [list(pairwise(ids)) for ids in documents]


def test_our_table_and_rows_tell_nothing_of_rare_tokens(found):
    tokens = found["token_presence"]
    assert tokens["of_these_in_the_text"] > 0
    for part in ("embed_tokens", "lm_head"):
        assert tokens[part] == {"auc": 0.5, "interval": [0.5, 0.5]}
    assert found["count_recovery"]["determined"]["share"] == 0.0
    assert json.loads(json.dumps(found)) == found


def test_rows_that_moved_where_the_text_has_a_token_are_found_out(pico_anchor, pico_sets, expert):
    data = pico_sets["maths"]
    held = np.bincount(data.splits["train"].tokens.astype(int), minlength=300) > 0
    base = pico_anchor.model.embed_tokens.weight.detach()
    loud = dataclasses.replace(
        expert,
        tensors=expert.tensors
        | {"embed_tokens.weight": base + torch.from_numpy(held)[:, None] * 0.01},
    )
    tokens = audit_statistics(pico_anchor, loud, data)["token_presence"]
    assert tokens["embed_tokens"]["auc"] == 1.0
    assert tokens["lm_head"]["auc"] == 0.5


def test_counts_come_out_of_a_table_with_fine_steps(pico_anchor, pico_sets):
    """The attack works where there is something to find."""
    data, found = pico_sets["maths"], {}
    split = data.splits["train"]
    for kind, changes in {
        "fine": {"level_nats": 0.1, "min_documents": 1, "most_per_document": 1000},
        "ours": {},
    }.items():
        settings = EvidenceSettings(**changes)
        table = fit_table(split.tokens, split.source_offsets, pico_anchor.public, settings)
        found[kind] = recover_counts(pico_anchor, table, settings, data)
    assert found["fine"]["guessed"]["share"] > 4 * found["ours"]["guessed"]["share"] + 0.05
    assert found["fine"]["determined"]["share"] > 0 == found["ours"]["determined"]["share"]


def test_every_count_is_within_the_bounds_that_the_attack_sees(pico_anchor, pico_sets):
    """Also where a token is in just enough documents, and those bounds leave many counts."""
    split = pico_sets["maths"].splits["train"]
    stream = split.tokens, split.source_offsets
    counts = count_tokens(*stream, 300, 1)  # of documents that hold it
    for k in np.unique(counts[counts > 0]).tolist():
        settings = EvidenceSettings(min_documents=k, most_per_document=1)
        table = fit_table(*stream, pico_anchor.public, settings)
        least, most = count_bounds(pico_anchor.public, table, settings, int(counts.sum()))
        told = counts[table.is_told]
        assert told.min() == k
        assert (least <= told).all() and (told <= most).all()
        assert (most[least == k] >= np.floor(k * np.exp(0.5))).all()


def test_documents_in_the_table_are_found_out(pico_anchor, pico_sets, expert, monkeypatch):
    """With every document's own pairs listed, members stand out."""
    data = pico_sets["maths"]
    loose = train_expert(
        pico_anchor, data, "maths", recipe_of(min_documents=1, most_per_document=1000)
    )
    monkeypatch.setattr("flexolmo.audit.statistics.LEAST_DOCUMENTS", 2)
    ours, theirs = (find_members(pico_anchor, x, data, 0) for x in (expert, loose))
    assert theirs["knows_the_rest"]["share"] > 0.8
    assert theirs["calibrated"]["auc"] > max(0.6, ours["calibrated"]["auc"])


def test_noise_hides_which_documents_are_in_the_table(pico_anchor, pico_sets, monkeypatch):
    """The attack's own tables have a seed. That the expert's is refused, as noise hides all, has a
    chance of 1 in 10^9."""
    data = pico_sets["maths"]
    loose, noised = (
        train_expert(pico_anchor, data, "maths", recipe_of(min_documents=1, epsilon=epsilon))
        for epsilon in (None, 4.0)
    )
    monkeypatch.setattr("flexolmo.audit.statistics.LEAST_DOCUMENTS", 2)
    theirs, ours = (find_members(pico_anchor, x, data, 0) for x in (loose, noised))
    assert abs(ours["calibrated"]["auc"] - 0.5) < 0.15 < theirs["calibrated"]["auc"] - 0.5
    assert ours["knows_the_rest"]["share"] < theirs["knows_the_rest"]["share"]
    assert ours["knows_the_rest"]["at_most"] == pytest.approx(
        NormalDist(0, 2**0.5 * find_sigma(4.0, 1e-6)).cdf(1)
    )
    found = audit_statistics(pico_anchor, noised, data)
    assert (found["epsilon"], found["delta"]) == (4.0, 1e-6)
    for part in ("embed_tokens", "lm_head"):  # all rows may be told of, none to attack has moved
        assert found["token_presence"].get(part, {"auc": 0.5})["auc"] in (0.5, None)
    assert json.loads(json.dumps(found)) == found


def test_words_are_spelled_where_every_pair_is_listed(pico_anchor):
    tokenizer, size = pico_anchor.tokenizer, 300
    texts = ["the zebrafish swims", "the sparrow flies", "the sparrow sings"]
    documents = [[*tokenizer.encode(t), tokenizer.eos_id] for t in texts]
    tokens = np.array([i for d in documents for i in d])
    split = SimpleNamespace(tokens=tokens, source_offsets=np.cumsum([0, *map(len, documents)]))
    data = SimpleNamespace(splits={"train": split}, eos_id=tokenizer.eos_id)
    ids = tokenizer.encode(" zebrafish")
    pairs = np.array(sorted({u * size + v for u, v in pairwise(ids)}))
    levels = np.zeros(size, np.int8)
    rare = {" zebrafish", " swims", " flies", " sings"}
    expected = sum(len(tokenizer.encode(w)) > 1 for w in rare)
    for listed, hits in ((pairs, 1), (pairs[1:], 0)):
        table = OwnerTable(levels, listed, np.zeros(len(listed), np.int8))
        found = spell_rare_words(tokenizer, table, pico_anchor.public, data)
        assert found["words"] == expected > 1
        assert found["spelled"]["share"] == pytest.approx(hits / expected)


def test_a_bundle_is_attacked_like_its_run(tmp_path, pico_anchor, pico_sets, expert, found):
    key = tmp_path / "key"
    create_key(key)
    bundle = pack_expert(
        expert, tmp_path / "maths.bundle", key, owner="Ann", licence="MIT", terms=TERMS
    )
    assert audit_statistics(pico_anchor, open_expert(bundle), pico_sets["maths"]) == found


def test_what_does_not_go_together_is_refused(tmp_path, pico_anchor, pico_sets, expert):
    with pytest.raises(ConfigError, match="neither a bundle nor the run"):
        open_expert(tmp_path)
    with pytest.raises(ConfigError, match=r"trained on the set of commitment .*Attack it with"):
        audit_statistics(pico_anchor, expert, pico_sets["public"])
    with pytest.raises(ConfigError, match="Give the anchor of its training"):
        audit_statistics(
            pico_anchor, dataclasses.replace(expert, anchor_digest="x"), pico_sets["maths"]
        )
    with pytest.raises(ConfigError, match=r"holds no router\.token_levels"):
        audit_statistics(pico_anchor, dataclasses.replace(expert, tensors={}), pico_sets["maths"])
    with pytest.raises(ConfigError, match="holds no table"):
        audit_statistics(
            pico_anchor, dataclasses.replace(expert, router=LinearSettings()), pico_sets["maths"]
        )


@given(
    yes=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    no=st.lists(st.integers(0, 5), min_size=1, max_size=20),
)
@settings(derandomize=True, max_examples=40, deadline=None)
def test_the_area_is_the_share_of_pairs_in_the_right_order(yes, no):
    right = np.mean([(a > b) + 0.5 * (a == b) for a in yes for b in no])
    found = area(np.array(yes), np.array(no), 0)
    assert found["auc"] == pytest.approx(right)
    low, high = found["interval"]
    assert 0 <= low <= high <= 1


def test_pairs_of_one_stratum_alone_count():
    """Everything that sets the two apart here is their stratum."""
    yes, no = np.array([9.0, 9.0, 1.0]), np.array([9.0, 1.0, 1.0])
    strata = (yes > 5).astype(int), (no > 5).astype(int)
    assert area(yes, no, 0)["auc"] > 0.6
    assert area(yes, no, 0, *strata)["auc"] == 0.5


def test_a_share_has_wilsons_interval():
    found = share(np.array([True] * 1 + [False] * 9))
    assert found["share"] == 0.1
    assert found["interval"] == pytest.approx([0.0179, 0.4042], abs=1e-3)
    assert share(np.zeros(0, bool)) == {"share": None, "interval": None}
