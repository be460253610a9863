"""The pages on the mini study's privacy say what the results beside them hold."""

import json
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "docs/privacy/mini"
RESULTS = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
KEPT, BY_KIND = RESULTS["gain_kept"], RESULTS["gain_kept_by_kind"]
GAINS = {
    "documents, 1": "epsilon 1, documents",
    "documents, 2": "epsilon 2, documents",
    "documents, 8": "epsilon 8, documents",
    "documents, trained again with other noise, 8": "epsilon 8, documents, again",
    "sequences, 8": "epsilon 8, sequences",
    "no privacy, rank 8, 164 thousand tokens, –": "rank 8, no privacy",
    "no noise, rank 4, as many tokens as those of documents, –": "rank 4, no noise",
}
KINDS = {
    "word problems made by rule": "word_problems",
    "SymPy docstrings": "sympy_docstrings",
    "Maxima manual": "maxima_manual",
    "GAP manual": "gap_manual",
}
ATTACKED = {
    "anchor, of sequences": "epsilon 8, sequences, anchor",
    "sequences, epsilon 8, alone": "epsilon 8, sequences, alone",
    "sequences, epsilon 8, in the mixture": "epsilon 8, sequences, on",
}
ATTACKED_NOW = {
    "anchor": "epsilon_8, anchor",
    "dense model of the same text, 160 steps": "dense, model",
    "no privacy, 160 steps, alone": "expert, alone",
    "no privacy, 160 steps, in the mixture": "expert, on",
    **{
        f"epsilon {epsilon}, {where}": f"epsilon_{epsilon}, {label}"
        for epsilon in (8, 2)
        for where, label in (("alone", "alone"), ("in the mixture", "on"))
    },
}
NO_PRIVACY = "no privacy, whole matrices, 160 steps"
ATTACKED_FIRST = {
    "anchor": "math, anchor",
    "dense model of the same text": "dense_math, model",
    "study's expert, alone": "math, alone",
    "study's expert, in the mixture": "math, on",
    "three epochs, alone": "three_epochs, alone",
    "three epochs, in the mixture": "three_epochs, on",
    "control, 68 epochs, alone": "control_68_epochs, alone",
    "control, 68 epochs, in the mixture": "control_68_epochs, on",
}


def cells_of(section):
    """Cells of each row of every table."""
    lines = [line for line in section.replace("**", "").splitlines() if line.startswith("| ")]
    return [[c.strip() for c in line.strip("| ").split(" | ")] for line in lines]


def aucs(found, attacks=("loss", "min_k", "ratio", "informia")):
    """Figures of the attacks on one model, as a page writes them."""
    written = []
    for attack in attacks:
        figures = found.get(attack)
        if figures is None:
            written.append("–")
            continue
        auc, low, high = (f"{figures[name]:.2f}" for name in ("auc", "low", "high"))
        written.append(auc if low == high else f"{auc} ({low}–{high})")
    return written


def table_rows(cells):
    """The other cells of each row of tables, by the first."""
    assert len({c[0] for c in cells}) == len(cells)
    return {c[0]: c[1:] for c in cells}


def halves():
    """What the page's last section says of experts under the guarantee, and of the curves."""
    page = (HERE / "page.md").read_text(encoding="utf-8")
    return page.split("## Differential privacy")[1].split("### Curves")


@pytest.fixture(scope="module")
def now():
    """Rows of the tables of experts under the guarantee."""
    return table_rows(cells_of(halves()[0]))


@pytest.fixture(scope="module")
def rows():
    """Cells of every table of the curves, by the first of each row."""
    cells = cells_of(halves()[1])
    found = {f"{c[0]}, {c[1]}" if len(c) == 6 and c[0] not in KINDS else c[0]: c for c in cells}
    assert len(found) == len(cells)
    return found


def share(found, is_whole=True):
    """A share with its interval, as the page writes it."""
    percent = {name: f"{100 * found[name]:.0f}".replace("-", "−") for name in found}
    percent = {name: re.sub("^−0$", "0", text) for name, text in percent.items()}
    interval = f" ({percent['low']}–{percent['high']})" if is_whole else ""
    return f"{percent['kept']} %{interval}"


@pytest.mark.parametrize("row", GAINS)
def test_gains_are_those_that_were_measured(rows, row):
    run = GAINS[row]
    wanted = []
    for weight in ("documents", "bytes"):
        bits = RESULTS["bits_per_byte"][
            f"validation, math, an anchor trained again, {weight} alike"
        ]
        wanted += [f"{bits[run]:.3f}", share(KEPT[run][weight])]
    assert rows[row][2:] == wanted


