"""A certificate is given only where an expert leaves no trace, and holds only for what it says."""

import copy
import hashlib
import json
import re
import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.bundle.signing import encode_public, read_private_key, sign_files
from flexolmo.bundle.trust import ANY_SIGNER, TrustedOwners
from flexolmo.errors import ConfigError, ProofError, SignatureError
from flexolmo.files import canonical_json, digest_bytes
from flexolmo.inference.reader import OwnReader, pad_left
from flexolmo.inference.texts import Text
from flexolmo.merge import certificate, compare, prove
from flexolmo.merge.certificate import Findings, read_certificate, write_words
from flexolmo.merge.mixture import (
    add_experts,
    build_mixture,
    load_mixture,
    rebuild_mixture,
    remove_experts,
)
from flexolmo.merge.prove import prove_optout, verify_optout
from flexolmo.model.assemble import expert_tensors
from flexolmo.model.cache import Cache
from flexolmo.model.moe import Mixture, MixtureModel
from flexolmo.model.probabilities import ProbabilityMixture
from flexolmo.model.router import EvidenceRouter
from flexolmo.model.spans import Spans
from made_mixtures import IN_SESSION, NAMES, flip, tree

OTHERS = ("amber", "basalt")
STATED = {"scope": "ffn", "beside_anchor": None, "replay": 0.0, "router": {"kind": "evidence"}}
LITTLE = {"most_subsets": 2, "num_random": 1, "seed": 5}


@pytest.fixture(scope="module", autouse=True)
def short_sequences():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "SEQUENCE_TOKENS", 10)
        patch.setattr(compare, "WRITTEN_TOKENS", 1)
        yield


@pytest.fixture
def try_to_prove(house, owner_keys, tmp_path):
    """`try_to_prove(model)`: the path of Ann's certificate that zinc leaves no trace."""

    def call(model, name="zinc", **options):
        out = tmp_path / "cert.json"
        prove_optout(model, name, out, house.trusted, owner_keys["Ann"], **(LITTLE | options))
        return out

    return call


@pytest.fixture(scope="module")
def proven(house, owner_keys, tmp_path_factory):
    """A mixture with zinc and a certificate without; do not change either in place."""
    model, out = house.mixture_dir(NAMES), tmp_path_factory.mktemp("proven") / "cert.json"
    prove_optout(model, "zinc", out, house.trusted, owner_keys["Ann"], **LITTLE)
    return model, out


# --- what is compared ---------------------------------------------------------------------------


def test_the_inputs_that_follow_from_a_seed_never_change():
    """A certificate must be checked years later, on another machine."""
    # printf '7 random' | openssl dgst -shake256 -xoflen 16
    drawn = bytes.fromhex("343c01597f2dc44531c4e91fd282380a")
    assert compare.draw(7, "random", 2).tobytes() == drawn
    expected = [[], ["a", "b", "c"], ["b"], ["a", "b"]]
    assert compare.draw_subsets(["a", "b", "c"], 4, seed=7) == expected


@given(size=st.integers(0, 12), most=st.one_of(st.none(), st.integers(1, 70)), seed=st.integers(0))
def test_subsets_are_different_and_as_many_as_asked_for(size, most, seed):
    names = [f"n{i}" for i in range(size)]
    found = compare.draw_subsets(names, most, seed)
    count = 2**size if most is None else min(most, 2**size)
    assert len({frozenset(s) for s in found}) == len(found) == count
    assert all(set(s) <= set(names) and len(set(s)) == len(s) for s in found)
    assert [] in found
    assert count == 1 or names in found


def test_too_many_subsets_are_refused():
    names = [f"n{i}" for i in range(17)]
    with pytest.raises(ConfigError, match=r"131072 sets.*at most 65536"):
        compare.draw_subsets(names, None, 0)
    assert len(compare.draw_subsets(names * 5, 100, 0)) == 100


def test_random_sequences_begin_a_text_and_may_hold_every_token(house):
    model = house.mixture(NAMES).model
    found = compare.random_sequences(model, 600, seed=1)
    eos, size = model.config.eos_token_id, model.config.vocab_size
    assert {len(s) for s in found} == {10} and {s[0] for s in found} == {eos}
    inner = [i for s in found for i in s[1:]]
    assert set(inner) == set(range(size))
    assert 0.05 < inner.count(eos) / len(inner) < 0.08
    assert found != compare.random_sequences(model, 600, seed=2)


