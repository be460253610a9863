"""The page of `flexolmo audit report`: what a data-protection officer reads before a bundle leaves.

Shows what `audit.release` found, and computes nothing. The copy that stays has two more parts; the
one that may leave has two cards beside it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flexolmo.audit.cards import bill_of_materials, data_card
from flexolmo.audit.results import AUDITS
from flexolmo.bundle.manifest import Manifest
from flexolmo.bundle.release import (
    BOM_FILE,
    DATA_CARD_FILE,
    PAGE_FILE,
    Release,
    ReleaseReport,
    show_value,
)
from flexolmo.files import canonical_json, parse_json
from flexolmo.numbers import format_count, format_megabytes, format_percent
from flexolmo.report.page import Block, Cell, Items, Row, Table, Text, render_page

_LEVELS = {"little": "#009E73", "some": "#E69F00", "much": "#D55E00", "unclear": "#E69F00"}
_UNITS = {
    "document": "a source document: all its pieces, and texts of the same words",
    "sequence": "a stretch of one document: weak, for who has ten is protected by ten times "
    "epsilon",
}
_UNKNOWN = (
    "Not known: there are no results of {}, or no stays_here.json lay beside them, as the attack "
    "writes it."
)
_COMMANDS = {name: f"flexolmo audit {name}" for name in AUDITS} | {
    "canaries": "flexolmo audit canaries plant, then measure"
}


def render_release(report: ReleaseReport, stays: Mapping[str, Any] | None = None) -> str:
    """The page as HTML: of the copy that may leave, or with `stays` of the one that must not."""
    return render_page([*_blocks(report, stays)], "html", {})


def make_shown(report: ReleaseReport, manifest: Manifest) -> dict[str, bytes]:
    """The files of the copy that may leave which show the claims: page, bill and data card."""
    findings = _read_again(report)
    cards = {
        BOM_FILE: bill_of_materials(manifest, findings, report.created),
        DATA_CARD_FILE: data_card(manifest, findings, report.created),
    }
    shown = {
        name: (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode()
        for name, card in cards.items()
    }
    return {PAGE_FILE: render_release(report).encode()} | shown


def _read_again(report: ReleaseReport) -> dict[str, Any]:
    """The findings, with the order of keys that whoever reads the report gets."""
    return dict(parse_json(canonical_json(report.findings)))


def find_unlike(release: Release, manifest: Manifest) -> list[str]:
    """Names of the files that were signed, but are not those that this release of FlexOlmo makes of
    the claims, so that they may say something else."""
    try:
        shown = make_shown(release.report, manifest)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return [PAGE_FILE, BOM_FILE, DATA_CARD_FILE]  # findings of another form
    return [name for name, data in shown.items() if release.files[name] != data]


def _blocks(report: ReleaseReport, stays: Mapping[str, Any] | None) -> Iterator[Block]:
    found = _read_again(report)
    yield Text(f"Release report: {report.name}", "h1")
    yield Text(
        f"Bundle number {report.serial} of {report.owner}. For the owner and the owner's "
        "data-protection officer: what was trained on the owner's text, what is promised of "
        "privacy, what is not, and what attacks found. An expert is a set of weights that is used "
        "beside a public model, the anchor; the bundle is the signed file that carries it.",
        "lead",
    )
    if stays is None:
        yield Text(
            "This copy may leave with the bundle. It holds no text of the owner's. Counts of the "
            f"text are rounded, and none is of fewer than {found['least_documents']} documents; "
            "figures of attacks are exact, of the documents that were attacked, which may be fewer."
        )
    else:
        yield Text(str(stays["notice"]), term="Stays here. ")
    yield Text("At a glance", "h2")
    yield _glance(found)
    yield from _promise(found)
    yield from _attacks(found)
    yield from _text(found, stays)
    yield from _training(report, found)
    yield from _checking(report, found)
    if stays is not None:
        yield from _hits(stays)


def _glance(found: Mapping[str, Any]) -> Table:
    budget = found["guarantee"]["budget"]
    promise: Row = ["Is there a guarantee of privacy?", Cell("no", _LEVELS["some"]), "–", "–"]
    if budget:
        promise = [
            "Is there a guarantee of privacy?",
            Cell("yes", _LEVELS["little"]),
            f"epsilon {budget['epsilon']:.3g}, delta {budget['delta']:g}, for each "
            f"{budget['unit']}",
            "–",
        ]
    rows = [promise]
    for name, audit in AUDITS.items():
        made = next((x for x in found["attacks"] if x["audit"] == name), None)
        if made is None:
            rows.append([audit.question, Cell("not asked", italic=True), "–", "–"])
            continue
        head = made["headline"]
        rows.append(
            [
                audit.question,
                Cell(answer_of(made["level"]), _LEVELS[made["level"]], bold=True),
                "–" if head is None else f"{head['measure']}: {figure_of(head)}",
                _control(made),
            ]
        )
    head = ["question", "answer", "figure that decides, with its 95\u00a0% interval", "control"]
    return Table(
        "Levels go by the upper end of the interval, of the expert alone or in its mixture",
        head,
        rows,
    )


def answer_of(level: str) -> str:
    """The words of one of `audit.results.LEVELS`."""
    return level if level == "unclear" else f"{level} found"


def _control(made: Mapping[str, Any]) -> str:
    """Words on whether the attack can be believed."""
    said = []
    if made["off_equals_anchor"] is not None:
        is_met = made["off_equals_anchor"]
        said.append(f"off {'equals' if is_met else 'DIFFERS FROM'} the anchor, to the bit")
    if made["control"] is not None:
        said.append(f"an overfitted expert: {figure_of(made['control'])}")
    return "; ".join(said) or "none"


def figure_of(row: Mapping[str, Any]) -> str:
    """A figure with its interval, as its unit is written."""
    value = row["value"]
    low = row["low"]
    high = row["high"]
    if row["unit"] == "share":
        ends = "" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})"
        return f"{format_percent(value)}{ends}"
    digits = {"auc": 3, "bits": 4, "epsilon": 2}[row["unit"]]
    ends = "" if low is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{value:.{digits}f}{ends}"


# --- parts --------------------------------------------------------------------------------------


def _promise(found: Mapping[str, Any]) -> Iterator[Block]:
    guarantee = found["guarantee"]
    budget = guarantee["budget"]
    yield Text("What is promised", "h2")
    if budget:
        yield Text(
            f"Whether any one {budget['unit']} was in the text changes the chance of any bundle by "
            f"a factor of at most e^{budget['epsilon']:.3g}, but for a chance of "
            f"{budget['delta']:g}: whatever else somebody knows, and whatever attack they think "
            "of. This holds for the weights and the router's table together."
        )
        of_the_table = ""
        if guarantee["table_epsilon"] is not None:
            of_the_table = f" (alone, epsilon {guarantee['table_epsilon']:.4g})"
        unit = _UNITS.get(budget["unit"], "all texts of one value of the field named below")
        rows: list[Row] = [
            ["Protected as one", f"{budget['unit']}: {unit}"],
            ["Neighbours", str(budget["neighbours"])],
            ["Epsilon, delta", f"{budget['epsilon']:.4g}, {budget['delta']:g}"],
            ["Clipping norm", f"{budget['clip_norm']:g}"],
            ["Sampling", f"{budget['sampling']}, rate {budget['sampling_rate']:.4g}"],
            ["Steps", f"{budget['steps']:,}"],
            ["Noise of a step", f"{budget['noise']:.4g} clipping norms"],
            ["Noise of the table", f"{budget['table_noise']:.4g}{of_the_table}"],
            ["Accountant", str(budget["accountant"])],
        ]
        yield Table(
            "From these numbers, whole in the manifest, anybody can work epsilon out again",
            ["what", "value"],
            rows,
        )
    else:
        yield Text(
            "There is no guarantee. Nothing bounds what the weights may tell of a document; what "
            "follows is what attacks found, and another attack may find more.",
            term="In plain words: ",
        )
        if None not in (guarantee["table_epsilon"], guarantee["table_delta"]):
            yield Text(
                f"The router's table alone is noised, to epsilon {guarantee['table_epsilon']:g} "
                f"and delta {guarantee['table_delta']:g}; the weights are not."
            )
        elif guarantee["least_documents"] is not None:
            yield Text(
                "The router's table tells only of tokens and pairs of tokens that at least "
                f"{guarantee['least_documents']} documents hold, in coarse steps."
            )
    yield Text("What is outside", "h2")
    yield Items([Text(sentence) for sentence in found["outside"]])


def _attacks(found: Mapping[str, Any]) -> Iterator[Block]:
    yield Text("What attacks found", "h2")
    yield Text(
        "Expert alone: past the router of a mixture, as whoever has the bundle can run it. On, "
        "off: in its mixture, as whoever asks a server meets it. The anchor, which never saw the "
        "text, shows what an attack finds where there is nothing to find. AUC: how often an attack "
        "picks the right one of two; 0.5 is guessing, 1 certainty.",
        "note",
    )
    for made in found["attacks"]:
        yield Text(f" {made['verdict']}", term=made["question"])
        yield Table(
            f"{made['audit']}, with 95 % intervals",
            ["model", "measure", "found", "by guessing"],
            [[r["model"], r["measure"], figure_of(r), _chance(r)] for r in made["rows"]],
            "llr",
        )
        how = _in_words(made["settings"])
        twin = ""
        if made["is_of_a_twin"]:
            twin = (
                " on a twin, an expert that was trained alike on what the owner says is this text "
                "with canaries,"
            )
        yield Text(f"Made{twin} with {how}. Control: {_control(made)}.{_doubt(made)}", "note")
    if found["not_made"]:
        yield Text("Not made, so that nothing is known of what they ask:", term="")
        yield Items(
            [
                Text(f": {AUDITS[name].question} ({_COMMANDS[name]})", term=name)
                for name in found["not_made"]
            ]
        )


def _in_words(settings: Mapping[str, Any]) -> str:
    """Settings for people, by name."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def _doubt(made: Mapping[str, Any]) -> str:
    """Words on an attack of which nothing shows that it can succeed."""
    if made["control"] is not None or made["audit"] not in ("membership", "extraction"):
        return ""
    return (
        " No expert that knows its text by heart was attacked: nothing here shows that the attack "
        "finds out one that does (--control)."
    )