@pytest.mark.parametrize("row", KINDS)
def test_gains_by_kind_are_those_that_were_measured(rows, row):
    found = BY_KIND[KINDS[row]]
    assert rows[row][1:] == [
        f"{found['training_documents']}, {found['validation_documents']}",
        share(found["epsilon 1, documents"], is_whole=False),
        share(found["epsilon 2, documents"], is_whole=False),
        share(found["epsilon 8, documents"]),
        share(found["rank 4, no noise"], is_whole=False),
    ]


@pytest.mark.parametrize("row", ATTACKED)
def test_attacks_are_those_that_were_measured(rows, row):
    found = RESULTS["membership"][ATTACKED[row]]
    assert found["off_equals_anchor"]
    assert rows[row][1:] == aucs(found)


@pytest.mark.parametrize("row", ATTACKED_FIRST)
def test_first_attacks_are_those_that_were_measured(row):
    section = (HERE / "page.md").read_text(encoding="utf-8").split("## Extraction")[0]
    (cells,) = [c for c in cells_of(section) if c[0] == row]
    assert cells[1:] == aucs(RESULTS["membership"][ATTACKED_FIRST[row]])


@pytest.mark.parametrize("row", ATTACKED_NOW)
def test_attacks_on_experts_under_the_guarantee_are_those_that_were_measured(now, row):
    found = RESULTS["membership"][ATTACKED_NOW[row]]
    assert found["off_equals_anchor"] or row.startswith("dense")
    assert now[row] == [f"{found['members']}, {found['others']}", *aucs(found)]


def gains(found, run):
    """Bits per byte of a private expert and the share of the gain that it keeps, as a page has."""
    return [
        text
        for weight in ("documents", "bytes")
        for text in (
            f"{found['bits_per_byte'][weight][run]:.3f}",
            share(found["gain_kept"][run][weight]),
        )
    ]


@pytest.mark.parametrize("epsilon", [2, 8])
def test_gains_under_the_guarantee_are_those_that_were_measured(now, epsilon):
    assert now[f"epsilon {epsilon}"] == gains(RESULTS, f"epsilon_{epsilon}")
    assert RESULTS["epsilon"][f"epsilon_{epsilon}"] <= epsilon
    budget = RESULTS["runs"][f"epsilon_{epsilon}"]["budget"]
    assert budget["sampling"] == "Poisson, of windows drawn in secret"


def test_both_ends_of_the_gain_are_those_that_were_measured(now):
    for label, run in {"the anchor": "anchor", NO_PRIVACY: "expert"}.items():
        bits = [RESULTS["bits_per_byte"][weight][run] for weight in ("documents", "bytes")]
        assert now[label][::2] == [f"{x:.3f}" for x in bits]


def costs(found):
    """Rows of a table of gaps closed, as a page writes them, without labels."""
    tables = [found[mix][w] for mix in ("states", "probabilities") for w in ("documents", "bytes")]
    return [[f"{t[label]:.3f}" for t in tables] for label in tables[0]]


def test_the_table_costs_what_was_measured(now):
    rows = [row for label, row in now.items() if label.startswith(("of 20", "epsilon 2, draw"))]
    assert rows == costs(RESULTS["gap_closed_by_table"])


@pytest.mark.parametrize("directory", [HERE, HERE.parent / "forum"])
def test_where_probabilities_are_mixed_a_private_table_costs_at_most_two_hundredths(directory):
    found = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    tables = found["gap_closed_by_table"]["probabilities"]["documents"]
    assert len(tables) == 4
    assert 0 < tables["threshold"] - min(tables.values()) <= 0.02


@pytest.mark.parametrize(("label", "owner"), [("forum", "forum"), ("mathematics", "mini")])
def test_the_decision_on_private_tables_quotes_these_figures(label, owner):
    docs = HERE.parents[1]
    found = json.loads((docs / f"privacy/{owner}/results.json").read_text(encoding="utf-8"))
    cells = cells_of((docs / "decisions/private_tables.md").read_text(encoding="utf-8"))
    wanted = []
    for mix in ("states", "probabilities"):
        gaps = found["gap_closed_by_table"][mix]["documents"]
        ends = gaps["threshold"], min(gaps.values())
        wanted += [f"{x:.3f}" for x in (*ends, ends[0] - ends[1])]
    (row,) = [c[1:] for c in cells if c[0].startswith(f"{label} (")]
    assert row == wanted


def test_no_document_of_any_private_expert_was_extracted():
    runs = ("epsilon_8", "epsilon_2", "epsilon 8, sequences")
    found = {f"{run}, {s}" for run in runs for s in ("alone", "on", "off", "anchor")}
    found = {name: RESULTS["extraction"][name] for name in found}
    for result in found.values():
        assert result["documents"] == 100
        assert (result["rate"], f"{result['high']:.3f}") == (0.0, "0.037")


# --- the forum ------------------------------------------------------------------------------------

