"""The benchmark of laws: cases take turns, and figures have their places in plot and table."""

import itertools
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def laws(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import laws

    return laws


def test_every_case_has_its_median_of_the_rounds_after_the_first(laws):
    counts = {name: itertools.count(start) for name, start in (("a", 0), ("b", 10))}
    cases = {name: lambda c=c: {"x": float(next(c))} for name, c in counts.items()}
    assert laws.take_turns("test", cases, 3) == {"a": {"x": 2.0}, "b": {"x": 12.0}}


def test_each_curve_that_was_measured_is_drawn(laws, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("flexolmo.report.drawing.save_figure", lambda fig, _: drawn.append(fig))
    keys = [key for key, _, _ in laws.CURVES["owners"][2]]
    by = {str(n): {key: float(n * i) for i, key in enumerate(keys, 1)} for n in (2, 8)}
    laws.draw({"owners": {"by": by}}, tmp_path / "laws.png")
    ax, *others = drawn[0].axes
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [
        [2.0 * i, 8.0 * i] for i in range(1, 1 + len(keys))
    ]
    assert not any(other.get_lines() for other in others)


def test_a_table_has_a_column_for_each_place(laws):
    by = {"2": {"a_b": 1.0}, "64": {"a_b": 0.123456}}
    assert laws.table({"owners": {"by": by}}) == (
        "| owners | 2 | 64 |\n|---|---|---|\n| a b | 1 | 0.1235 |\n"
    )
