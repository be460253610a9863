"""An expert read past its router, against a dense model of its matrices."""

import pytest
import torch

from flexolmo.audit.alone import AloneReader
from flexolmo.inference.reader import OwnReader
from flexolmo.model.transformer import Transformer


def read(reader, ids):
    return reader.read(ids, reader.new_state(), last=ids.shape[1])


@pytest.mark.parametrize("router", ["evidence", "linear"])
def test_it_reads_as_the_anchor_with_the_experts_matrices(house, router):
    """The anchor's frame, with the expert's FFN in the place of public's."""
    mixture = house.mixture(["basalt", "code"], router)
    ids = torch.randint(1, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    dense = Transformer(mixture.model.config)
    dense.load_state_dict(house.anchor.model.state_dict())
    for block, own in zip(dense.layers, mixture.model.mixtures(), strict=True):
        block.mlp = own.expert("code")
    expected = dense(ids).float()
    alone = AloneReader(mixture.model, mixture.tokenizer, ["code"])
    torch.testing.assert_close(read(alone, ids), expected, atol=1e-4, rtol=1e-4)


def test_the_mixture_is_as_before_when_it_was_read_past(house):
    mixture = house.mixture(["basalt", "code"])
    ids = torch.randint(1, 250, (2, 30), generator=torch.Generator().manual_seed(1))
    whole = OwnReader(mixture.model, mixture.tokenizer)
    before = read_two(whole, ids)
    read_two(AloneReader(mixture.model, mixture.tokenizer, ["code"]), ids)
    assert read_two(whole, ids).equal(before)


def read_two(reader, ids):
    return reader.read(ids, reader.new_state().select(torch.tensor([0, 0])), last=ids.shape[1])


def test_it_reads_on_from_where_it_was(house):
    mixture = house.mixture(["code"])
    ids = torch.randint(1, 250, (1, 30), generator=torch.Generator().manual_seed(2))
    alone = AloneReader(mixture.model, mixture.tokenizer, ["code"])
    state = alone.new_state()
    alone.read(ids[:, :20], state, last=1)
    found = alone.read(ids[:, 20:], state, last=10)
    torch.testing.assert_close(found, read(alone, ids)[:, 20:], atol=1e-4, rtol=1e-4)
