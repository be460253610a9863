"""Layouts of matrices, each as the one that models choose, and what they hold."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from flexolmo.model.onednn import IS_FASTER
from flexolmo.model.packed import PACKED
from flexolmo.model.panels import IN_PANELS, Layout, Products

# packed matrices are made, and tried, on the processors alone for which they are
LAYOUTS = [IN_PANELS, *([PACKED] if IS_FASTER else [])]


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexolmo.model.transformer.LAYOUT", layout)
        yield


def numbers_of(products: Products) -> list[Tensor]:
    """All that is held, where it can be looked into."""
    return [t.to_dense() if t.is_mkldnn else t for t in vars(products).values()]