def _chance(row: Mapping[str, Any]) -> str:
    if row["chance"] is None:
        return "–"
    return figure_of(dict(row) | {"value": row["chance"], "low": None, "high": None})


def _text(found: Mapping[str, Any], stays: Mapping[str, Any] | None) -> Iterator[Block]:
    data = found["data"]
    text = found["text"] if stays is None else stays["text"]
    counts = text["counts"]

    def said(count: int | None, withheld: str = f"fewer than {found['least_documents']}") -> str:
        return withheld if count is None else f"{count:,}"

    yield Text("The text", "h2")
    unit = "documents" if data["unit_field"] is None else f"units, by {data['unit_field']}"
    rows: list[Row] = [
        [f"Source {unit}, in the training split", said(counts["documents"])],
        ["Bytes", said(counts["bytes"], "not told")],
        ["Tokens", said(counts["tokens"], "not told")],
        ["Left out, being in the public set too", said(counts["removed_as_public"])],
        ["Licences", "; ".join(data["licences"]) or "–"],
    ]
    yield Table("What was given to training", ["what", "value"], rows)
    yield Table(
        "Personal data, by pattern. A pattern knows a form, not a person: names, and what is told "
        "of people, are not found",
        ["kind", "documents", "matches", "counted is, and is not"],
        [
            [
                kind,
                said(x["documents"]),
                said(x["matches"], "not told"),
                found["limits_of_patterns"][kind],
            ]
            for kind, x in text["personal"].items()
        ],
        "lrrl",
    )
    overlap = text["overlap"]
    if overlap is None:
        yield Text("Distance from public text was not measured: no public set was given.")
        return
    short = "An untold share (the text is too short)"
    if overlap["short"] is not None:
        is_less = overlap["short"] < 0.01
        short = "Less than 1 %" if is_less else format_percent(overlap["short"], 0)
    yield Text(
        f"{short} of all spans of {overlap['short_tokens']} tokens occur word for word in the "
        f"public set's training text. A span of {overlap['long_tokens']} tokens that does is in "
        f"{said(overlap['long'])} of the documents: there the anchor may know the text already.",
        term="Distance from public text: ",
    )