def test_claimed_sequences_are_of_what_the_table_claims_most(house):
    model = house.mixture(NAMES).model
    table = model.router.table("zinc").table
    size, most = model.config.vocab_size, compare.MOST_CLAIMED
    least = sorted(table.token_levels.tolist())[-most]
    least_pair = sorted(table.pair_levels.tolist())[-most]
    tokens = {t for t, level in enumerate(table.token_levels.tolist()) if level >= least}
    levels = dict(zip(table.keys.tolist(), table.pair_levels.tolist(), strict=True))
    found = compare.claimed_sequences(model, "zinc", 40, seed=1)
    assert {len(s) for s in found} == {10} and {s[0] for s in found} == {model.config.eos_token_id}
    pairs = 0
    for sequence in found:
        at = 1
        while at < 9:
            is_pair = levels.get(sequence[at] * size + sequence[at + 1], -999) >= least_pair
            assert is_pair or sequence[at] in tokens
            pairs += is_pair
            at += 1 + is_pair
    assert pairs > 40
    assert compare.claimed_sequences(house.mixture(NAMES, "linear").model, "zinc", 4, 1) == []


def test_texts_are_compared_to_their_last_token(house):
    mixture = house.mixture(NAMES)
    texts = ["word " * 40, "a", "two words"]
    found = compare.text_sequences(mixture.model, mixture.tokenizer, texts)
    assert max(map(len, found)) == 10 and {s[0] for s in found} == {mixture.tokenizer.eos_id}
    expected = [i for ids in mixture.tokenizer.encode_batch(texts) for i in ids]
    assert [i for s in found for i in s[1:]] == expected


def test_the_digest_is_of_all_logits_as_a_reader_computes_them(house, monkeypatch):
    monkeypatch.setattr(compare, "WAYS", {"states": ("states", "whole")})
    whole, never = house.mixture(NAMES), house.mixture(OTHERS)
    texts = [[0, 5, 7, 9, 11], [0, 3, 4], [0, 8]]
    found = compare.compare_mixtures(whole, never, "zinc", [["amber"]], {"given": texts})
    reader, expected = OwnReader(never.model, never.tokenizer), hashlib.sha256()
    with torch.inference_mode():
        for batch in (texts[:2], texts[2:]):
            for rows in (batch, batch * 2):
                ids, is_token = pad_left(rows)
                padding = None if is_token is None else is_token[:, :-1]
                state = reader.new_state([["amber"]] * len(rows))
                first = reader.read(ids[:, :-1], state, is_token=padding, last=99)
                second = reader.read(ids[:, -1:], state, last=1)
                logits = torch.cat([first, second], 1)[: len(batch)]
                expected.update(logits.numpy().tobytes())
    assert found.inputs["given"].logits == f"sha256:{expected.hexdigest()}"
    assert (found.tokens, found.positions) == (10, 10)


# --- building anew ------------------------------------------------------------------------------


opened: list[str] = []


def _watch(event, args):
    if event == "open":
        opened.append(str(args[0]))


def test_the_mixture_is_rebuilt_without_opening_a_file_of_the_expert(house, tmp_path):
    sys.addaudithook(_watch)  # stays until the process ends, and slows every open
    model = house.build(NAMES, tmp_path / "m", top_k=2)
    opened.clear()
    rebuild_mixture(model, OTHERS, tmp_path / "anew", house.trusted)
    load_mixture(tmp_path / "anew", house.trusted)
    assert any("amber" in path for path in opened) and not any("zinc" in path for path in opened)
    shutil.rmtree(model / "experts/zinc.bundle")
    rebuild_mixture(model, OTHERS, tmp_path / "again", house.trusted)
    expected = tree(house.mixture_dir(OTHERS, top_k=2))
    assert tree(tmp_path / "anew") == tree(tmp_path / "again") == expected


def test_nothing_is_left_beside_the_mixture(house, owner_keys, tmp_path):
    model = house.build(["amber"], tmp_path / "m")
    before = tree(tmp_path)
    prove_optout(model, "amber", tmp_path / "c", house.trusted, owner_keys["Ann"], **LITTLE)
    after = tree(tmp_path)
    assert after.pop("c") and after == before and len([*tmp_path.iterdir()]) == 2


# --- certificates -------------------------------------------------------------------------------


@pytest.mark.parametrize(("router", "top_k"), [("evidence", None), ("rich", 2), ("linear", 2)])
def test_a_certificate_holds_for_its_mixture_before_and_after_the_removal(
    house, try_to_prove, tmp_path, router, top_k
):
    model = house.build(NAMES, tmp_path / "m", router, top_k)
    path = try_to_prove(model)
    found = verify_optout(path, model, house.trusted)
    compared = found.certificate.findings.compared
    assert (found.signer, found.is_removed, found.not_repeated) == ("Ann", False, [])
    assert found.has_same_logits and found.compared == compared
    assert compared.subsets == [[], ["amber", "basalt"]]
    assert 0.2 < compared.changed_positions / compared.positions <= 1
    remove_experts(model, ["zinc"], house.trusted)
    found = verify_optout(path, model, house.trusted)
    claimed = [] if router == "linear" else ["claimed"]
    assert (found.is_removed, found.not_repeated) == (True, claimed)
    assert found.has_same_logits and found.compared.changed_positions is None


