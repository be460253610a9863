"""Several runs of the tasks side by side: a page for people, with a figure.

out/page.md, page.html   scores and bits per byte by group and task; what they cannot say
out/tasks.png, tasks.svg bits per byte against the first run's
out/table.json           the same numbers
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flexolmo.errors import DataError
from flexolmo.files import read_json, write_json
from flexolmo.numbers import format_number, format_signed, format_spread
from flexolmo.report.drawing import (
    MAX_WIDTH_INCHES,
    draw_cells,
    label_columns,
    note_below,
    styled,
    write_cell,
)
from flexolmo.report.page import Block, Cell, Items, Picture, Row, Table, Text, save_page
from flexolmo.research.tasks.run import compare_runs
from flexolmo.research.tasks.suite import GROUPS, TASKS

AVERAGE = "average of groups"
_DECIDING = ("forms", "write", "run_code", "samples", "judge_url", "judge_model", "seed")
Results = Mapping[str, Any]


def write_page(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of `runs`, each called as its directory; path of page.md.

    DataError: fewer than two runs, two of one name, or runs whose numbers cannot stand side by
    side: other tasks, items, or settings.
    """
    found = _read_runs(runs)
    names = list(found)
    against = {n: compare_runs(runs[0], path) for n, path in zip(names[1:], runs[1:], strict=True)}
    write_json(
        out / "table.json",
        {
            "runs": {
                n: {k: r[k] for k in ("model", "tasks", "groups", "average", "missing", "settings")}
                for n, r in found.items()
            },
            "against": {
                "run": names[0],
                "runs": {
                    n: {
                        kind: e[kind]
                        and {k: v for k, v in e[kind].items() if k != "tasks"}  # subtasks
                        for kind in ("score", "bits_per_byte")
                    }
                    for n, e in against.items()
                },
            },
        },
    )
    return save_page(_blocks(found, against), out / "page.md", out / "page.html")


def _blocks(found: Mapping[str, Results], against: Mapping[str, Results]) -> Iterator[Block]:
    first = next(iter(found))
    yield Text("Tasks", "h1")
    yield _runs_table(found)
    yield from _above_chance(found)
    yield Text("Bits per byte of right answers", "h2")
    yield _bits_table(found, against)
    yield Picture(
        "tasks",
        draw_bits(found),
        "Matrix of bits per byte by group and run; the numbers are in the table above.",
        f"The groups of the table above, and the average: {first}, and the change from it.",
    )
    yield Text("Scores", "h2")
    yield _score_table(found)
    yield Text("What the numbers cannot say", "h2")
    yield _notes(found)