def _training(report: ReleaseReport, found: Mapping[str, Any]) -> Iterator[Block]:
    training = found["training"]
    recipe = training["recipe"]
    steps = recipe.get("train", {}) if isinstance(recipe.get("train"), dict) else {}
    read = f"sequences of {steps.get('seq_len', '–')} tokens"
    tokens = f"{training['tokens_seen']:,}"
    privacy = recipe.get("privacy")
    if found["guarantee"]["budget"] is not None and isinstance(privacy, dict):
        unit = privacy.get("unit", "–")
        windows = 1 if unit == "sequence" else privacy.get("windows", "–")
        read = (
            f"units ({unit}) in the mean, of each up to {windows} windows of "
            f"{steps.get('seq_len', '–')} tokens"
        )
        tokens = f"at most {tokens} in the mean"
    yield Text("What was trained", "h2")
    rows: list[Row] = [
        ["Parts that training could change", str(recipe.get("scope", "–"))],
        ["Sizes", _in_words(training["architecture"])],
        ["Parameters", format_count(training["parameters"])],
        ["Bytes of weights", f"{format_megabytes(training['weights_bytes'])} MB"],
        [
            "Training",
            f"{steps.get('steps', '–')} steps of {steps.get('batch_size', '–')} {read}, "
            f"{steps.get('optimizer', '–')}",
        ],
        ["Tokens read", tokens],
        ["Router", str(training["router"]["kind"])],
        ["Packed", training["packed"]],
        ["Software", ", ".join(f"{k} {v}" for k, v in training["software"].items())],
        ["Weights", Cell(training["weights_digest"], mono=True)],
        ["Anchor", Cell(training["anchor_digest"], mono=True)],
    ]
    yield Table(
        "The whole recipe is in the bundle's manifest and in report.json", ["what", "value"], rows
    )
    terms = found["terms"]
    yield Text("Licence and terms", "h2")
    yield Text(str(found["licence"]), term="Licence: ")
    yield Text(str(terms["summary"]) + ".", term="Terms: ")
    yield Text(str(terms["text"]), "note")