def test_an_expert_alone_with_the_anchor_is_proven_too(house, try_to_prove):
    path = try_to_prove(house.mixture_dir(["amber"], "linear"), "amber")
    findings = read_certificate(path)[0].findings
    assert (findings.compared.subsets, findings.mixture.experts) == ([[]], {})


def test_a_certificate_says_where_every_number_comes_from(house, proven):
    model, path = proven
    found = read_certificate(path)[0].findings
    facts, loaded = found.mixture, house.mixture(NAMES)
    files = {f"anchor/{name}": d for name, d in facts.anchor.files.items()}
    for name, bundle in [*facts.experts.items(), ("zinc", found.bundle)]:
        files |= {f"experts/{name}.bundle/{file}": d for file, d in bundle.files.items()}
        tensors = house.tensors(name, "evidence")
        assert (bundle.tensors, bundle.numbers) == (
            len(tensors),
            sum(t.numel() for t in tensors.values()),
        )
    on_disk = {name: digest_bytes(data) for name, data in tree(model).items()}
    del on_disk["mixture.json"]
    assert files == on_disk
    assert (facts.router, facts.top_k) == (loaded.about["router"], None)
    anchor = house.anchor.model.state_dict().values()
    tables = [t for m in (house.anchor.public, *house.anchor.forms) for t in vars(m).values()]
    assert facts.anchor.numbers >= sum(t.numel() for t in anchor) + sum(t.size for t in tables)
    assert {x.training for x in facts.experts.values()} == {"beside the anchor"}


def test_a_certificate_speaks_of_the_expert_and_of_what_it_does_not_cover(proven):
    words = read_certificate(proven[1])[0].words
    assert len(words.declared) == 2 and "Ann, by signature: the expert amber" in words.declared[0]
    assert any("As a control zinc was switched on" in line for line in words.proven)
    for part in (
        "Side channels",
        "Answers that were given",
        "Copies",
        "anchor",
        "top_k",
        "Routers",
    ):
        assert any(part in line for line in words.not_covered), part


def test_limits_of_influence_are_told_as_not_covered(house, try_to_prove, tmp_path):
    """They were measured with the expert there; what is built anew knows nothing of them."""

    def judge(mixture, newcomers):
        found = {"limits": {}, "public_digest": "sha256:" + "1" * 64, "seed": 0, "seq_len": 9}
        return found | {"experts": {}, "together": None}

    model = tmp_path / "m"
    bundles = house.bundles(["amber", "zinc"])
    build_mixture(house.anchor_dir, bundles, model, house.trusted, admission=judge)
    rebuild_mixture(model, ["amber"], tmp_path / "anew", house.trusted)
    assert tree(tmp_path / "anew") == tree(house.mixture_dir(["amber"]))
    words = read_certificate(try_to_prove(model, most_subsets=1))[0].words
    assert words.not_covered[-1].startswith("Admission: this mixture keeps limits of influence")


def test_given_texts_are_compared_and_stay_where_they_are(house, try_to_prove, tmp_path):
    texts, other = tmp_path / "texts", tmp_path / "other"
    texts.write_text("A very secret line.\n\nAnother line, longer.\n")
    other.write_text("A very secret line.\n")
    model = house.mixture_dir(NAMES)
    path = try_to_prove(model, texts=texts, most_subsets=1)
    assert "secret" not in path.read_text()
    found = verify_optout(path, model, house.trusted, texts=texts)
    assert found.has_same_logits and found.not_repeated == []
    assert found.compared.inputs["given"].sequences > 2
    assert verify_optout(path, model, house.trusted).not_repeated == ["given"]
    with pytest.raises(ProofError, match=r"other has digest"):
        verify_optout(path, model, house.trusted, texts=other)
    for bad in (b"", b" \n\n", b"\xff\n"):
        other.write_bytes(bad)
        with pytest.raises(ConfigError, match=r"other.*text"):
            verify_optout(path, model, house.trusted, texts=other)


def test_a_certificate_is_never_overwritten(house, try_to_prove, tmp_path):
    (tmp_path / "cert.json").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        try_to_prove(house.mixture_dir(NAMES))
    assert (tmp_path / "cert.json").read_text() == "mine"


def test_an_expert_that_the_mixture_does_not_hold_gets_none(house, try_to_prove):
    with pytest.raises(ProofError, match="no expert nickel: it holds amber, basalt, zinc"):
        try_to_prove(house.mixture_dir(NAMES), "nickel")


# --- mutants: programs in which zinc leaks ------------------------------------------------------