FORUM = Path(__file__).parents[1] / "docs/privacy/forum"
FOUND = json.loads((FORUM / "results.json").read_text(encoding="utf-8"))
MODELS = {
    "study's expert": "expert",
    "three epochs": "three_epochs",
    "control, 86 epochs": "control",
    "epsilon 8": "epsilon_8",
    "epsilon 2": "epsilon_2",
}


def forum_rows(heading):
    """Cells of the tables of one section, by the first of each row."""
    page = (FORUM / "page.md").read_text(encoding="utf-8")
    return table_rows(cells_of(page.split(f"## {heading}")[1].split("## ")[0]))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("where", "subject"), [("alone", "alone"), ("in the mixture", "on")])
def test_attacks_on_the_forums_members_are_those_that_were_measured(model, where, subject):
    found = FOUND["membership"][f"{MODELS[model]}, {subject}"]
    assert found["off_equals_anchor"]
    row = [f"{found['members']}, {found['others']}", *aucs(found)]
    assert forum_rows("Membership")[f"{model}, {where}"] == row


@pytest.mark.parametrize("label", ["anchor", "dense model of the same text"])
def test_attacks_on_models_without_an_expert_are_those_that_were_measured(label):
    found = FOUND["membership"]["expert, anchor" if label == "anchor" else "dense, model"]
    assert forum_rows("Membership")[label][1:] == aucs(found)


@pytest.mark.parametrize("model", MODELS)
def test_extraction_from_the_forum_is_what_was_measured(model):
    found = [FOUND["extraction"][f"{MODELS[model]}, {s}"] for s in ("alone", "on", "off")]
    assert all(x["off_equals_anchor"] for x in found)
    shares = [[100 * x[name] for name in ("rate", "low", "high")] for x in found]
    shown = [f"{rate:.0f} % ({low:.1f}–{high:.1f})" for rate, low, high in shares]
    row = [str(found[0]["documents"]), *(text.replace("(0.0–", "(0–") for text in shown)]
    assert forum_rows("Extraction")[model] == row


@pytest.mark.parametrize("model", ["epsilon 2", "epsilon 8"])
def test_gains_of_the_forum_are_those_that_were_measured(model):
    assert forum_rows("Differential privacy")[model] == gains(FOUND, MODELS[model])


@pytest.mark.parametrize(
    ("label", "run"), [("anchor", "anchor"), ("no privacy, whole matrices", "expert")]
)
def test_both_ends_of_the_forums_gain_are_those_that_were_measured(label, run):
    bits = [f"{FOUND['bits_per_byte'][w][run]:.3f}" for w in ("documents", "bytes")]
    assert forum_rows("Differential privacy")[label][::2] == bits


def test_the_forums_table_costs_what_was_measured():
    rows = {c: v for c, v in forum_rows("The table alone").items() if c[0] in "eo"}
    assert list(rows.values()) == costs(FOUND["gap_closed_by_table"])


def test_figures_in_the_forums_text_are_those_that_were_measured():
    page = " ".join((FORUM / "page.md").read_text(encoding="utf-8").split())
    best = max(
        (x for x in FOUND["membership"]["epsilon_8, alone"].values() if isinstance(x, dict)),
        key=lambda x: x["auc"],
    )
    anchor = FOUND["membership"]["epsilon_8, anchor"]["zlib"]["auc"]
    assert best == FOUND["membership"]["epsilon_8, alone"]["zlib"]
    assert f"compressed size, {best['auc']:.3f} (" in page and f"{anchor:.3f}. As of" in page
    for kept in FOUND["gain_kept_with_one_window"].values():
        assert f"{100 * kept['documents']:.0f} and {100 * kept['bytes']:.0f} %" in page
    within = FOUND["extraction"]["control, alone"]["near_within_a_million"]
    assert f"{100 * within['exact']:.0f} % word for word" in page
    assert within["near"] == within["exact"]


def test_the_forums_budgets_are_what_was_asked_for():
    assert {m: round(e) for m, e in FOUND["epsilon"].items()} == {
        "epsilon_8": 8,
        "epsilon_2": 2,
        "canaries_epsilon_8": 8,
    }
    assert all(e <= asked for e, asked in zip(FOUND["epsilon"].values(), (8, 2, 8), strict=True))


@pytest.mark.parametrize("model", ["canaries", "canaries_epsilon_8"])
def test_canaries_prove_what_the_page_says(model):
    rows = forum_rows("Canaries")
    label = "no privacy" if model == "canaries" else "epsilon 8"
    for subject, where in (("alone", "alone"), ("on", "in the mixture"), ("off", "off")):
        found = FOUND["canaries"][f"{model}, {subject}"]
        (row,) = [
            cells for name, cells in rows.items() if name.startswith(label) and name.endswith(where)
        ]
        assert row == [
            f"{found['planted']} of {found['canaries']}",
            f"{found['auc']:.2f}",
            f"{found['right']} of {found['guesses']}",
            f"{found['epsilon_at_least']:.2f}",
        ]
