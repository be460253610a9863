"""A small prepared public set that the tests of this room share."""

from pathlib import Path

import pytest
from made_sets import SMALL, made_text, write_raw

from flexolmo.data.prepare import prepare_set


@pytest.fixture(scope="session")
def public_set(tmp_path_factory) -> Path:
    """A prepared public set of 60 documents with a tokenizer of 300 entries."""
    here = tmp_path_factory.mktemp("public")
    raw = write_raw(here, "public", [made_text(i) for i in range(60)])
    prepare_set(raw, here / "prepared", settings=SMALL)
    return here / "prepared"
