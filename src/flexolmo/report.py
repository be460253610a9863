"""Results of a run and their figures -> one HTML file, and the same page as PNG.

The page is a list of blocks built once from the results; one function writes a block as HTML,
another draws it, so both say the same. The HTML loads nothing from anywhere and runs no script; a
policy in its head forbids both. Everything shown goes through `make_printable` and is escaped: it
may be what a model wrote. Knows nothing of models; a missing result leaves its part out.
"""

import base64
import functools
import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.transforms import IdentityTransform

from flexolmo import plots
from flexolmo.files import write_bytes
from flexolmo.plots import INK, MUTED, RULE, Results, make_printable, percent

_PAGE_PX, _MARGIN_PX, _BODY_PX = 1600, 60, 18
_MAX_DRAWN_LETTERS, _MAX_DRAWN_LINES = 900, 30  # of a sample in the PNG; the HTML has all of it
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
_GOOD, _BAD = "#009E73", "#D55E00"

_WHAT_BITS_ARE = (
    "Bits per byte: how many bits the model needs, on average, to write down one byte of text it "
    "has not seen, minus the base-2 logarithm of the probability it gave that byte. Lower is "
    "better. A model that knows nothing needs 8; one that is certain and right needs 0. From 2.0 "
    "to 1.9 means files 5 % smaller if the model were used to compress. Counted by byte, models "
    "with different vocabularies can be compared.")
_WHY_OURS = (
    "The paper's router has one row of weights per expert and layer, read against the hidden "
    "state, with a negative bias. Each owner trains its row to answer \"mine or public?\" and "
    "never meets another owner, so after merging nothing has compared the rows with each other; "
    "in short training they also hardly leave their start. Ours counts evidence instead: how much "
    "likelier each recent token is in the owner's text than in public text. It takes no training, "
    "has one scale for all owners, and an owner's part depends on the anchor and that owner alone, "
    "so switching off stays exact. The paper's is an option.")


# --- blocks ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Text:
    text: str
    kind: str = "p"  # h1, h2, lead, p or note


@dataclass(frozen=True)
class _Cell:
    text: str
    tint: str | None = None
    bold: bool = False
    mono: bool = False
    number: bool = False


@dataclass(frozen=True)
class _Table:
    caption: str
    head: list[str]
    rows: list[list[_Cell]]  # the first cell of a row is its heading


@dataclass(frozen=True)
class _Picture:
    name: str  # figures/NAME.png
    figure: Figure
    alt: str
    caption: str


@dataclass(frozen=True)
class _Sample:
    source: str
    colour: str
    prompt: str
    parts: tuple[str, str]  # with the source, without it
    mono: bool


@dataclass(frozen=True)
class _Fold:
    title: str
    text: str


_Block = _Text | _Table | _Picture | _Sample | _Fold


def write_report(results: Results, directory: Path) -> Path:
    """Write report.html, report.png and figures/*.png into `directory`; the path of the HTML.

    `results` is results.json. All files are replaced whole, and the HTML last.
    """
    directory = Path(directory)
    blocks = list(_blocks(results))
    images = {}
    for block in blocks:
        if isinstance(block, _Picture):
            path = directory / "figures" / f"{block.name}.png"
            plots.save_figure(block.figure, path)
            images[block.name] = path.read_bytes()
    plots.save_figure(_draw_page(blocks), directory / "report.png", dpi=100)
    write_bytes(directory / "report.html", _write_html(blocks, images).encode())
    return directory / "report.html"


# --- results -> blocks -----------------------------------------------------------------------