def leak_from_the_table(patch):
    """The router reads the table of an expert that is off."""
    right = EvidenceRouter.evidence

    def wrong(self, before, ids):
        found = right(self, before, ids)
        if "zinc" in self.names:
            found[1:] += 1e-4 * found[-1]
        return found

    patch.setattr(EvidenceRouter, "evidence", wrong)


def leak_as_a_multiple_of_zero(patch):
    """An expert that is off is weighed by 0 and holds NaN."""
    right = MixtureModel.forward

    def wrong(self, ids, **options):
        found = right(self, ids, **options)
        return found + 0 * torch.nan if "zinc" in self.expert_names else found

    patch.setattr(MixtureModel, "forward", wrong)


def leak_in_the_sign_of_zero(patch):
    right = MixtureModel.forward

    def wrong(self, ids, **options):
        found = right(self, ids, **options) * 0.0
        return -found if "zinc" in self.expert_names else found

    patch.setattr(MixtureModel, "forward", wrong)


def leak_while_writing(patch):
    """Tokens read from a cache see every expert."""
    right = Cache.keep_mask

    def wrong(self, active):
        kept = right(self, active)
        return None if self.num_positions else kept

    patch.setattr(Cache, "keep_mask", wrong)


def leak_between_texts(patch):
    """Whoever is on for one text of a batch is on for all."""
    right = EvidenceRouter.forward

    def wrong(self, ids, is_token, active, past):
        if active is not None:
            active = active.any(0, keepdim=True).expand_as(active)
        return right(self, ids, is_token, active, past)

    patch.setattr(EvidenceRouter, "forward", wrong)


def leak_where_nobody_has_it_on(patch):
    right = EvidenceRouter.forward

    def wrong(self, ids, is_token, active, past):
        if self.names[-1] == "zinc" and not active[:, -1].any():
            active = torch.ones_like(active)
        return right(self, ids, is_token, active, past)

    patch.setattr(EvidenceRouter, "forward", wrong)


def leak_from_panels(patch):
    right = Mixture.forward

    def wrong(self, h, ctx):
        found = right(self, h, ctx)
        return found * 1.0001 if ctx.panels and "expert_zinc" in self.experts else found

    patch.setattr(Mixture, "forward", wrong)


def leak_from_probabilities(patch):
    right = ProbabilityMixture.forward

    def wrong(self, ids, **options):
        found = right(self, ids, **options)
        return found * 1.0001 if "zinc" in self.expert_names else found

    patch.setattr(ProbabilityMixture, "forward", wrong)


def leak_while_served(patch):
    right = MixtureModel.read_spans

    def wrong(self, *args):
        x, ctx = right(self, *args)
        return (x * 1.0001 if "zinc" in self.expert_names else x), ctx

    patch.setattr(MixtureModel, "read_spans", wrong)


def leak_between_served_texts(patch):
    """Whoever is on for one text of a step is on for all."""
    right = Spans.__init__

    def wrong(self, *args):
        right(self, *args)
        self.active = self.active.any(0, keepdim=True).expand_as(self.active).contiguous()

    patch.setattr(Spans, "__init__", wrong)


def leak_through_memory(patch):
    """A text reads the keys and values that another has put in its place."""
    right = Text.next_spans

    def wrong(self, *args):
        spans = right(self, *args)
        for span in spans:
            span.place = 0
        return spans

    patch.setattr(Text, "next_spans", wrong)


@pytest.mark.parametrize(
    ("leak", "where"),
    [
        (leak_from_the_table, "trace.*random sequences, read as states, with amber, basalt on"),
        (leak_as_a_multiple_of_zero, "trace.*read as states, with"),
        (leak_in_the_sign_of_zero, "trace.*read as states, with"),
        (leak_while_writing, "after 1 of 10 positions.*read as states, with amber, basalt on"),
        (leak_between_texts, "trace.*read as states, .*beside texts with it on"),
        (leak_where_nobody_has_it_on, r"trace.*read as states, with amber, basalt on\.$"),
        (leak_from_panels, "trace.*read as states, from panels"),
        (leak_from_probabilities, "trace.*read as probabilities"),
        (leak_while_served, r"trace.*as served, with nobody else on\.$"),
        (leak_between_served_texts, "trace.*as served, .*beside texts with it on"),
        (leak_through_memory, "trace.*as served, .*beside texts with it on"),
    ],
)
def test_a_program_in_which_the_expert_leaks_gets_none(
    house, try_to_prove, tmp_path, monkeypatch, leak, where
):
    leak(monkeypatch)
    with pytest.raises(ProofError, match=where):
        try_to_prove(house.mixture_dir(NAMES))
    assert not [*tmp_path.iterdir()]


def test_a_program_in_which_the_expert_leaks_verifies_none(house, proven, monkeypatch):
    leak_between_texts(monkeypatch)
    with pytest.raises(ProofError, match="trace"):
        verify_optout(proven[1], proven[0], house.trusted)


