import os

import pytest

from flexolmo.data.workers import open_workers
from flexolmo.errors import DataError, FlexOlmoError


def refuse_three(number):
    if number == 3:
        raise DataError("three was found")
    return number * 2


def end_at_three(number):
    if number == 3:
        os._exit(1)
    return number


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order_and_errors_come_out(count):
    asked = []

    def numbers():
        for number in (*range(3), *range(4, 40), 3):
            asked.append(number)
            yield number

    with pytest.raises(DataError, match="three was found"), open_workers(count) as run:
        results = run(refuse_three, numbers())
        found = [next(results) for _ in range(5)]
        assert len(asked) <= 5 + 2 * count + 1  # no more is held than is waited for
        found += list(results)
    assert found == [0, 2, 4, 8, 10]


def test_a_process_that_is_ended_from_outside_is_said():
    with pytest.raises(FlexOlmoError, match="One of 2 processes ended"), open_workers(2) as run:
        list(run(end_at_three, range(10)))