def _blocks(results: Results) -> Iterator[_Block]:
    names, bits = plots.owner_names(results), plots.bits_table(results)
    has_paper = bool(plots.bits_table(results, paper=True))
    colours = plots.owner_colours(results)
    yield _Text("FlexOlmo: one model from owners who share no data", "h1")
    for sentence in _opening(results):
        yield _Text(sentence, "lead")
    bars = (results.get("summary") or {}).get("bars") or []
    if bars:
        met = sum(b.get("met") is True for b in bars)
        yield _Text("What was asked of this run, and what it reached", "h2")
        yield _Table(f"{met} of {len(bars)} met", ["Verdict", "Asked", "Measured"],
                     [_bar_row(b) for b in bars])
    for name, why in (results.get("skipped") or {}).items():
        yield _Text(f"Left out of this run: {name} ({why}).", "note")
    yield _Text("What was trained, and by whom", "h2")
    yield _owners_table(results, colours)
    if bits:
        yield _Text("How well each model predicts each set", "h2")
        yield _Text(_WHAT_BITS_ARE, "note")
        yield _bits_table(results, bits, colours)
        yield _Picture("bits_per_byte", plots.plot_bits_per_byte(results),
                       "Bits per byte by set: anchor, that set's expert alone, mixture, and "
                       "mixture without that expert; the numbers are in the table above.",
                       "The nearer the filled circle is to the diamond, the more of an expert "
                       "survives merging; a cross on the bar means that switching off leaves "
                       "what the public model knew.")
        yield _Text("Switching an owner off", "h2")
        yield _Picture("optout_matrix", plots.plot_optout_matrix(results),
                       "Matrix of the change of bits per byte against the anchor, by owner "
                       f"switched off and by set. {' '.join(_opening(results)[2:3])}",
                       "Read down a column: only the outlined cell, the owner's own set, should "
                       "change, and it should go to 0.")
    if (results.get("routing") or {}).get("weights"):
        yield _Text("Who answers", "h2")
        yield _Picture("routing", plots.plot_routing(results),
                       "Heat map of the mean weight of each expert in each layer, by set.",
                       "How our router shares the answer between experts on held-out text.")
    if has_paper:
        yield _Text("The paper's router beside ours", "h2")
        yield _Text(_WHY_OURS + _compare_routers(results))
        yield _router_table(results, names)
        yield _Picture("kept_gain", plots.plot_kept_gain(results),
                       "Bars: each expert's gain alone and what the mixture keeps of it, with our "
                       "router and with the paper's; the numbers are in the table above.",
                       "Pale: the anchor with one expert. Solid and hatched: all experts merged, "
                       "on the same text. Each router is held against its own pair.")
        if (results["paper_router"].get("routing") or {}).get("weights"):
            yield _Picture("routing_paper", plots.plot_routing(results, paper=True),
                           "Heat map of the paper's router: mean weight of each expert in each "
                           "layer, by set.", "The same text, answered through the paper's router.")
    samples = results.get("samples") or []
    if samples:
        yield _Text("The same prompt with and without a source", "h2")
        yield _Text("Small models write poorly; what to look at is whose words they use.", "note")
    described = {o.get("name"): str(o.get("set_description", "")) for o in
                 results.get("owners") or []}
    for s in samples:
        source, prompt = str(s.get("source", "")), str(s.get("prompt", ""))
        about = f"{source} {described.get(source, '')}".lower()
        yield _Sample(source, colours.get(source, plots.GREY), prompt,
                      (str(s.get("with", "")).removeprefix(prompt),
                       str(s.get("without", "")).removeprefix(prompt)),
                      re.search(r"\bcode\b|python|program|javascript", about) is not None)
    yield _Text("Where these numbers come from", "h2")
    stages = results.get("seconds") or {}
    if stages:
        yield _Table("Seconds by stage", ["Stage", "Seconds"],
                     [[_Cell(str(k)), _Cell(_count(v, 1), number=True)]
                      for k, v in stages.items()])
    yield _Table("Seed, commit, versions and digests", ["What", "Value"], [
        [_Cell(k), _Cell(v, mono=True)] for key in ("seed", "commit", "versions", "machine",
                                                    "digests")
        if results.get(key) is not None for k, v in _flatten(results[key], key)] + [
        [_Cell(f"signing key of {o.get('name')}"), _Cell(str(o["key_id"]), mono=True)]
        for o in results.get("owners") or [] if o.get("key_id")])
    if results.get("recipe"):
        yield _Fold("Recipe", json.dumps(results["recipe"], indent=2, ensure_ascii=False,
                                         default=str))