@contextmanager
def loading(patch, change):
    """Let `change` do something to the mixtures that are loaded."""

    def load(*args):
        loaded = load_mixture(*args)
        change(loaded)
        return loaded

    patch.setattr(prove, "load_mixture", load)
    yield


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda m: m.norm.weight.data[0].add_(1e-6), "norm.weight: other numbers"),
        (lambda m: m.layers[1].self_attn.o_proj.weight.data[0, 0].mul_(-1), "layers.1.self_attn"),
        (lambda m: m.router.public.backoff[3].sub_(1), "router.public.backoff: other"),
        (lambda m: m.router.table("amber").pairs[0].add_(1), "expert_amber.pairs: other"),
        (lambda m: m.register_buffer("more", torch.zeros(1)), "more: in one of the two alone"),
        (lambda m: setattr(m, "top_k", 1), "top_k: 1 and None"),
    ],
)
def test_a_number_in_memory_that_changes_with_the_expert_is_found(
    house, try_to_prove, monkeypatch, change, line
):
    def if_there(loaded):
        if "zinc" in loaded.expert_names:
            change(loaded.model)

    with (
        loading(monkeypatch, if_there),
        pytest.raises(ProofError, match=f"Beside zinc, memory does not hold(.|\n)*{line}"),
    ):
        try_to_prove(house.mixture_dir(NAMES))


def test_numbers_that_no_owner_signed_are_found(house, try_to_prove, monkeypatch):
    def tune(loaded):
        expert_tensors(loaded.model, "amber")["layers.0.down_proj.weight"].data[0, 0] += 1e-6

    with (
        loading(monkeypatch, tune),
        pytest.raises(ProofError, match=r"amber: layers\.0\.down_proj\.weight in memory is not"),
    ):
        try_to_prove(house.mixture_dir(NAMES))


@pytest.mark.parametrize("token", [0, 1])
def test_rows_of_a_head_that_do_not_follow_from_what_was_signed_are_found(
    house, try_to_prove, monkeypatch, token
):
    """Token 0 is one that the table does not tell of, whose row moves with others."""

    def tune(loaded):
        expert_tensors(loaded.model, "amber")["lm_head.lora_b"].data[token, 0] += 1e-6

    with (
        loading(monkeypatch, tune),
        pytest.raises(ProofError, match=r"amber: lm_head\.lora_b in memory is not what"),
    ):
        try_to_prove(house.mixture_dir(NAMES, "rich"))


def test_numbers_finer_than_their_owner_signed_are_found(
    house, try_to_prove, monkeypatch, tmp_path
):
    """Deltas signed in bfloat16 are widened; what is below its last digit must stay 0."""
    tensors = house.tensors("amber", "rich")
    halves = {n: t.bfloat16() if ".lora_" in n else t for n, t in tensors.items()}
    key = next(n for n in halves if ".lora_a" in n)
    own, model = house.write(tmp_path, "amber", halves, "rich"), tmp_path / "m"
    build_mixture(house.anchor_dir, [own, house.bundle("zinc", "rich")], model, house.trusted)

    def tune(loaded):
        expert_tensors(loaded.model, "amber")[key].data.mul_(1 + 1e-6)

    with (
        loading(monkeypatch, tune),
        pytest.raises(ProofError, match=f"amber: {key} in memory is not what its owner signed"),
    ):
        try_to_prove(model)
    monkeypatch.undo()
    assert try_to_prove(model, most_subsets=1).exists()


def test_rows_of_a_router_tuned_after_merging_are_found(house, try_to_prove, monkeypatch):
    def tune(loaded):
        expert_tensors(loaded.model, "basalt")["layers.1.router.weight"].data[0, 3] *= -1

    with (
        loading(monkeypatch, tune),
        pytest.raises(ProofError, match=r"basalt: layers\.1\.router\.weight in memory is not"),
    ):
        try_to_prove(house.mixture_dir(NAMES, "linear"))


def test_logits_that_are_no_numbers_are_refused(house, try_to_prove, monkeypatch):
    def spoil(loaded):
        loaded.model.lm_head.weight.data[0] = torch.nan

    with loading(monkeypatch, spoil), pytest.raises(ProofError, match="NaN or infinity"):
        try_to_prove(house.mixture_dir(NAMES))


def test_an_expert_without_effect_proves_nothing(house, try_to_prove, monkeypatch):
    right = MixtureModel.expert_mask

    def never_on(self, enabled):
        return right(self, [[n for n in names if n != "zinc"] for names in enabled])

    monkeypatch.setattr(MixtureModel, "expert_mask", never_on)
    with pytest.raises(ProofError, match=r"zinc changed no number(.|\n)*--texts"):
        try_to_prove(house.mixture_dir(NAMES))


