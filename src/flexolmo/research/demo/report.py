"""One HTML file of a run's results and their figures.

Says what the page contains: its sentences, tables and figures, as blocks; `page` knows how a
block looks. Knows nothing of models; a missing result leaves its part out.
"""

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexolmo.audit.results import AUDITS
from flexolmo.audit.statistics import rows_of
from flexolmo.bundle.manifest import PUBLIC
from flexolmo.evaluation.influence import values_of
from flexolmo.numbers import format_change, format_megabytes, format_number, format_percent
from flexolmo.report import drawing, plots
from flexolmo.report.page import (
    Block,
    Cell,
    Fold,
    Link,
    Picture,
    Row,
    Sample,
    Table,
    Text,
    save_page,
)
from flexolmo.report.plots import Results
from flexolmo.report.release_page import answer_of, figure_of
from flexolmo.terminal import make_printable

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
_MAX_SOURCES = 12  # of an owner, by name; results.json has all

_WHAT_WORDS_ARE = (
    "Anchor: the public model, trained once on public text and frozen. Expert: one owner's "
    "additional weights, trained by that owner beside the anchor. Bundle: the signed file an owner "
    "hands over; it holds weights and a description, no text. Set: one owner's text, or the public "
    "text; part of each set is held out, that is, never trained on and used only to measure. "
    "Token: the piece of text a model reads at once, a few letters long."
)
_WHAT_IS_NOT_SHOWN = (
    "For data protection: weights are not text, but a model may have memorised some of what it was "
    "trained on; of that this page attacks the tables, embedding and head alone. A signature says "
    "whose a bundle is and that it is unaltered, not what it remembers. An owner that is switched "
    "off takes no part in any answer; its weights stay on the coordinator's disk until somebody "
    "deletes them."
)
_WHAT_BITS_ARE = (
    "Bits per byte: how many bits the model needs, on average, for one byte of held-out text, "
    "counted as the negative base-2 logarithm of the probability it gave that byte. Lower is "
    "better. A model that knows nothing needs 8; one that is certain and right needs 0. From 2.0 "
    "to 1.9 means files 5 % smaller if the model were used to compress. Counted by byte, models "
    "with different vocabularies can be compared."
)
_WHAT_IS_ATTACKED = (
    "A bundle holds a table: of tokens, and of pairs of tokens, that enough source documents hold, "
    "by how much they are likelier there than in public text, in coarse steps. Whoever gets the "
    "bundle may ask it how often a token occurs, whether a rare one occurs at all, how a word of "
    "one document is spelled, or whether a document was trained on. AUC is the chance that the "
    "attack ranks a right answer above a wrong one: 0.5 is guessing, 1 is certainty."
)
_WHAT_A_RELEASE_IS = (
    "An owner can attack its own bundle, alone, as whoever has it can, and in the mixture, and "
    "sign a report of what was found for whoever must agree that the bundle leaves. Here one owner "
    "does. Each attack takes seconds and reads the beginnings of few documents, so much is left "
    "open; the commands are the same for thousands."
)
_OFF_IS_THE_ANCHOR = (
    "Control: with the owner off, every attack finds on the mixture what it finds on the anchor, "
    "to the bit."
)
_WHAT_INFLUENCE_IS = (
    "Before it merges bundles, a coordinator can measure what each does to text that is not its "
    "owner's, and refuse those above a limit: on public text, on public text in other forms "
    "(questions and answers, lists, mail, tables and more), and on text that the other experts "
    "write. A loss is of bits per byte, with the expert on against off; the worst form and the "
    "worst other expert are shown. Below 0 the expert helps."
)
_WHY_OURS = (
    "The router decides how much each expert has a say. The one of the paper this project follows "
    "(FlexOlmo, arXiv:2507.07024) has one row of weights per expert and layer, read against the "
    'hidden state, with a negative bias. Each owner trains its row to answer "mine or public?" '
    "and never meets another owner, so after merging nothing has compared the rows with each "
    "other; in short training they also hardly leave their start. Ours follows evidence instead: "
    "how much likelier each token, after the one before it, is in the owner's text than in public "
    "text, in a filter that expects a text to change hands now and then. It takes no training, has "
    "one scale for all owners, and an owner's part depends on the anchor and that owner alone, so "
    "switching off stays exact. Our experts also have attention, embedding and head of their own, "
    "which the paper's do not. The paper's form is an option."
)


def write_report(results: Results, directory: Path) -> Path:
    """Write report.html and figures/*.png, *.svg into `directory`; the path of the HTML.

    `results` is results.json. All files are replaced whole, and the HTML last.
    """
    return save_page(_blocks(results), Path(directory) / "report.html")


