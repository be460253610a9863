"""Under a document mask a document's logits are the same whatever stands before it."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from flexolmo.errors import PolicyError
from flexolmo.inference.decode import continue_ids
from flexolmo.inference.reader import OwnReader
from flexolmo.inference.sampling import Sampling
from flexolmo.model.checkpoint import load_anchor, save_anchor
from flexolmo.model.loss import language_model_loss
from flexolmo.model.router import DiscriminantSettings, LinearSettings
from flexolmo.model.statistics import EvidenceSettings

ROUTERS = {
    "evidence": EvidenceSettings(),
    "linear": LinearSettings(),
    "discriminant": DiscriminantSettings(has_context=True),
}
EOS = 0


@pytest.fixture(scope="module", params=["anchor", *ROUTERS])
def models(request, make_wild):
    """The same model with a document mask and without."""
    found = []
    for has_mask in (True, False):
        wild = make_wild(document_mask=has_mask)
        if request.param == "anchor":
            found.append(wild.anchor.model)
        else:
            router = ROUTERS[request.param]
            shapes = None if request.param == "discriminant" else wild.rich_shapes(router, "ab")
            found.append(wild.mixture(router, "ab", shapes=shapes))
    return found


def documents(wild, *lengths):
    """Each an end of text and then tokens."""
    return [
        torch.cat([torch.tensor([[EOS]]), wild.ids(1, n, seed=n, eos_every=10**9).clamp(min=1)], 1)
        for n in lengths
    ]


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@torch.no_grad()
def test_a_document_reads_the_same_whatever_stands_before_it(models, wild):
    masked, open_ = models
    one, two, three = documents(wild, 7, 12, 9)
    packed = torch.cat([one, two, three], dim=1)
    same(masked(packed), torch.cat([masked(d) for d in (one, two, three)], dim=1))
    same(masked(two), open_(two))  # a text alone is read as without a mask
    assert (open_(packed)[:, 8:] - masked(packed)[:, 8:]).abs().max() > 0.1


@torch.no_grad()
def test_also_through_a_cache_and_behind_padding(models, wild):
    masked, _ = models
    one, two = documents(wild, 7, 12)
    packed = torch.cat([one, two], dim=1)
    for cuts in ([0, 5, 8, 9, 21], [0, 8, 21], range(22)):
        cache, pieces = masked.new_cache(), []
        for start, end in itertools.pairwise(cuts):
            pieces.append(masked(packed[:, start:end], cache=cache))
        same(torch.cat(pieces, dim=1)[:, 8:], masked(two))
    padded = torch.cat([packed, torch.nn.functional.pad(two, (8, 0))])  # with the end's id
    is_token = torch.ones_like(padded, dtype=torch.bool)
    is_token[1, :8] = False
    cache = masked.new_cache()
    first = masked(padded[:, :12], is_token=is_token[:, :12], cache=cache)
    found = torch.cat([first, masked(padded[:, 12:], cache=cache.select(torch.tensor([0, 1])))], 1)
    same(found[:, 8:], masked(two).expand(2, -1, -1))


def test_the_loss_of_packed_documents_is_that_of_each(models, wild):
    masked, _ = models
    one, two = documents(wild, 7, 12)
    packed = torch.cat([one, two], dim=1)
    expected = [
        cross_entropy(masked(torch.cat([d, end], 1)[:, :-1])[0], torch.cat([d, end], 1)[0, 1:])
        for d, end in ((one, torch.tensor([[EOS]])), (two[:, :-1], two[:, -1:]))
    ]
    mean = (expected[0] * 8 + expected[1] * 12) / 20
    torch.testing.assert_close(language_model_loss(masked, packed), mean, rtol=0, atol=1e-5)


def test_a_prompt_of_two_documents_is_continued_as_its_last(models, wild):
    masked, _ = models
    one, two = (d[0].tolist() for d in documents(wild, 7, 12))
    reader = OwnReader(masked, wild.anchor.tokenizer)
    sampling = Sampling(max_new_tokens=6, temperature=0)
    found = continue_ids(reader, [one[1:] + two, two[1:]], sampling)
    assert found[0] == found[1] and len(found[0]) > 2


def test_an_anchor_on_disk_keeps_its_mask_and_has_a_digest_of_its_own(make_wild, wild, tmp_path):
    masked = make_wild(document_mask=True).anchor
    save_anchor(masked, tmp_path / "anchor")
    assert load_anchor(tmp_path / "anchor").config.document_mask
    assert masked.digest != wild.anchor.digest
    assert not wild.anchor.config.document_mask


# --- the expert mask of a cache -------------------------------------------------------------------


def test_a_cache_keeps_the_expert_mask_of_its_first_positions(wild):
    model = wild.mixture(EvidenceSettings(), "ab")
    ids = wild.ids(2, 12)
    one, other = model.expert_mask([["a"]] * 2), model.expert_mask([["a"], ["b"]])
    every = model.expert_mask([None] * 2)

    def go_on(first, then):
        cache = model.new_cache()
        model(ids[:, :8], cache=cache, active=first)
        return model(ids[:, 8:], cache=cache, active=then)

    for first, then in ((one, other), (one, every), (None, one), (every, one)):
        with pytest.raises(PolicyError, match="changed after a cache's first positions"):
            go_on(first, then)
    assert torch.equal(go_on(one, None), go_on(one, one.clone()))
    assert torch.equal(go_on(None, every), go_on(None, None))
    whole = model(ids, active=one)[:, 8:]
    torch.testing.assert_close(go_on(one, None), whole, rtol=0, atol=1e-4)