# --- what another's bundle must say -------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"imported_from": "FlexOlmo-7x7B"}, "amber: it was imported.*tuned on all its experts"),
        ({}, "amber: its bundle does not say how"),
        (STATED | {"teacher": "zinc"}, "amber: its bundle does not say how"),
        *(
            ({k: v for k, v in STATED.items() if k != key}, "amber: its bundle does not say how")
            for key in STATED
        ),
        (STATED | {"replay": 2}, "amber: its bundle does not say how"),
    ],
)
def test_an_expert_that_may_depend_on_others_bars_the_certificate(
    house, try_to_prove, tmp_path, recipe, why
):
    own = house.write(
        tmp_path, "amber", house.tensors("amber", "evidence"), "evidence", recipe=recipe
    )
    model = tmp_path / "m"
    build_mixture(house.anchor_dir, [own, house.bundle("zinc")], model, house.trusted)
    with pytest.raises(ProofError, match=why):
        try_to_prove(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "trained beside the anchor, from the public anchor and Ann's own text. The"),
        ({"beside_anchor": False}, "trained alone, from the public anchor and Ann's own text. The"),
        ({"replay": 0.1, "healed": [{}]}, "beside the anchor.*own text and public text. The"),
    ],
)
def test_what_an_owner_declares_is_told(house, try_to_prove, tmp_path, change, said):
    recipe = STATED | change
    own = house.write(
        tmp_path, "amber", house.tensors("amber", "evidence"), "evidence", recipe=recipe
    )
    build_mixture(house.anchor_dir, [own, house.bundle("zinc")], tmp_path / "m", house.trusted)
    (line,) = read_certificate(try_to_prove(tmp_path / "m"))[0].words.declared
    assert re.search(said, line)


# --- certificates that do not hold --------------------------------------------------------------