# --- results -> blocks -----------------------------------------------------------------------


def _blocks(results: Results) -> Iterator[Block]:
    yield Text("FlexOlmo: one model from owners who share no data", "h1")
    for sentence in _opening(results):
        yield Text(sentence, "lead")
    bars = (results.get("summary") or {}).get("bars") or []
    if bars:
        met = sum(b.get("met") is True for b in bars)
        yield Text("What was asked of this run, and what it reached", "h2")
        yield Table(
            f"{met} of {len(bars)} met",
            ["Verdict", "Asked", "Measured"],
            [
                [Cell.verdict(b.get("met")), str(b.get("text", "")), str(b.get("value", "–"))]
                for b in bars
            ],
        )
    for name, why in (results.get("skipped") or {}).items():
        yield Text(f"Left out of this run: {name} ({why}).", "note")
    yield Text("What was trained, and by whom", "h2")
    yield Text(_WHAT_WORDS_ARE, "note")
    yield _owners_table(results)
    yield Text(_WHAT_IS_NOT_SHOWN, "note")
    if plots.bits_table(results):
        yield from _bits_section(results)
    if (results.get("routing") or {}).get("weights"):
        yield Text("Who answers", "h2")
        yield Picture(
            "figures/routing",
            plots.plot_routing(results),
            "Heat map of the mean weight of each expert in each layer, by set.",
            "How our router shares the answer between experts on held-out text. The "
            'column "public" is the anchor\'s own part.',
        )
    if plots.bits_table(results, paper=True):
        yield from _routers_section(results)
    if results.get("influence"):
        yield from _influence_section(results["influence"])
    if results.get("statistics_attack"):
        yield from _attack_section(results["statistics_attack"])
    if results.get("release"):
        yield from _release_section(results["release"])
    if results.get("samples"):
        yield from _samples_section(results)
    yield from _origin_section(results)


def _bits_section(results: Results) -> Iterator[Block]:
    yield Text("How well each model predicts each set", "h2")
    yield Text(_WHAT_BITS_ARE, "note")
    yield _bits_table(results)
    yield Picture(
        "figures/bits_per_byte",
        plots.plot_bits_per_byte(results),
        "Bits per byte by set: anchor, that set's expert alone, mixture, and "
        "mixture without that expert; the numbers are in the table above.",
        "The nearer the filled circle is to the diamond, the more of an expert survives "
        "merging; a cross on the upright bar means that switching off leaves what the "
        "public model knew.",
    )
    yield Text("Switching an owner off", "h2")
    yield Picture(
        "figures/optout_matrix",
        plots.plot_optout_matrix(results),
        "Matrix of the change of bits per byte against the anchor, by owner "
        f"switched off and by set. {' '.join(_opening(results)[2:3])}",
        "Read down a column: only the outlined cell, the owner's own set, should "
        "change, and it should go to 0.",
    )


def _routers_section(results: Results) -> Iterator[Block]:
    yield Text("The paper's router beside ours", "h2")
    yield Text(_WHY_OURS + _compare_routers(results))
    yield _router_table(results)
    yield Picture(
        "figures/kept_gain",
        plots.plot_kept_gain(results),
        "Bars: each expert's gain alone and what the mixture keeps of it, with our "
        "router and with the paper's; the numbers are in the table above.",
        "Pale: the anchor with one expert. Solid and hatched: all experts merged, "
        "on the same text. Each router is held against its own pair of anchor and "
        "expert.",
    )
    if (results["paper_router"].get("routing") or {}).get("weights"):
        yield Picture(
            "figures/routing_paper",
            plots.plot_routing(results, paper=True),
            "Heat map of the paper's router: mean weight of each expert in each layer, by set.",
            "The same text, answered through the paper's router.",
        )


def _influence_section(influence: Mapping[str, Any]) -> Iterator[Block]:
    yield Text("What each expert does to other people's text", "h2")
    yield Text(_WHAT_INFLUENCE_IS, "note")
    yield Table(
        "Each expert alone beside the anchor on public text, and beside all others on theirs",
        ["Expert", "Loss on public text", "Share of it taken", "In other forms", "Others' text"],
        [[n, *values_of(found).values()] for n, found in influence["experts"].items()],
    )


