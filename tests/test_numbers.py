import math

import pytest

from flexolmo.numbers import (
    format_change,
    format_duration,
    format_megabytes,
    format_number,
    format_parameters,
    format_percent,
    format_seconds,
    format_signed,
)


@pytest.mark.parametrize(
    ("x", "digits", "shown"),
    [
        (1234.5678, 2, "1,234.57"),
        (-0.0004, 3, "0.000"),
        (-0.0006, 3, "−0.001"),
        (0, 0, "0"),
        (-0.2, 0, "0"),
        (math.nan, 1, "–"),
        (None, 1, "–"),
    ],
)
def test_a_number_has_a_true_minus_and_no_negative_zero(x, digits, shown):
    assert format_number(x, digits) == shown


def test_a_sign_is_shown_of_what_is_not_zero():
    assert [format_signed(x, 1) for x in (1, -1, 0.01, -0.01, None)] == [
        "+1.0", "−1.0", "0.0", "0.0", "–",
    ]  # fmt: skip


def test_percentages_are_not_broken_over_lines():
    assert format_percent(0.1234) == "12.3\u00a0%" and format_percent(None) == "–"
    assert format_change(0.1234, 2) == "+12.34\u00a0%" and format_change(-0.5, 0) == "−50\u00a0%"
    assert format_change(math.nan) == "–" and format_change(-1e-9) == "0.0\u00a0%"


def test_sizes_and_durations():
    assert format_megabytes(1_234_567_890) == "1,234.6" and format_megabytes(38_400) == "0.038"
    assert [format_seconds(s) for s in (59.9, 61, 3661, None)] == ["0:59", "1:01", "1:01:01", "–"]
    shown = [format_duration(s) for s in (0.93, 38, 119, 120, 7199, 7200, 935_454)]
    assert shown == [
        "0.9 seconds", "38 seconds", "119 seconds", "2 minutes", "120 minutes", "2.0 hours",
        "259.8 hours",
    ]  # fmt: skip
    assert [format_parameters(n) for n in (347e6, 4.3e9, 12e9)] == ["347M", "4.3B", "12B"]