def leaves(value, where=()):
    """Paths of all values in JSON that are neither lists nor objects."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*where, key))
    else:
        yield where


def replaced(value, where, new):
    """`value` with `new` at the path `where`; `new` None: without what is there."""
    value = copy.deepcopy(value)
    inner = value
    for key in where[:-1]:
        inner = inner[key]
    if new is None:
        del inner[where[-1]]
    else:
        inner[where[-1]] = new
    return value


def altered(old):
    return {bool: lambda: not old, int: lambda: old + 1, str: lambda: old + "x"}.get(
        type(old), lambda: 1
    )()


@given(data=st.data())
@settings(IN_SESSION, max_examples=150)
def test_a_certificate_in_which_anything_was_altered_is_none(proven, tmp_path_factory, data):
    whole = json.loads(proven[1].read_text())
    where = data.draw(st.sampled_from(list(leaves(whole))))
    old = whole
    for key in where:
        old = old[key]
    changed = replaced(whole, where, data.draw(st.sampled_from([altered(old), None])))
    path = tmp_path_factory.mktemp("altered") / "c.json"
    path.write_text(json.dumps(changed))
    with pytest.raises(ProofError, match=r"c\.json is no certificate"):
        read_certificate(path)


def sign_again(whole, key, path):
    """Sign whatever is in the certificate, as a careless or dishonest signer could."""
    private = read_private_key(key)
    digests = {"certificate.json": digest_bytes(canonical_json(whole["certificate"]))}
    whole["signature"] = json.loads(sign_files("opt-out certificate", digests, private))
    whole["signer"] = encode_public(private).decode()
    path.write_text(json.dumps(whole))
    return path


@pytest.mark.parametrize(
    ("where", "new", "why"),
    [
        (("words", "not_covered", 0), "Nothing.", "in words what does not follow"),
        (("words", "proven", 2), None, "in words what does not follow"),
        (("findings", "created"), 7, r"version 1(.|\n)*findings\.created"),
        (("format_version",), 3, r"version 1(.|\n)*format_version"),
        (("more",), "text", r"version 1(.|\n)*more"),
        (("findings", "plan", "num_random"), 10**9, r"version 1(.|\n)*num_random"),
    ],
)
def test_what_does_not_follow_from_the_findings_is_refused_though_signed(
    proven, owner_keys, tmp_path, where, new, why
):
    whole = json.loads(proven[1].read_text())
    whole = replaced(whole, ("certificate", *where), new)
    with pytest.raises(ProofError, match=why):
        read_certificate(sign_again(whole, owner_keys["Ann"], tmp_path / "c.json"))


@pytest.mark.parametrize(
    ("where", "new", "why"),
    [
        (("compared", "subsets", 1), None, "subsets: found .*amber.*, the certificate says"),
        (("compared", "inputs", "claimed"), None, "claimed: found .*, the certificate says none"),
        (("compared", "inputs", "random", "tokens"), 999, "tokens: found 10, the certificate says"),
        (("plan", "seed"), 6, "random, ids: found"),
        (("mixture", "top_k"), 3, "top_k: found None, the certificate says 3"),
        (("mixture", "experts", "amber", "training"), "alone", "amber, training: found beside"),
        (("mixture", "experts", "basalt"), None, "basalt: found .*, the certificate says none"),
        (("bundle", "owner"), "Ann", "zinc, owner: found Bob, the certificate says Ann"),
    ],
)
def test_findings_that_are_not_found_again_are_refused_though_signed(
    house, proven, owner_keys, tmp_path, where, new, why
):
    whole = json.loads(proven[1].read_text())
    whole = replaced(whole, ("certificate", "findings", *where), new)
    findings = Findings.model_validate(whole["certificate"]["findings"])
    whole["certificate"]["words"] = write_words(findings).model_dump()
    path = sign_again(whole, owner_keys["Ann"], tmp_path / "c.json")
    with pytest.raises(ProofError, match=why):
        verify_optout(path, proven[0], house.trusted)


def test_a_certificate_of_the_version_before_holds_for_what_it_compared(
    house, proven, owner_keys, tmp_path, monkeypatch
):
    ways = {way: how for way, how in compare.WAYS.items() if way != "states, as served"}
    with monkeypatch.context() as patch:
        patch.setattr(compare, "WAYS", ways)
        prove_optout(proven[0], "zinc", tmp_path / "c", house.trusted, owner_keys["Ann"], **LITTLE)
    whole = json.loads((tmp_path / "c").read_text())
    whole["certificate"]["format_version"] = 1
    path = sign_again(whole, owner_keys["Ann"], tmp_path / "c1")
    found = verify_optout(path, proven[0], house.trusted)
    assert found.has_same_logits and found.compared.ways == list(ways)
    assert "read in 3 ways" in " ".join(found.certificate.words.proven)
    assert "as served" in " ".join(read_certificate(proven[1])[0].words.proven)
    for version, source in ((2, tmp_path / "c"), (1, proven[1])):  # neither names another's ways
        whole = json.loads(source.read_text())
        whole["certificate"]["format_version"] = version
        path = sign_again(whole, owner_keys["Ann"], tmp_path / f"as{version}")
        with pytest.raises(ProofError, match="ways: found"):
            verify_optout(path, proven[0], house.trusted)


def test_other_arithmetic_is_told_and_no_failure(house, proven, owner_keys, tmp_path):
    whole = json.loads(proven[1].read_text())
    where = ("certificate", "findings", "compared", "inputs", "random", "logits")
    whole = replaced(whole, where, "sha256:" + "0" * 64)
    path = sign_again(whole, owner_keys["Ann"], tmp_path / "c.json")
    assert not verify_optout(path, proven[0], house.trusted).has_same_logits


def test_a_signature_over_something_else_is_none_over_a_certificate(proven, owner_keys, tmp_path):
    """Of a bundle, say, whose file has the certificate's digest."""
    whole = json.loads(proven[1].read_text())
    private = read_private_key(owner_keys["Ann"])
    digest = digest_bytes(canonical_json(whole["certificate"]))
    for subject, digests in (
        ("zinc.bundle", {"certificate.json": digest}),
        ("opt-out certificate", {"manifest.json": digest}),
        ("opt-out certificate", {"certificate.json": digest, "more": digest}),
    ):
        whole["signature"] = json.loads(sign_files(subject, digests, private))
        path = tmp_path / "c.json"
        path.write_text(json.dumps(whole))
        with pytest.raises(ProofError, match="not what was signed"):
            read_certificate(path)


def test_only_the_signers_that_are_trusted_count(house, proven, owner_keys, tmp_path):
    model, path = proven
    only_bob = TrustedOwners.from_keys({"Bob": owner_keys["Bob"].with_suffix(".pub").read_bytes()})
    for trusted, signer in ((None, None), (only_bob, None)):
        with pytest.raises(ProofError, match=r"unknown key sha256:.*(.|\n)*--signer"):
            verify_optout(path, model, trusted, signer=signer)
    bob, ann = (owner_keys[n].with_suffix(".pub") for n in ("Bob", "Ann"))
    with pytest.raises(ProofError, match=r"signed by the key sha256.*Bob\.pub is the key"):
        verify_optout(path, model, house.trusted, signer=bob)
    with pytest.raises(SignatureError, match=r"^Nobody was said to be trusted"):
        verify_optout(path, model, None, signer=ann)
    assert verify_optout(path, model, ANY_SIGNER, signer=ann).signer is None
    assert verify_optout(path, model, ANY_SIGNER).signer is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b'{"certificate": {}, "signature": {}, "signer": ""}',
        b'{"certificate": {}, "signature": [], "signer": 3}',
        b'{"certificate": {}, "certificate": {}}',
        b"[" * 5000,
        b"\xff",
        b'{"certificate": {}, "signature": {"dsseEnvelope": NaN}, "signer": "\\ud800"}',
    ],
)
def test_a_file_that_is_no_certificate_is_refused_in_a_sentence(tmp_path, data):
    (tmp_path / "c.json").write_bytes(data)
    with pytest.raises(ProofError, match=r"c\.json is no certificate"):
        read_certificate(tmp_path / "c.json")


