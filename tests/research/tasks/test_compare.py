"""The bootstrap against scipy's, its laws, and how often its intervals hold the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flexolmo.errors import ConfigError, DataError
from flexolmo.research.tasks import compare
from flexolmo.research.tasks.compare import paired_bootstrap

FREQUENT = settings(derandomize=True, max_examples=30)
KINDS = {
    "accuracy": lambda rng, n: rng.integers(2, size=n),  # few values: drawn as counts
    "f1": lambda rng, n: rng.random(n).round(3),
}
KIND = pytest.mark.parametrize("kind", KINDS)


@st.composite
def runs(draw):
    """Two runs of up to four tasks of any kind, and levels of groups that hold them all."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    names = draw(st.permutations(["arc", "boolq", "drop", "math"]))[: draw(st.integers(1, 4))]
    a, b = {}, {}
    for task in names:
        n, kind = draw(st.integers(1, 90)), draw(st.sampled_from(list(KINDS)))
        a[task], b[task] = KINDS[kind](rng, n), KINDS[kind](rng, n)
    cut = draw(st.integers(0, len(names)))
    groups = {"MC9": names[:cut], "arc": names[cut:]}  # a group may be called as a task is
    groups = {group: tasks for group, tasks in groups.items() if tasks}
    return a, b, [[], [groups], [groups, {"all": list(groups)}]][draw(st.integers(0, 2))]


def entries(result):
    """All entries by name."""
    return (
        {f"task {k}": v for k, v in result["tasks"].items()}
        | {
            f"group {i} {k}": v
            for i, groups in enumerate(result["levels"])
            for k, v in groups.items()
        }
        | {"overall": result["overall"]}
    )


@FREQUENT
@given(pair=runs())
def test_a_run_against_itself_differs_by_nothing(pair):
    a, _, levels = pair
    for entry in entries(paired_bootstrap(a, a, levels=levels, draws=50)).values():
        assert (entry["difference"], entry["low"], entry["high"], entry["p"]) == (0, 0, 0, 1)


@FREQUENT
@given(pair=runs())
def test_runs_exchanged_give_the_opposite(pair):
    a, b, levels = pair
    ab = entries(paired_bootstrap(a, b, levels=levels, draws=60))
    ba = entries(paired_bootstrap(b, a, levels=levels, draws=60))
    for name, entry in ab.items():
        other = ba[name]
        assert entry["difference"] == -other["difference"]
        assert (entry["a"], entry["b"], entry["p"]) == (other["b"], other["a"], other["p"])
        assert entry["low"] == pytest.approx(-other["high"], abs=1e-12)
        assert entry["high"] == pytest.approx(-other["low"], abs=1e-12)


@FREQUENT
@given(pair=runs())
def test_the_order_of_tasks_and_the_other_tasks_do_not_matter(pair):
    a, b, levels = pair
    whole = paired_bootstrap(a, b, levels=levels, draws=60)
    turned = [{group: groups[group][::-1] for group in reversed(groups)} for groups in levels]
    back = [{task: run[task] for task in reversed(run)} for run in (a, b)]
    assert paired_bootstrap(*back, levels=turned, draws=60) == whole
    for task in a:
        alone = paired_bootstrap({task: a[task]}, {task: b[task]}, draws=60)
        assert alone["tasks"][task] == whole["tasks"][task]
        assert {**alone["overall"], "items": len(a[task])} == whole["tasks"][task]


@FREQUENT
@given(pair=runs())
def test_means_are_of_items_then_tasks_then_groups(pair):
    a, b, levels = pair
    result = paired_bootstrap(a, b, levels=levels, draws=20)
    for run, scores in zip("ab", (a, b), strict=True):
        means = {task: np.mean(scores[task]) for task in scores}
        for groups, found in zip(levels, result["levels"], strict=True):
            means = {g: np.mean([means[n] for n in names]) for g, names in groups.items()}
            assert {g: e[run] for g, e in found.items()} == pytest.approx(means)
        assert result["overall"][run] == pytest.approx(np.mean(list(means.values())))