def _attack_section(attacks: Mapping[str, Any]) -> Iterator[Block]:
    yield Text("What a bundle tells besides what it learnt", "h2")
    yield Text(_WHAT_IS_ATTACKED, "note")
    rows = {name: rows_of(found) for name, found in attacks.items()}
    first = next(iter(rows.values()))
    yield Table(
        "Attacks on each owner's bundle, with 95 % intervals",
        ["Attack", *rows, "By chance"],
        [
            [
                label,
                *(f"{r[i][1]} ({r[i][2]})" if r[i][2] else r[i][1] for r in rows.values()),
                "; ".join(dict.fromkeys(r[i][3] for r in rows.values() if r[i][3])) or "–",
            ]
            for i, (label, *_) in enumerate(first)
        ],
    )


def _release_section(release: Mapping[str, Any]) -> Iterator[Block]:
    yield Text("What an owner signs before its bundle leaves", "h2")
    yield Text(_WHAT_A_RELEASE_IS, "note")
    guarantee = ["Is there a guarantee of privacy?"]
    guarantee += ["yes" if x["has_guarantee"] else "no" for x in release.values()]
    rows: list[Row] = [guarantee]
    made = {name: {a["audit"]: a for a in x["attacks"]} for name, x in release.items()}
    for audit, about in AUDITS.items():
        if any(audit in attacks for attacks in made.values()):
            cells = [_attack_cell(attacks.get(audit)) for attacks in made.values()]
            rows.append([about.question, *cells])
    caption = "Answers go by the upper end of 95 % intervals, of the expert alone or switched on"
    yield Table(caption, ["Question", *release], rows)
    controls = [a["off_equals_anchor"] for x in release.values() for a in x["attacks"]]
    if all(met for met in controls if met is not None):
        yield Text(_OFF_IS_THE_ANCHOR)
    for name, found in release.items():
        yield Link(f"The release report of {name}", found["page"])


def _attack_cell(attack: Mapping[str, Any] | None) -> Cell:
    if attack is None:
        return Cell("not made", italic=True)
    head = attack["headline"]
    shown = answer_of(attack["level"])
    return Cell(shown if head is None else f"{shown}: {head['measure']} {figure_of(head)}")


def _samples_section(results: Results) -> Iterator[Block]:
    yield Text("The same prompt with and without an owner", "h2")
    yield Text(
        "In grey the prompt, the same on both sides; after it how the mixture goes on, "
        "drawn with the same seed, first with all experts on, then with one switched "
        "off. Small models write poorly; what to look at is whose words they use. Runs of "
        "empty lines are shown as one.",
        "note",
    )
    yield Text(
        "Prompts may quote an owner's held-out text, and so may this page; ask the owners "
        "before passing it on.",
        "note",
    )
    colours = plots.owner_colours(results)
    described = {
        o.get("name"): str(o.get("set_description", "")) for o in results.get("owners") or []
    }
    for s in results["samples"]:
        source = str(s.get("source", ""))
        prompt = str(s.get("prompt", ""))
        about = f"{source} {described.get(source, '')}".lower()
        parts = [
            _close_gaps(str(s.get(k, "")).removeprefix(prompt)) or "(empty lines only)"
            for k in ("with", "without")
        ]
        yield Sample(
            source,
            colours.get(source, drawing.GREY),
            _close_gaps(prompt),
            (parts[0], parts[1]),
            re.search(r"\bcode\b|python|program|javascript", about) is not None,
        )


def _origin_section(results: Results) -> Iterator[Block]:
    yield Text("Where these numbers come from", "h2")
    words = {"total": "all stages, whenever they ran", "this run": "this run, from start to end"}
    stages = results.get("seconds") or {}
    if stages:
        rows = [[words.get(k, str(k)), _count(v, 1)] for k, v in stages.items()]
        yield Table("Time by stage", ["Stage", "Seconds"], rows, "lr")
    values = [
        value
        for key in ("started", "seed", "commit", "versions", "machine", "digests")
        if results.get(key) is not None
        for value in _flatten(results[key], key)
    ]
    for o in results.get("owners") or []:
        if o.get("key_id"):
            values.append((f"signing key of {o.get('name')}", str(o["key_id"])))
    yield Table(
        "Seed, commit, versions and digests",
        ["What", "Value"],
        [(k, Cell(v, mono=True)) for k, v in values],
    )
    if str(results.get("commit", "")).endswith("+changes"):
        yield Text("+changes: the code had changes that are not in that commit.", "note")
    if results.get("recipe"):
        recipe = json.dumps(results["recipe"], indent=2, ensure_ascii=False, default=str)
        yield Fold("Recipe", Text(recipe, "pre"))