def _read_runs(runs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    asked: dict[str, Any] = {}
    for path in (Path(r).resolve() for r in runs):
        if not (path / "results.json").is_file():
            raise DataError(
                f"{path} holds no finished run: expected results.json. Run flexolmo "
                "eval --out there first."
            )
        about = read_json(path / "run.json")
        results = read_json(path / "results.json")
        try:
            own = {f"the items of {n}": t["digest"] for n, t in about["tasks"].items()}
            own |= {f"setting {k}": v for k, v in about["settings"].items() if k in _DECIDING}
            if about["tasks"].keys() != results["tasks"].keys():
                raise DataError(
                    f"{path} has been given more tasks than its results.json sums up; "
                    "run flexolmo eval there once more, with all of them."
                )
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{path} holds no run of tasks that this version made.") from None
        if path.name in found:
            raise DataError(f"Two runs are called {path.name}; rename a directory.")
        asked = asked or own
        if other := [k for k in {**asked, **own} if asked.get(k) != own.get(k)]:
            raise DataError(
                f"{path} cannot stand beside the first run: it differs in "
                f"{', '.join(other)}. Give all runs the same tasks and options."
            )
        found[path.name] = results | {"settings": about["settings"]}
    if len(found) < 2:
        raise DataError("A table needs at least two runs.")
    return found


def _groups_and_tasks(found: Mapping[str, Results]) -> Iterator[tuple[str, str, list[Any]]]:
    """ "group" or "task", its name, and its entry in every run; the average last."""
    for group in _groups(found):
        yield "group", group, [r["groups"][group] for r in found.values()]
        for task in TASKS:
            entries = [r["tasks"].get(task.name) for r in found.values()]
            if task.group == group and all(entries):
                yield "task", task.name, entries
    yield "group", AVERAGE, [r["average"] for r in found.values()]


def _groups(found: Mapping[str, Results]) -> list[str]:
    """Tasks of which something was read."""
    first = next(iter(found.values()))
    return [g for g in GROUPS if first["groups"].get(g, {}).get("read")]


def _runs_table(found: Mapping[str, Results]) -> Table:
    rows: list[Row] = []
    for name, r in found.items():
        model = r["model"]
        said = " ".join(str(model[k]) for k in ("kind", "method") if k in model)
        digest = Cell(model["digest"].removeprefix("sha256:")[:12], mono=True)
        rows.append([name, said, ", ".join(model.get("enabled") or ["–"]), digest])
    settings = next(iter(found.values()))["settings"]
    limits = ", ".join(f"{n} {count}" for n, count in settings.get("limits", {}).items())
    facts = [
        f"Items of each task, or of each of its subtasks: {settings['limit'] or 'all'}"
        + (f" ({limits})" if limits else ""),
        "programs written were " + ("run" if settings["run_code"] else "not run"),
        "judge of news and poems: " + (settings["judge_model"] or "none"),
        f"seed {settings['seed']}",
    ]
    return Table("; ".join(facts) + ".", ["run", "model", "experts on", "digest"], rows)


def _above_chance(found: Mapping[str, Results]) -> Iterator[Block]:
    points, most = [], 0
    for name, r in found.items():
        scored = {n: t for n, t in r["tasks"].items() if t.get("above_chance") is not None}
        most = max(most, len(scored))
        above = [
            f"{n} ({t['score']:.1f}, chance {t['chance']:.1f})"
            for n, t in scored.items()
            if t["above_chance"]
        ]
        said = f": {len(above)} of {len(scored)} scored tasks"
        points.append(Text(said + (f": {', '.join(above)}" if above else ""), term=name))
    yield Text("Above chance", "h2")
    yield Items(points)
    yield Text(
        f"Each is tested by itself at 2.5 %: of {most} tasks, {format_number(0.025 * most, 1)} are "
        "expected here by luck alone."
    )


def _bits_table(found: Mapping[str, Results], against: Mapping[str, Results]) -> Table:
    rows: list[Row] = []
    for kind, name, entries in _groups_and_tasks(found):
        values = [e["bits_per_byte"] for e in entries]
        cells = [Cell(format_number(v, 3), bold=v == min(values)) for v in values]
        rows.append([Cell(name, bold=kind == "group"), *cells])
    differences = []
    for found_against in against.values():
        e = found_against["bits_per_byte"]["overall"]
        mean, low, high = (format_signed(e[k], 3) for k in ("difference", "low", "high"))
        differences.append(f"{mean} ({low} to {high})")
    rows.append(["difference", "", *differences])
    return Table(
        "Less is better; in bold the best of a row. The last row is the difference from "
        f"{next(iter(found))}, with 95 % of resamples of the items.",
        ["Task", *found],
        rows,
        "lr",
    )


def _score_table(found: Mapping[str, Results]) -> Table:
    rows: list[Row] = []
    for kind, name, entries in _groups_and_tasks(found):
        chances = [e["chance"] for e in entries if e.get("chance") is not None]
        cells = [
            Cell(
                "–" if e["score"] is None else format_spread(e["score"], e.get("error"), 1),
                bold=kind == "task" and bool(e.get("above_chance")),
            )
            for e in entries
        ]
        items = str(entries[0]["items"]) if kind == "task" else ""
        chance = format_number(max(chances), 1) if chances else ""
        rows.append([Cell(name, bold=kind == "group"), items, chance, *cells])
    return Table(
        "In percent, ± the standard error of the items' choice; in bold what is above chance. "
        "Chance is the best of an even guess, the same answer to every question, and what a run's "
        "own answers score on other questions (the highest of the runs is shown).",
        ["Task", "items", "chance", *found],
        rows,
        "lr",
    )


def _notes(found: Mapping[str, Results]) -> Items:
    """Notes that people need with the figures, one a reason, with the tasks or runs it is of."""
    notes: dict[str, dict[str, None]] = {}

    def note(said: str, of: str) -> None:
        notes.setdefault(said, {})[of] = None

    for name, r in found.items():
        for task, t in r["tasks"].items():
            if t["stand_in"]:
                note(f"stand-in: {t['stand_in']}", task)
            if t["score"] is None:
                note(f"not scored: {t['why'].split(';')[0]}", task)
            if "asked_new_tokens" in t:
                note(
                    "in some runs answers had to be shorter than the task allows, for the "
                    "model's length",
                    task,
                )
            if 2 * t["cut"] > t["items"]:
                note(
                    "in some runs most prompts did not fit the model and lost what they begin "
                    "with, mostly examples",
                    task,
                )
        for task, why in r["missing"].items():
            note(f"missing: {why}", task)
        if "chosen by" in r["model"]:
            note(
                f"one model for each text, chosen by {r['model']['chosen by']} "
                f"({r['model']['prompt tokens']} tokens)",
                name,
            )
        if not r["average"]["is_whole"]:
            note(
                "averages of scores are not the paper's whole average: over "
                f"{r['average']['groups']} of {r['average']['of']} groups",
                name,
            )
    return Items([Text(f"{', '.join(of)}: {said}") for said, of in notes.items()])


@styled
def draw_bits(found: Mapping[str, Results]) -> Figure:
    """Bits per byte by group (rows) and run (columns), coloured by the change from the first."""
    groups = _groups(found)
    names = list(found)
    bits = np.array(
        [[r["groups"][g]["bits_per_byte"] for r in found.values()] for g in groups]
        + [[r["average"]["bits_per_byte"] for r in found.values()]]
    )
    change = bits - bits[:, :1]
    fig = Figure(
        figsize=(min(MAX_WIDTH_INCHES, max(5.5, 2.2 + 0.95 * len(names))), 1.9 + 0.36 * len(bits))
    )
    ax = fig.subplots()
    limit = max(0.05, float(np.abs(change).max()))
    shown = draw_cells(ax, change, "RdBu_r", -limit, limit)
    for (y, x), v in np.ndenumerate(bits):
        text = format_number(v, 2) if x == 0 else format_signed(change[y, x], 2)
        write_cell(ax, x, y, text, shown[y, x], 9)
    label_columns(ax, names, {}, 12, slanted=len(names) > 6)
    ax.set_yticks(range(len(bits)), [*groups, AVERAGE])
    ax.get_yticklabels()[-1].set_fontweight("bold")
    fig.suptitle(
        "Bits per byte of right answers", x=0.01, ha="left", fontsize=10.5, fontweight="bold"
    )
    note_below(
        fig, "First column: bits per byte. Others: the change from it; blue, fewer bits, is better."
    )
    return fig