def _checking(report: ReleaseReport, found: Mapping[str, Any]) -> Iterator[Block]:
    yield Text("What this report is of, and how to check it", "h2")
    rows: list[Row] = [
        ["Bundle (digest of its manifest.json)", Cell(report.bundle_digest, mono=True)],
        ["Made", report.created],
    ]
    for made in found["attacks"]:
        rows.append([f"Results of {made['audit']}", Cell(made["results_digest"], mono=True)])
    yield Table("Digests", ["what", "value"], rows)
    if report.measures:
        ends = [f"{m} {show_value(m, figure.high)}" for m, figure in report.measures.items()]
        yield Text(
            "A coordinator can demand limits of a report (flexolmo mix build --require). Held "
            f"against them are the upper ends of intervals: {', '.join(ends)}.",
            "note",
        )
    yield Text(
        f"flexolmo audit verify-report {report.name}.report --bundle {report.name}.bundle "
        "--trust DIRECTORY_OF_OWNERS",
        "pre",
    )


def _hits(stays: Mapping[str, Any]) -> Iterator[Block]:
    yield Text("Known by heart (stays here)", "h2")
    memorised: Sequence[Mapping[str, Any]] | None = stays["memorised"]
    if memorised:
        yield Table(
            "The longest span of each document that the model wrote word for word, after its "
            "beginning",
            ["document", "similarity", "beginning", "what it went on with"],
            [
                [
                    f"{x['document']}{' (extracted)' if x['is_extracted'] else ''}",
                    f"{x['similarity']:.2f}",
                    x["prefix"],
                    Cell(x["span"], bold=x["is_extracted"]),
                ]
                for x in memorised
            ],
            "lrl",
        )
    elif memorised is None:
        yield Text(_UNKNOWN.format("extraction"))
    else:
        yield Text("Extraction wrote no span that is long enough to be shown.")
    yield Text("Documents hit worst by membership attacks (stays here)", "h2")
    worst: Sequence[Mapping[str, Any]] | None = stays["worst_documents"]
    if worst:
        yield Table(
            "Documents of the training split that the strongest attack is surest of",
            ["document", "surer than of so many others", "begins", "tokens that give it away"],
            [
                [
                    str(x["document"]),
                    format_percent(x["above_others"], 0),
                    x["begins"],
                    " ".join(repr(t["token"]) for t in x["tokens"]),
                ]
                for x in worst
            ],
            "lrl",
        )
    elif worst is None:
        yield Text(_UNKNOWN.format("membership"))
    else:
        yield Text("The attack on membership lists no document.")
