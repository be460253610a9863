"""The page of `flexolmo audit summary`: public summary of a mixture's training content.

Shows what `audit.summary` found, under the headings of the Commission's template.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexolmo.audit.summary import KINDS, PROVIDER
from flexolmo.report.page import Block, Cell, Row, Table, Text, save_page

_ROWS = {  # of a source, which says of each that it is not stated
    "description": "Description",
    "size": "Size",
    "languages": "Languages",
    "collected_until": "Latest acquisition of text",
    "licences": "Licences of the text",
}
_MORE = {  # of a source, if there is such a thing
    "link": "Where it can be had",
    "owner": "Owner, who keeps the text",
    "packed": "Expert packed",
    "expert_licence": "Licence of the expert",
    "terms": "Terms of use",
}


def write_summary_page(summary: Mapping[str, Any], out: Path) -> Path:
    """Write page.html and page.md in `out`; the path of the first."""
    return save_page(_blocks(summary), out / "page.html", out / "page.md")


def say(value: Any, ask: str) -> str:
    """`value` for people, or whom to ask."""
    if value is None or value == []:
        return f"not stated: ask {ask}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "; ".join(value) if isinstance(value, list) else str(value)


def _blocks(summary: Mapping[str, Any]) -> Iterator[Block]:
    model = summary["model"]
    yield Text(f"Public summary of training content: {model['name'] or 'a mixture'}", "h1")
    yield Text(
        "Of exactly the sources that are on: the public text of the anchor, the model that all "
        "share, and the text of each owner whose expert takes part. Owners keep their text; an "
        "expert that is off takes part in no answer.",
        "lead",
    )
    yield Text(
        f"Follows the structure of: {summary['template']}. Last update: {summary['created']}. "
        "Figures and names are as owners signed them and as the provider gave them; nobody else "
        "has checked them. No legal advice.",
        "note",
    )
    yield from _general(summary)
    yield Text("2 List of data sources", "h2")
    yield from _sources(summary["sources"])
    yield Text("3 Data processing aspects", "h2")
    yield from _processing(summary)
    yield from _digests(summary)


def _general(summary: Mapping[str, Any]) -> Iterator[Block]:
    provider = summary["provider"]
    model = summary["model"]
    rows: list[Row] = [
        ["Name", say(provider["name"], PROVIDER)],
        ["Contact", say(provider["contact"], PROVIDER)],
        ["Authorised representative", provider["representative"] or "none named"],
    ]
    yield Text("1 General information", "h2")
    yield Table("1.1 Provider identification", ["what", "answer"], rows)
    rows = [
        ["Versioned model name", say(model["name"], PROVIDER)],
        ["Placed on the Union market", say(model["placed_on_market"], PROVIDER)],
        ["Made from other models", model["dependencies"] or "none named"],
    ]
    yield Table("1.2 Model identification", ["what", "answer"], rows)
    overall = summary["overall"]
    rows = [
        ["Modality", f"{overall['modality']}; no image, audio or video"],
        ["Size of the training data", _overall(summary, "size")],
        ["Latest acquisition of text", _overall(summary, "collected_until")],
        ["Languages", _overall(summary, "languages")],
        ["Other characteristics", model["other"] or "none named"],
    ]
    yield Table(
        "1.3 Modalities, overall size of the training data and other characteristics",
        ["what", "answer"],
        rows,
    )


def _overall(summary: Mapping[str, Any], key: str) -> str:
    """The answer for all sources, and whom to ask for the rest of it."""
    value = summary["overall"][key]
    sources = summary["sources"].values()
    asked = dict.fromkeys(x["ask"] for x in sources if x[key] is None)
    if not value:  # a sum of sizes may be unclear where each is known
        return say(None, ", ".join(asked or dict.fromkeys(x["ask"] for x in sources)))
    return say(value, "") + (f"; for the rest {say(None, ', '.join(asked))}" if asked else "")


def _sources(sources: Mapping[str, Mapping[str, Any]]) -> Iterator[Block]:
    for kind, heading in KINDS.items():
        yield Text("", term=heading)
        used = {n: x for n, x in sources.items() if kind in (x["kinds"] or ())}
        for name, source in used.items():
            if kind == source["kinds"][0]:
                yield _source(name, source)
            else:
                where = KINDS[source["kinds"][0]].split()[0]
                yield Text(f" is described under {where}.", term=name)
        if not used:
            yield Text("No source that is on is stated to be of this kind.", "note")
    unstated = {n: x for n, x in sources.items() if x["kinds"] is None}
    if unstated:
        yield Text("", term="Under which of these headings is not stated")
        for name, source in unstated.items():
            yield _source(name, source)


def _source(name: str, source: Mapping[str, Any]) -> Table:
    rows: list[Row] = [[title, say(source[key], source["ask"])] for key, title in _ROWS.items()]
    rows += [[title, say(source[k], "")] for k, title in _MORE.items() if source.get(k)]
    if source["kinds"] is None:
        rows.insert(0, ["Kind of source", say(None, source["ask"])])
    return Table(name, ["what", "answer"], rows)


def _processing(summary: Mapping[str, Any]) -> Iterator[Block]:
    whole = summary["processing"]
    sources = summary["sources"]
    for key, title in (
        ("reservations", "3.1 Respect of reservation of rights from text and data mining"),
        ("illegal_content", "3.2 Removal of illegal content"),
    ):
        rows: list[Row] = [["Measures of the provider", say(whole[key], PROVIDER)]]
        if key == "reservations":
            signed = say(whole["signed_code_of_practice"], PROVIDER)
            rows.insert(0, ["Signatory to the Code of Practice", signed])
        rows += [[name, say(source[key], source["ask"])] for name, source in sources.items()]
        yield Table(title, ["of", "answer"], rows)
    rows = [["Provider", whole["other"] or "nothing"]]
    for name, source in sources.items():
        if source.get("privacy") is not None:
            rows.append([name, f"differentially private training: {source['privacy']}"])
        kinds = source.get("personal_data")
        if kinds is not None:
            found = say(kinds, "") if kinds else "no kind in so many documents"
            rows.append(
                [
                    name,
                    "personal data that patterns, of a form and not of names, found in at least "
                    f"{source['personal_data_documents']} documents: {found}",
                ]
            )
    yield Table("3.3 Other information", ["of", "answer"], rows)


def _digests(summary: Mapping[str, Any]) -> Iterator[Block]:
    model = summary["model"]
    held = summary["held"]
    yield Text("Which model this is a summary of", "h2")
    rows: list[Row] = [
        ["Model, with what is on and nothing else", Cell(model["digest"], mono=True)],
        ["Anchor", Cell(model["anchor_digest"], mono=True)],
    ]
    rows += [[name, Cell(d, mono=True)] for name, d in model["bundle_digests"].items()]
    yield Table("On: the anchor and the bundles, by manifest", ["what", "digest"], rows)
    yield Text("Held, but off", "h2")
    if not held["off"]:
        yield Text("Nothing: all sources that the mixture holds are on.")
        return
    yield Text(
        "The mixture holds these bundles too. They are off, and no answer depends on a byte of "
        "them: it is, bit for bit, that of a mixture which never held them."
    )
    rows = [[name, Cell(d, mono=True)] for name, d in held["off"].items()]
    rows.append(["the mixture as held (mixture.json)", Cell(held["mixture_digest"], mono=True)])
    yield Table("Off", ["what", "digest"], rows)