def _opening(results: Results) -> list[str]:
    """Up to three sentences for a reader who knows nothing of this, with the run's own numbers."""
    names, bits = plots.owner_names(results), plots.bits_table(results)
    n, found = len(names), _summary(results)
    size = (results.get("anchor") or {}).get("parameters")
    total = (results.get("seconds") or {}).get("total")
    took = f", all in {_duration(total).replace(' min', ' minutes')}." if total else "."
    said = [f"{(_NUMBERS[n] if n < 8 else str(n)).capitalize()} owner{'s' * (n != 1)} "
            f"({_listed(names)}) {'each ' * (n > 1)}trained one expert on "
            f"{'their' if n > 1 else 'its'} own text alone, beside a public model that nobody "
            "changed" + (f" (the anchor, {size / 1e6:.1f} million parameters)" if size else "")
            + ", and handed over one signed file; a coordinator merged the files into a mixture"
            + took] if names else []
    change = {s: plots.relative_change(bits, "mixture", s) for s in names}
    change = {s: x for s, x in change.items() if not math.isnan(x)}
    if change:
        best, worst = min(change, key=change.__getitem__), max(change, key=change.__getitem__)
        ends = [f"{_fewer(change[worst])} ({worst})", f"{_fewer(change[best])} ({best})"]
        span = ends[1] if len(change) == 1 else f"between {ends[0]} and {ends[1]}"
        public = found["public_change"]
        said.append(f"To predict a byte of an owner's text that no model was trained on, the "
                    f"mixture needs {span} than the public model alone"
                    + (f"; on public text it needs {_fewer(public)}." if not math.isnan(public)
                       else "."))
    off, side = found["optout_vs_anchor"], found["optout_side_effect"]
    if off:
        far = max(off, key=lambda s: abs(off[s]))
        said.append(f"Switch an owner off, with nothing trained again, and on that owner's text "
                    f"the model is within {_bound(off[far])} of the public model"
                    + (f" (furthest: {far})" if len(off) > 1 else "")
                    + (f", while no other set moves by more than "
                       f"{_bound(max(side.values(), key=abs))}." if side else "."))
    return said


def _summary(results: Results, paper: bool = False) -> dict[str, Any]:
    """The summary of the results, completed from the bits per byte where it is silent."""
    names, bits = plots.owner_names(results), plots.bits_table(results, paper)
    sets, change = plots.set_names(results), functools.partial(plots.relative_change, bits)
    kept, side = {}, {}
    for n in names:
        pair = change(f"expert {n}", n)
        kept[n] = change("mixture", n) / pair if pair else math.nan
        moved = [change(f"mixture without {n}", s, "mixture") for s in sets if s != n]
        side[n] = max([x for x in moved if not math.isnan(x)], key=abs, default=math.nan)
    found = {"kept_of_pair_gain": kept, "optout_side_effect": side,
             "optout_vs_anchor": {n: change(f"mixture without {n}", n) for n in names}}
    given = ((results.get("paper_router") or {}) if paper else results).get("summary") or {}
    whole: dict[str, Any] = {}
    for key, values in found.items():
        values = {**values, **{k: v for k, v in (given.get(key) or {}).items() if v is not None}}
        whole[key] = {k: v for k, v in values.items() if not math.isnan(v)}
    kept = whole["kept_of_pair_gain"]
    if kept:
        kept.setdefault("mean", sum(kept.values()) / len(kept))
    public = given.get("public_change")
    whole["public_change"] = change("mixture", plots.PUBLIC) if public is None else public
    return whole


def _bar_row(bar: Mapping[str, Any]) -> list[_Cell]:
    met = bar.get("met")
    said = "not measured" if met is None else "✓ met" if met else "✗ not met"
    tint = None if met is None else _GOOD if met else _BAD
    return [_Cell(said, tint, bold=True), _Cell(str(bar.get("text", ""))),
            _Cell(str(bar.get("value", "–")))]


