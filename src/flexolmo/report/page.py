"""What a page is made of, and the page as HTML.

A page is a list of blocks, built once; here a block is written as HTML, in `page_png` it is drawn,
so both say the same. The HTML loads nothing from anywhere and runs no script; a policy in its head
forbids both. Everything shown goes through `make_printable` and is escaped: it may be what a model
wrote. Knows nothing of results.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from flexolmo.terminal import make_printable


@dataclass(frozen=True)
class Text:
    text: str
    kind: str = "p"  # h1, h2, lead, p or note


@dataclass(frozen=True)
class Cell:
    text: str
    tint: str | None = None
    bold: bool = False
    mono: bool = False
    number: bool = False


@dataclass(frozen=True)
class Table:
    caption: str
    head: list[str]
    rows: list[list[Cell]]  # the first cell of a row is its heading


@dataclass(frozen=True)
class Picture:
    name: str  # figures/NAME.png
    figure: Figure
    alt: str
    caption: str


@dataclass(frozen=True)
class Sample:
    source: str
    colour: str
    prompt: str
    parts: tuple[str, str]  # with the source, without it
    mono: bool


@dataclass(frozen=True)
class Fold:
    title: str
    text: str


Block = Text | Table | Picture | Sample | Fold


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


def write_html(blocks: Sequence[Block], images: Mapping[str, bytes]) -> str:
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


def _block_html(block: Block, images: Mapping[str, bytes]) -> str:
    if isinstance(block, Text):
        if block.kind in ("h1", "h2"):
            return f"<{block.kind}>{_e(block.text)}</{block.kind}>"
        return f'<p class="{block.kind}">{_e(block.text)}</p>'
    if isinstance(block, Table):
        numbers = [any(r[i].number for r in block.rows) for i in range(len(block.head))]
        head = "".join(
            f'<th scope="col" class="{"n" * is_n}">{_e(h).replace("_", "_<wbr>")}</th>'
            for h, is_n in zip(block.head, numbers, strict=True)
        )
        rows = "\n".join(
            "<tr>" + "".join(_cell_html(c, i == 0) for i, c in enumerate(r)) + "</tr>"
            for r in block.rows
        )
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{_e(block.caption)}">'
            f"<table><caption>{_e(block.caption)}</caption>\n<thead><tr>"
            f"{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
        )
    if isinstance(block, Picture):
        data = base64.b64encode(images[block.name]).decode()
        width = round(block.figure.get_figwidth() * 98)
        return (
            f'<figure><img width="{width}" alt="{_e(block.alt)}" '
            f'src="data:image/png;base64,{data}">\n'
            f"<figcaption>{_e(block.caption)}</figcaption></figure>"
        )
    if isinstance(block, Fold):
        return (
            f"<details><summary>{_e(block.title)}</summary>"
            f'<pre class="mono">{_e(block.text)}</pre></details>'
        )
    sections = "\n".join(
        f'<section><h3>{word} {_e(block.source)}</h3><pre class="{"mono" * block.mono}">'
        f'<span class="prompt">{_e(block.prompt)}</span>{_e(text)}</pre></section>'
        for word, text in zip(("with", "without"), block.parts, strict=True)
    )
    return f'<div class="pair" style="--own:{block.colour}">\n{sections}\n</div>'


def _cell_html(cell: Cell, is_heading: bool) -> str:
    tag = 'th scope="row"' if is_heading else "td"
    classes = " ".join(
        c for c, on in (("n", cell.number), ("b", cell.bold), ("mono", cell.mono)) if on
    )
    tint = f' style="background:{cell.tint}33"' if cell.tint else ""
    text = _e(cell.text).replace("_", "_<wbr>")  # long names may break there
    return f'<{tag} class="{classes}"{tint}>{text}</{tag[:2]}>'