def _opening(results: Results) -> list[str]:
    """Opening of at most three sentences for a newcomer, with the run's own numbers."""
    names = plots.owner_names(results)
    bits = plots.bits_table(results)
    n = len(names)
    found = _summary(results)
    size = (results.get("anchor") or {}).get("parameters")
    total = (results.get("seconds") or {}).get("total")
    took = f", all in {_duration(total).replace(' min', ' minutes')}." if total else "."
    anchor = f" (the anchor, {size / 1e6:.1f} million parameters)" if size else ""
    said = []
    if names:
        said.append(
            f"{(_NUMBERS[n] if n < 8 else str(n)).capitalize()} owner{'s' * (n != 1)} "
            f"({_listed(names)}) {'each ' * (n > 1)}trained one expert on "
            f"{'their' if n > 1 else 'its'} own text alone, beside a public model that nobody "
            f"changed{anchor}, and handed over one signed file; a coordinator merged the files "
            f"into a mixture{took}"
        )
    change = {s: plots.relative_change(bits, "mixture", s) for s in names}
    change = {s: x for s, x in change.items() if not math.isnan(x)}
    if change:
        public = found["public_change"]
        said.append(
            f"Compared with the public model alone, the mixture needs {_span(change)} to "
            "predict a byte of an owner's text that no model was trained on"
            + (f"; on public text it needs {_fewer(public)}." if not math.isnan(public) else ".")
        )
    off, side = found["optout_vs_anchor"], found["optout_side_effect"]
    if off:
        far = max(off, key=lambda s: abs(off[s]))
        said.append(
            f"Switch an owner off, with nothing trained again, and on that owner's text "
            f"the model is within {_bound(off[far])} of the public model"
            + (f" (furthest: {far})" if len(off) > 1 else "")
            + (
                f", while no other set moves by more than {_bound(max(side.values(), key=abs))}."
                if side
                else "."
            )
        )
    return said


def _summary(results: Results, paper: bool = False) -> dict[str, Any]:
    """The summary of the results, completed from the bits per byte where it is silent."""
    names = plots.owner_names(results)
    bits = plots.bits_table(results, paper)
    sets = plots.set_names(results)
    change = functools.partial(plots.relative_change, bits)
    kept, side = {}, {}
    for n in names:
        pair = change(f"expert {n}", n)
        kept[n] = change("mixture", n) / pair if pair else math.nan
        moved = [change(f"mixture without {n}", s, "mixture") for s in sets if s != n]
        side[n] = max([x for x in moved if not math.isnan(x)], key=abs, default=math.nan)
    found = {
        "kept_of_pair_gain": kept,
        "optout_side_effect": side,
        "optout_vs_anchor": {n: change(f"mixture without {n}", n) for n in names},
    }
    given = ((results.get("paper_router") or {}) if paper else results).get("summary") or {}
    whole: dict[str, Any] = {}
    for key, values in found.items():
        values = {**values, **{k: v for k, v in (given.get(key) or {}).items() if v is not None}}
        whole[key] = {k: v for k, v in values.items() if not math.isnan(v)}
    kept = whole["kept_of_pair_gain"]
    if kept:
        kept.setdefault("mean", sum(kept.values()) / len(kept))
    public = given.get("public_change")
    whole["public_change"] = change("mixture", PUBLIC) if public is None else public
    return whole


def _owners_table(results: Results) -> Table:
    anchor, colours = results.get("anchor") or {}, plots.owner_colours(results)
    rows: list[dict[str, Cell | str]] = []
    if anchor:
        size = anchor.get("parameters")
        rows.append(
            {
                "Expert": Cell("anchor", drawing.GREY, bold=True),
                "Owner": PUBLIC,
                "Text": "public text" + (f"; {size / 1e6:.1f} million parameters" if size else ""),
                "Tokens read in training": _count(anchor.get("tokens")),
                "Training time": _duration(anchor.get("seconds")),
            }
        )
    for o in results.get("owners") or []:
        text = str(o.get("set_description") or "–").rstrip(".")
        sources = [str(s) for s in o.get("sources") or []]
        if sources:
            more = len(sources) - _MAX_SOURCES
            text += ". Sources in this run: " + _listed(
                sources[:_MAX_SOURCES] + ([f"{more} more"] if more > 0 else [])
            )
        size = o.get("bundle_bytes")
        terms = [str(o[k]) for k in ("licence", "terms") if o.get(k)]
        rows.append(
            {
                "Expert": Cell(str(o.get("name", "?")), colours.get(str(o.get("name"))), bold=True),
                "Owner": str(o.get("owner") or "–"),
                "Text": text,
                "Documents to train on": _count(o.get("documents")),
                "Tokens to train on": _count(o.get("tokens")),
                "Tokens read in training": _count(o.get("tokens_seen")),
                "Training time": _duration(o.get("seconds")),
                "Signed bundle": f"{format_megabytes(size)} MB" if size else "–",
                "Licence; terms": "; ".join(terms) or "–",
            }
        )
    caption = "Each owner trained beside the same frozen anchor, on its own text alone"
    return Table.of(caption, rows, "lllrrrrrl")


