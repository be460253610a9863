import pytest

from made_mixtures import House


@pytest.fixture(scope="session")
def house(wild, owner_keys, tmp_path_factory) -> House:
    """An anchor with large random weights, two owners, and a workshop for bundles."""
    return House(wild, owner_keys, tmp_path_factory.mktemp("house"))