def _owners_table(results: Results, colours: Mapping[str, str]) -> _Table:
    anchor, rows = results.get("anchor") or {}, []
    if anchor:
        size = anchor.get("parameters")
        rows.append([_Cell("anchor", plots.GREY, bold=True), _Cell("public"),
                     _Cell("public text" + (f"; {size / 1e6:.1f} million parameters, frozen "
                                            "afterwards" if size else "")),
                     _Cell("–", number=True), _Cell("–", number=True),
                     _Cell(_count(anchor.get("tokens")), number=True),
                     _Cell(_duration(anchor.get("seconds")), number=True),
                     _Cell("–", number=True), _Cell("–")])
    for o in results.get("owners") or []:
        text = str(o.get("set_description") or "–")
        if o.get("sources"):
            text += ". From: " + _listed([str(s) for s in o["sources"]])
        size = o.get("bundle_bytes")
        terms = [str(o[k]) for k in ("licence", "terms") if o.get(k)]
        rows.append([_Cell(str(o.get("name", "?")), colours.get(str(o.get("name"))), bold=True),
                     _Cell(str(o.get("owner") or "–")), _Cell(text),
                     *(_Cell(_count(o.get(k)), number=True)
                       for k in ("documents", "tokens", "tokens_seen")),
                     _Cell(_duration(o.get("seconds")), number=True),
                     _Cell(f"{size / 1e6:.1f} MB" if size else "–", number=True),
                     _Cell("; ".join(terms) or "–")])
    return _Table("Each owner trained beside the same frozen anchor, on its own text alone",
                  ["Expert", "Owner", "Text", "Documents", "Tokens held", "Tokens read in training",
                   "Time", "Signed bundle", "Licence; terms"], rows)


def _bits_table(results: Results, bits: Mapping[str, Mapping[str, float]],
                colours: Mapping[str, str]) -> _Table:
    sets, rows = plots.set_names(results), []
    words = {"anchor": "anchor", "mixture": "mixture, all on"}
    for row, values in bits.items():
        own = row.removeprefix("expert ").removeprefix("mixture without ")
        heading = words.get(row, row if row.startswith("mixture") else f"anchor + {own} alone")
        rows.append([_Cell(heading, bold=row in words)] + [
            _Cell(f"{values[s]:.3f}" if s in values else "–", colours.get(s) if s == own else None,
                  bold=s == own or row == "mixture", number=True) for s in sets])
    return _Table("Bits per byte on held-out text, lower is better; tinted: the owner's own set",
                  ["Model", *sets], rows)


def _router_table(results: Results, names: list[str]) -> _Table:
    ours, papers = _summary(results), _summary(results, paper=True)
    keys = [*(n for n in names if n in ours["kept_of_pair_gain"]), "mean"]
    rows = [[_Cell(f"kept of {n}'s gain alone" if n != "mean" else "kept, mean of owners",
                   bold=n == "mean"),
             *(_Cell(f"{100 * s['kept_of_pair_gain'].get(n, math.nan):.0f}\u00a0%".replace(
                 "nan\u00a0%", "–"),
                     number=True, bold=n == "mean") for s in (ours, papers))] for n in keys]
    for said, key in (("public text, change v the anchor", "public_change"),
                      ("owner off: its set furthest from the anchor", "optout_vs_anchor"),
                      ("owner off: largest change of another set", "optout_side_effect")):
        found = [max(v.values(), key=abs, default=math.nan) if isinstance(v, dict) else v
                 for v in (ours[key], papers[key])]
        rows.append([_Cell(said), *(_Cell(percent(x, 2), number=True) for x in found)])
    return _Table("What each router keeps and costs", ["Measure", "Ours", "The paper's"], rows)


def _compare_routers(results: Results) -> str:
    mean = [_summary(results, p)["kept_of_pair_gain"].get("mean") for p in (False, True)]
    if mean[0] is None or mean[1] is None:
        return ""
    shown = f"ours keeps {100 * mean[0]:.0f}\u00a0% of what each expert gains alone, the paper's " \
            f"{100 * mean[1]:.0f}\u00a0% (mean of owners)."
    return f" In this run {shown}" if mean[0] > mean[1] else f" Not so in this run: {shown}"


# --- words for numbers -----------------------------------------------------------------------

def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _size(fraction: float) -> str:
    return f"{abs(100 * fraction):.1f}\u00a0%"


def _bound(fraction: float) -> str:
    """`fraction` as a percentage that is not below it."""
    return f"{math.ceil(abs(fraction) * 1000 - 1e-6) / 10:.1f}\u00a0%"


def _fewer(fraction: float) -> str:
    return "the same" if abs(fraction) < 5e-4 else \
        f"{_size(fraction)} {'fewer' if fraction < 0 else 'more'} bits"