def _bits_table(results: Results) -> Table:
    sets = plots.set_names(results)
    bits = plots.bits_table(results)
    rows: list[Row] = []
    colours = plots.owner_colours(results)
    names = plots.owner_names(results)
    words = {"anchor": "anchor", "mixture": "mixture, all on"}
    order = [
        "anchor",
        *(f"expert {n}" for n in names),
        "mixture",
        *(f"mixture without {n}" for n in names),
        *bits,
    ]
    for row in dict.fromkeys(r for r in order if r in bits):
        own = row.removeprefix("expert ").removeprefix("mixture without ")
        heading = words.get(row, row if row.startswith("mixture") else f"anchor + {own} alone")
        rows.append(
            [Cell(heading, bold=row in words)]
            + [
                Cell(
                    format_number(bits[row].get(s), 3),
                    colours.get(s) if s == own else None,
                    bold=s == own or row == "mixture",
                )
                for s in sets
            ]
        )
    return Table(
        "Bits per byte on held-out text, lower is better; a row a model, a column a set; "
        "tinted: the owner's own set",
        ["Model", *sets],
        rows,
        "lr",
    )


def _router_table(results: Results) -> Table:
    ours = _summary(results)
    papers = _summary(results, paper=True)
    keys = [*(n for n in plots.owner_names(results) if n in ours["kept_of_pair_gain"]), "mean"]
    rows: list[Row] = []
    for n in keys:
        said = "kept, mean of owners" if n == "mean" else f"kept of what {n} gains alone"
        kept = [format_percent(s["kept_of_pair_gain"].get(n), 0) for s in (ours, papers)]
        rows.append([Cell(text, bold=n == "mean") for text in (said, *kept)])
    for said, key in (
        ("public text: change against the anchor", "public_change"),
        ("owner off: its set against the anchor, furthest", "optout_vs_anchor"),
        ("owner off: another set against all on, furthest", "optout_side_effect"),
    ):
        found = [
            max(v.values(), key=abs, default=math.nan) if isinstance(v, dict) else v
            for v in (ours[key], papers[key])
        ]
        rows.append([said, *(format_change(x, 2) for x in found)])
    return Table(
        "How much of an expert's gain each router keeps, and by how much bits per byte "
        "change (positive is worse)",
        ["Measure", "Ours", "The paper's"],
        rows,
        "lr",
    )


def _compare_routers(results: Results) -> str:
    mean = [_summary(results, p)["kept_of_pair_gain"].get("mean") for p in (False, True)]
    if mean[0] is None or mean[1] is None:
        return ""
    shown = (
        f"ours keeps {100 * mean[0]:.0f}\u00a0% of what each expert gains alone, the paper's "
        f"{100 * mean[1]:.0f}\u00a0% (mean of owners)."
    )
    return f" In this run {shown}" if mean[0] > mean[1] else f" Not so in this run: {shown}"


# --- words for numbers -----------------------------------------------------------------------


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _bound(fraction: float) -> str:
    """`fraction` as a percentage that is not below it."""
    return f"{math.ceil(abs(fraction) * 1000 - 1e-6) / 10:.1f}\u00a0%"


def _fewer(fraction: float) -> str:
    if abs(fraction) < 5e-4:
        return "as many bits"
    return f"{format_percent(abs(fraction))} {'fewer' if fraction < 0 else 'more'} bits"


def _span(change: Mapping[str, float]) -> str:
    """Least and most gained, each with its name."""
    best = min(change, key=change.__getitem__)
    worst = max(change, key=change.__getitem__)
    if len(change) == 1:
        return f"{_fewer(change[best])} ({best})"
    if change[worst] <= -5e-4:
        least, most = (format_percent(abs(change[s])) for s in (worst, best))
        return f"between {least} ({worst}) and {most} ({best}) fewer bits"
    return f"between {_fewer(change[worst])} ({worst}) and {_fewer(change[best])} ({best})"


def _count(x: Any, digits: int = 0) -> str:
    if x is None:
        return "–"
    return f"{x:,.{digits}f}" if isinstance(x, int | float) else str(x)


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "–"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _close_gaps(text: str) -> str:
    """`text` with each run of empty lines as one, and none at its end."""
    return re.sub(r"\n(?:[ ]*\n){2,}", "\n\n", make_printable(text)).rstrip()


def _flatten(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for k, v in value.items():
            yield from _flatten(v, f"{path}: {k}")
    else:
        yield path, str(value)