def test_a_seed_gives_the_same_and_another_seed_something_else():
    rng = np.random.default_rng(0)
    a, b = {"t": rng.random(40)}, {"t": rng.random(40)}
    first, again, other = (paired_bootstrap(a, b, draws=50, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["overall"]["low"] != other["overall"]["low"]


def test_tasks_are_drawn_apart():
    """Alike tasks drawn alike would leave their mean as uncertain as each."""
    rng = np.random.default_rng(0)
    a, b = ({task: scores for task in "xy"} for scores in rng.random((2, 40)))
    result = paired_bootstrap(a, b, draws=50)
    assert result["tasks"]["x"]["low"] != result["tasks"]["y"]["low"]


def test_chunks_do_not_change_the_draws(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = ({k: kind(rng, 70) for k, kind in KINDS.items()} for _ in range(2))
    whole = paired_bootstrap(a, b, draws=50)
    monkeypatch.setattr(compare, "_CHUNK_NUMBERS", 150)
    assert paired_bootstrap(a, b, draws=50)["tasks"]["accuracy"] == whole["tasks"]["accuracy"]
    assert paired_bootstrap(a, b, draws=50)["tasks"]["f1"] == whole["tasks"]["f1"]


@KIND
def test_it_agrees_with_scipy(kind):
    """A limit from 10,000 draws has a standard error of 0.027 of the draws' deviation s.

    Two such differ by 0.2 s, 5 standard errors, once in 10^6 cases; the seeds are fixed besides.
    """
    rng = np.random.default_rng(3)
    a, b = KINDS[kind](rng, 150), KINDS[kind](rng, 150)
    ours = paired_bootstrap({"t": a}, {"t": b})["tasks"]["t"]
    theirs = stats.bootstrap(
        (a, b),
        lambda x, y, axis: (y - x).mean(axis=axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        rng=rng,
        batch=500,
    )
    spread = (b - a).std() / 150**0.5
    assert ours["low"] == pytest.approx(theirs.confidence_interval.low, abs=0.2 * spread)
    assert ours["high"] == pytest.approx(theirs.confidence_interval.high, abs=0.2 * spread)


def draw_scores(rng, difference, n=100):
    """Two runs of real-valued scores that agree on which items are hard; [n] each."""
    hardness = rng.normal(size=n)
    return hardness + rng.normal(0, 0.5, n), hardness + rng.normal(difference, 0.5, n)


def draw_answers(rng, difference, n=100):
    """Two runs that are right (1) or wrong (0), and agree on 7 items in 10 or more; [n] each."""
    luck, other = rng.random(n), rng.random(n)
    return luck < 0.4, np.where(rng.random(n) < 0.7, luck, other) < 0.4 + difference


@pytest.mark.parametrize("draw", [draw_scores, draw_answers])
def test_intervals_hold_the_true_difference_in_about_95_percent_of_data_sets(draw):
    """Of 1,000 data sets about 942 do for scores and 958 for answers, with a deviation of 7.

    Fewer than 905 or more than 990 come about once in 10^5 seeds. So does, without a difference, p
    below 0.05 in fewer than 12 or more than 92 of them; it is in about 54 and 41.
    """
    rng = np.random.default_rng(5)
    for true in (0.1, 0.0):
        pairs = [draw(rng, true) for _ in range(1000)]
        a, b = ({str(i): pair[run] for i, pair in enumerate(pairs)} for run in (0, 1))
        tasks = paired_bootstrap(a, b, draws=400)["tasks"].values()
        assert 905 <= sum(t["low"] <= true <= t["high"] for t in tasks) <= 990
    assert 12 <= sum(t["p"] < 0.05 for t in tasks) <= 92


def test_pairing_shows_what_two_separate_intervals_hide():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200) * 10
    entry = paired_bootstrap({"t": hard}, {"t": hard + rng.normal(0.3, 1, 200)}, draws=2000)[
        "tasks"
    ]["t"]
    assert entry["low"] > 0 and entry["p"] < 0.05


def test_p_is_never_0():
    entry = paired_bootstrap({"t": np.zeros(9)}, {"t": np.ones(9)}, draws=999)["overall"]
    assert entry["p"] == 2 / 1000 and entry["low"] == entry["high"] == 1


ONES = {"arc": np.ones(3), "boolq": np.ones(2)}


@pytest.mark.parametrize(
    ("b", "found"),
    [
        ({"arc": np.ones(3)}, "boolq is in run a only"),
        (ONES | {"drop": np.ones(1)}, "drop is in run b only"),
        (ONES | {"boolq": np.ones(4)}, r"boolq has scores of shapes \[2\] and \[4\]"),
        (ONES | {"arc": np.ones((3, 1))}, r"arc has scores of shapes \[3\] and \[3, 1\]"),
        (ONES | {"arc": np.array([1, np.nan, 1])}, "arc has scores that are not finite"),
    ],
)
def test_runs_that_do_not_match_are_refused_by_task(b, found):
    with pytest.raises(DataError, match=found):
        paired_bootstrap(ONES, b)


def test_empty_runs_are_refused():
    with pytest.raises(DataError, match="no task"):
        paired_bootstrap({}, {})
    with pytest.raises(DataError, match=r"arc has scores of shapes \[0\] and \[0\]"):
        paired_bootstrap({"arc": np.ones(0)}, {"arc": np.ones(0)})


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ({"MC9": ["arc"]}, "boolq is in no group"),
        ({"MC9": ["arc", "boolq", "piqa"]}, "piqa is in a group and not in the runs"),
        ({"MC9": ["arc", "boolq"], "Gen5": []}, "Gen5 has no task"),
    ],
)
def test_groups_that_do_not_match_are_refused(groups, found):
    with pytest.raises(ConfigError, match=found):
        paired_bootstrap(ONES, ONES, levels=[groups])


@pytest.mark.parametrize("bad", [{"draws": 0}, {"seed": -1}, {"confidence": 1.0}])
def test_bad_numbers_are_refused(bad):
    with pytest.raises(ConfigError, match="expected"):
        paired_bootstrap(ONES, ONES, **bad)
