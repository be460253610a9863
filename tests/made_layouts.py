"""Layouts of matrices, each as the one that models choose, and what they hold."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from flexolmo.model.onednn import IS_FASTER
from flexolmo.model.packed import PACKED, Packed
from flexolmo.model.panels import IN_PANELS, Layout, Products
from flexolmo.model.transformer import Linear

# packed matrices are made, and tried, on the processors alone for which they are
LAYOUTS = [IN_PANELS, *([PACKED] if IS_FASTER else [])]


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexolmo.model.transformer.LAYOUT", layout)
        yield


def numbers_of(products: Products) -> list[Tensor]:
    """All that is held beside the matrices, where it can be looked into."""
    if isinstance(products, Packed):
        panels = [products.panels] if "panels" in vars(products) else []
        return [products.packed.to_dense(), *panels]
    return [products.matrix, products.panels]


def linears(widths: Sequence[int], d_in: int, draw: torch.Generator) -> list[Linear]:
    """Random matrices, as a model holds them."""
    found = [Linear(d_in, width) for width in widths]
    for m in found:
        m.weight.data.copy_(torch.randn(m.weight.shape, generator=draw))
    return found