def test_a_file_that_is_too_large_is_not_read(house, proven, tmp_path, monkeypatch):
    (tmp_path / "texts").write_text("words\n" * 10)
    monkeypatch.setattr(prove, "MAX_TEXTS_BYTES", 50)
    with pytest.raises(ConfigError, match=r"in at most 50 bytes"):
        verify_optout(proven[1], proven[0], house.trusted, texts=tmp_path / "texts")
    monkeypatch.setattr(certificate, "MAX_CERTIFICATE_BYTES", 1000)
    with pytest.raises(ProofError, match="more than 1000 bytes"):
        read_certificate(proven[1])


def test_nothing_stands_beside_what_was_signed(proven, tmp_path):
    whole = json.loads(proven[1].read_text()) | {"remark": "All is well."}
    (tmp_path / "c.json").write_text(json.dumps(whole))
    with pytest.raises(ProofError, match="not what was signed"):
        read_certificate(tmp_path / "c.json")


# --- mixtures of which a certificate does not speak ---------------------------------------------


def swap_a_bundle(house, model):
    """Another bundle of the same owner and name, as validly signed."""
    tensors = house.tensors("amber", "evidence")
    tensors["layers.0.up_proj.weight"] = tensors["layers.0.up_proj.weight"] * 1.01
    swap(house, model, "amber", tensors)


def swap_the_expert(house, model):
    tensors = house.tensors("zinc", "evidence")
    tensors["layers.0.up_proj.weight"] = tensors["layers.0.up_proj.weight"] * 1.01
    swap(house, model, "zinc", tensors)


def swap(house, model, name, tensors):
    bundle = house.write(model.parent, name, tensors, "evidence", serial=2)
    remove_experts(model, [name], house.trusted)
    add_experts(model, [bundle], house.trusted)


def damage_a_bundle(house, model):
    flip(model / "experts/amber.bundle/expert.safetensors", 0.9, 4)


def swap_files_behind_the_index(house, model):
    bundle = house.write(model.parent, "amber", house.tensors("coal", "evidence"), "evidence")
    shutil.rmtree(model / "experts/amber.bundle")
    bundle.rename(model / "experts/amber.bundle")


def add_an_expert(house, model):
    add_experts(model, [house.bundle("nickel")], house.trusted)


def remove_another(house, model):
    remove_experts(model, ["basalt"], house.trusted)


def add_to_the_anchor(house, model):
    (model / "anchor/README.md").write_text("Another text.")


def change_top_k(house, model):
    about = json.loads((model / "mixture.json").read_text())
    (model / "mixture.json").write_text(json.dumps(about | {"top_k": 2}))


@pytest.mark.parametrize(
    ("change", "is_removed", "why"),
    [
        (swap_a_bundle, False, r"experts, amber, files, expert\.safetensors: found sha256"),
        (swap_a_bundle, True, r"experts, amber, files, expert\.safetensors: found sha256"),
        (swap_the_expert, False, r"zinc, files, expert\.safetensors: found sha256"),
        (damage_a_bundle, True, r"speaks of\. .*amber\.bundle was refused"),
        (swap_files_behind_the_index, False, r"speaks of\. .*amber\.bundle was refused"),
        (add_an_expert, True, "experts, nickel: found .*, the certificate says none"),
        (remove_another, False, "experts, basalt: found none"),
        (add_to_the_anchor, True, r"anchor, files, README\.md: found sha256.*says none"),
        (change_top_k, True, "top_k: found 2, the certificate says None"),
    ],
)
def test_a_certificate_holds_for_no_other_mixture(house, proven, tmp_path, change, is_removed, why):
    model = house.build(NAMES, tmp_path / "m")
    if is_removed:
        remove_experts(model, ["zinc"], house.trusted)
    change(house, model)
    with pytest.raises(ProofError, match=why):
        verify_optout(proven[1], model, house.trusted)


def test_a_mixture_that_changes_while_it_is_read_is_found(
    house, try_to_prove, tmp_path, monkeypatch
):
    model = house.build(NAMES, tmp_path / "m")

    def change_before_the_second(loaded):
        if "zinc" not in loaded.expert_names:
            change_top_k(house, model)

    with (
        loading(monkeypatch, change_before_the_second),
        pytest.raises(ProofError, match="was changed meanwhile"),
    ):
        try_to_prove(model)