def _count(x: Any, digits: int = 0) -> str:
    return f"{x:,.{digits}f}" if isinstance(x, int | float) else "–" if x is None else str(x)


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "–"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _flatten(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for k, v in value.items():
            yield from _flatten(v, f"{path}: {k}")
    else:
        yield path, str(value)


# --- blocks -> HTML --------------------------------------------------------------------------

_CSS = """
:root{color-scheme:light dark;--ink:#1f2328;--muted:#59636e;--rule:#d1d9e0;--bg:#fff;--soft:#f6f8fa}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--muted:#9ba6b2;--rule:#3d444d;--bg:#0d1117;
--soft:#161b22}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:2rem;line-height:1.2;margin:.5rem 0 1.25rem}
h2{font-size:1.3rem;margin:3rem 0 .75rem;padding-top:1rem;border-top:1px solid var(--rule)}
p{max-width:78ch;margin:.6rem 0}.lead{font-size:1.12rem}.note,figcaption,caption{color:var(--muted)}
.note{font-size:.95rem}.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.25rem 0;font-size:.9rem}
th,td{padding:.4rem .7rem;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;
overflow-wrap:break-word}
thead th.n{white-space:normal}td.mono{overflow-wrap:anywhere}
thead th{color:var(--muted);font-weight:600;border-bottom-width:2px}
tbody th{font-weight:400}.n{text-align:right;white-space:nowrap}.b,tbody th.b{font-weight:650}
.mono{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.85rem}
figure{margin:1.25rem 0}figure img{max-width:100%;height:auto;display:block;background:#fff;
border-radius:6px;padding:10px;border:1px solid var(--rule)}
figcaption{font-size:.9rem;margin:.4rem 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem;
margin:1rem 0 2rem}.pair section{border:1px solid var(--rule);border-top:4px solid var(--own);
border-radius:6px;background:var(--soft);padding:.75rem 1rem;min-width:0}
.pair section+section{border-top-color:var(--rule)}h3{font-size:.95rem;margin:0 0 .5rem}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:inherit;font-size:.92rem;
unicode-bidi:isolate}pre.mono{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;
font-size:.84rem}.prompt{color:var(--muted)}
"""


def _e(text: Any) -> str:
    return html.escape(make_printable(text), quote=True)


def _write_html(blocks: list[_Block], images: Mapping[str, bytes]) -> str:
    body = "\n".join(_block_html(b, images) for b in blocks)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>FlexOlmo report</title>
<style>{_CSS}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _block_html(block: _Block, images: Mapping[str, bytes]) -> str:
    if isinstance(block, _Text):
        if block.kind in ("h1", "h2"):
            return f"<{block.kind}>{_e(block.text)}</{block.kind}>"
        return f'<p class="{block.kind}">{_e(block.text)}</p>'
    if isinstance(block, _Table):
        numbers = [any(r[i].number for r in block.rows) for i in range(len(block.head))]
        head = "".join(f'<th scope="col" class="{"n" * is_n}">{_e(h).replace("_", "_<wbr>")}</th>'
                       for h, is_n in zip(block.head, numbers, strict=True))
        rows = "\n".join("<tr>" + "".join(_cell_html(c, i == 0) for i, c in enumerate(r)) + "</tr>"
                         for r in block.rows)
        return (f'<div class="scroll" tabindex="0" role="region" aria-label="{_e(block.caption)}">'
                f'<table><caption>{_e(block.caption)}</caption>\n<thead><tr>'
                f"{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>")
    if isinstance(block, _Picture):
        data = base64.b64encode(images[block.name]).decode()
        width = round(block.figure.get_figwidth() * 98)
        return (f'<figure><img width="{width}" alt="{_e(block.alt)}" '
                f'src="data:image/png;base64,{data}">\n'
                f"<figcaption>{_e(block.caption)}</figcaption></figure>")
    if isinstance(block, _Fold):
        return (f"<details><summary>{_e(block.title)}</summary>"
                f'<pre class="mono">{_e(block.text)}</pre></details>')
    sections = "\n".join(
        f'<section><h3>{word} {_e(block.source)}</h3><pre class="{"mono" * block.mono}">'
        f'<span class="prompt">{_e(block.prompt)}</span>{_e(text)}</pre></section>'
        for word, text in zip(("with", "without"), block.parts, strict=True))
    return f'<div class="pair" style="--own:{block.colour}">\n{sections}\n</div>'


def _cell_html(cell: _Cell, is_heading: bool) -> str:
    tag = 'th scope="row"' if is_heading else "td"
    classes = " ".join(c for c, on in (("n", cell.number), ("b", cell.bold), ("mono", cell.mono))
                       if on)
    tint = f' style="background:{cell.tint}33"' if cell.tint else ""
    text = _e(cell.text).replace("_", "_<wbr>")  # long names may break there
    return f'<{tag} class="{classes}"{tint}>{text}</{tag[:2]}>'


# --- blocks -> PNG ---------------------------------------------------------------------------

@functools.lru_cache(maxsize=16384)
def _advance(letter: str, mono: bool, bold: bool) -> float:
    """Width of a letter at one pixel of size."""
    font = get_font(findfont(FontProperties(
        family=_family(mono), weight="bold" if bold else "normal")))
    font.set_size(100, 72)
    return font.load_char(ord(letter)).linearHoriAdvance / 65536 / 100


def _family(mono: bool) -> str:
    return "DejaVu Sans Mono" if mono else "DejaVu Sans"


def _width(text: str, size: float, mono: bool = False, bold: bool = False) -> float:
    widths = (size * _advance(c, mono, bold) for c in text)
    return sum(math.ceil(w) for w in widths) if mono else sum(widths)  # hinting rounds mono up


def _wrap(text: str, width: float, size: float, mono: bool = False, bold: bool = False
          ) -> list[str]:
    """Lines of `text` at most `width` pixels wide; blanks are kept, long words are cut."""
    lines = []
    for paragraph in make_printable(text, _family(mono)).split("\n"):
        line = ""
        for word in re.findall(r"\S+ *| +", paragraph):
            if line and _width(line + word.rstrip(), size, mono, bold) > width:
                lines.append(line)
                line = ""
            while _width(word.rstrip(), size, mono, bold) > width and len(word) > 1:
                cut = max(1, next(i for i in range(1, len(word) + 1)
                                  if _width(word[:i], size, mono, bold) > width) - 1)
                lines.append(word[:cut])
                word = word[cut:]
            line += word
        lines.append(line)
    return lines


class _Sheet:
    """A page drawn from the top; y runs down in pixels, and the height is known at the end."""

    def __init__(self) -> None:
        self.y = float(_MARGIN_PX)
        self.texts: list[tuple[float, float, str, dict[str, Any]]] = []
        self.boxes: list[tuple[float, float, float, float, str, float]] = []
        self.images: list[tuple[float, float, np.ndarray]] = []

    def write(self, text: str, x: float, y: float, width: float, size: float = _BODY_PX,
              colour: str = INK, mono: bool = False, bold: bool = False,
              is_right: bool = False) -> float:
        """Write wrapped text with its top at `y`; the y below it."""
        for line in _wrap(text, width, size, mono, bold):
            self.texts.append((x + width * is_right, y + 1.05 * size, line.rstrip(), {
                "fontsize": size * 0.72, "color": colour, "family": _family(mono),
                "fontweight": "bold" if bold else "normal",
                "ha": "right" if is_right else "left"}))
            y += 1.42 * size
        return y

    def finish(self) -> Figure:
        height = math.ceil(self.y + _MARGIN_PX)
        with rc_context(plots.STYLE):
            fig = Figure(figsize=(_PAGE_PX / 100, height / 100), dpi=100)
            FigureCanvasAgg(fig)
            pixels = IdentityTransform()
            for x, y, w, h, colour, alpha in self.boxes:
                fig.add_artist(Rectangle((x, height - y - h), w, h, lw=0, facecolor=colour,
                                         alpha=alpha, transform=pixels))
            for x, y, image in self.images:
                fig.figimage(image, round(x), round(height - y - image.shape[0]))
            for x, y, text, how in self.texts:
                fig.text(x, height - y, text, transform=pixels, va="baseline", **how)
        return fig


def _draw_page(blocks: list[_Block]) -> Figure:
    sheet, wide = _Sheet(), _PAGE_PX - 2 * _MARGIN_PX
    for block in blocks:
        if isinstance(block, _Text):
            size = {"h1": 38, "h2": 26, "lead": 21, "note": 17}.get(block.kind, _BODY_PX)
            if block.kind == "h2":
                sheet.y += 34
                sheet.boxes.append((_MARGIN_PX, sheet.y, wide, 1, RULE, 1))
                sheet.y += 20
            sheet.y = 10 + sheet.write(block.text, _MARGIN_PX, sheet.y, wide, size,
                                       MUTED if block.kind == "note" else INK,
                                       bold=block.kind in ("h1", "h2"))
        elif isinstance(block, _Table):
            _draw_table(sheet, block, wide)
        elif isinstance(block, _Picture):
            block.figure.set_dpi(wide / plots.MAX_WIDTH_INCHES)
            canvas = FigureCanvasAgg(block.figure)
            canvas.draw()
            image = np.asarray(canvas.buffer_rgba()).copy()
            sheet.images.append((_MARGIN_PX, sheet.y + 14, image))
            sheet.y = sheet.write(block.caption, _MARGIN_PX, sheet.y + image.shape[0] + 24, wide,
                                  16, MUTED) + 20
        elif isinstance(block, _Sample):
            _draw_sample(sheet, block, wide)
        else:
            sheet.y = sheet.write(f"{block.title}: in report.html and results.json.", _MARGIN_PX,
                                  sheet.y, wide, 16, MUTED) + 10
    return sheet.finish()


def _draw_table(sheet: _Sheet, table: _Table, wide: float) -> None:
    size, pad = 15.5, 10.0
    head = [_Cell(h, bold=True, number=any(r[i].number for r in table.rows))
            for i, h in enumerate(table.head)]
    grid = [head, *table.rows]
    # Narrow columns get what they ask for; the widest share what is left.
    asked = [min(700.0, 3 + max(_width(make_printable(line, _family(c.mono)), size, c.mono, c.bold)
                                for c in column for line in
                                (c.text.split("\n") if c is not column[0] else
                                 [max(c.text.split() or [""], key=len)])))
             for column in zip(*grid, strict=True)]
    room, share = wide - 2 * pad * len(asked), max(asked, default=0.0)
    while sum(min(a, share) for a in asked) > room:
        share *= 0.98
    widths = [min(a, share) for a in asked]
    sheet.y = sheet.write(table.caption, _MARGIN_PX, sheet.y + 6, wide, 16, MUTED) + 6
    for i, row in enumerate(grid):
        x, top, bottom, tints = float(_MARGIN_PX), sheet.y, sheet.y, []
        for cell, width in zip(row, widths, strict=True):
            end = sheet.write(cell.text, x + pad, top + 5, width, size, INK if i else MUTED,
                              cell.mono, cell.bold, cell.number)
            tints.append((x, width + 2 * pad, cell.tint))
            x, bottom = x + width + 2 * pad, max(bottom, end + 5)
        sheet.boxes += [(a, top, w, bottom - top, tint, 0.2) for a, w, tint in tints if tint]
        sheet.boxes.append((_MARGIN_PX, bottom, x - _MARGIN_PX, 1 if i else 2, RULE, 1))
        sheet.y = bottom + 1
    sheet.y += 22


def _draw_sample(sheet: _Sheet, sample: _Sample, wide: float) -> None:
    column, top, bottom = (wide - 30) / 2, sheet.y + 10, sheet.y
    for i, (word, text) in enumerate(zip(("with", "without"), sample.parts, strict=True)):
        x = _MARGIN_PX + i * (column + 30)
        y = sheet.write(f"{word} {sample.source}", x + 16, top + 14, column - 32, 17, bold=True)
        for part, colour in ((sample.prompt.removesuffix("\n"), MUTED), (text, INK)):
            short = "\n".join(part[:_MAX_DRAWN_LETTERS].split("\n")[:_MAX_DRAWN_LINES])
            short += " …" if len(short) < len(part) else ""
            y = sheet.write(short, x + 16, y + 4, column - 32, 15.5, colour, sample.mono)
        bottom = max(bottom, y + 14)
    for i, colour in enumerate((sample.colour, RULE)):
        x = _MARGIN_PX + i * (column + 30)
        sheet.boxes += [(x, top, column, bottom - top, "#f6f8fa", 1),
                        (x, top, column, 4, colour, 1)]
    sheet.y = bottom + 18
