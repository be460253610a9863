import itertools

import pytest

from flexolmo.audit.subjects import open_subjects
from made_attacks import WHOLE, build_attacked


@pytest.fixture
def attacked(house, pico_sets, tmp_path):
    """`attacked(*others)`: the subjects of the owner of the set maths."""
    numbers = itertools.count()

    def make(*others, recipe=WHOLE, **options):
        out = tmp_path / f"model{next(numbers)}"
        build_attacked(house, pico_sets["maths"], out, others, recipe)
        return open_subjects(out, pico_sets["maths"], house.trusted, **options)

    return make
