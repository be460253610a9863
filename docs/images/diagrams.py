"""Draw the two diagrams of the documentation: python docs/images/diagrams.py. No libraries."""

from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
PALE = {"public": "#e0f2f1", "private": "#fff3e0", "research": "#f3e5f5", "open": "#ffffff"}


def text(x: float, y: float, words: str, size: int = 13, bold: bool = False) -> str:
    """Words centred at x."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}"{weight}>{escape(words)}</text>'


def box(x: float, y: float, w: float, h: float, title: str, *lines: str, fill: str) -> str:
    """A rectangle with a title and lines below it."""
    parts = [
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{PALE[fill]}" '
        'stroke="#37474f"/>'
    ]
    parts.append(text(x + w / 2, y + 20, title, bold=True))
    parts += [text(x + w / 2, y + 38 + 16 * i, line, 12) for i, line in enumerate(lines)]
    return "".join(parts)


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head at its end."""
    return f'<path d="M{x1} {y1} L{x2} {y2}" stroke="#37474f" marker-end="url(#head)"/>'


def save(name: str, width: int, height: int, title: str, *parts: str) -> None:
    """Write an SVG with a white ground, so that it shows on dark pages too."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="sans-serif" text-anchor="middle" fill="#102027">'
        f"<title>{escape(title)}</title>"
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0L10 5L0 10z" fill="#37474f"/></marker></defs>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    )
    (HERE / name).write_text(head + "\n" + "\n".join(parts) + "\n</svg>\n", encoding="utf-8")


def draw_idea() -> None:
    """Owners train apart, a coordinator merges, a deployer switches."""
    parts = [box(20, 130, 130, 80, "anchor", "frozen public", "model", fill="public")]
    for i, owner in enumerate(("hospital", "bank", "publisher")):
        y = 20 + 110 * i
        parts.append(
            box(200, y, 220, 80, owner, "its text stays here;", "trains one expert", fill="private")
        )
        parts.append(arrow(150, 170, 198, y + 40))
        parts.append(arrow(420, y + 40, 548, 170 + 12 * (i - 1)))
        parts.append(text(480, y + (28, 30, 56)[i], "signed bundle", 11))
    parts.append(
        box(550, 130, 140, 80, "coordinator", "checks and merges,", "trains nothing", fill="public")
    )
    parts.append(arrow(690, 170, 738, 170))
    parts.append(
        box(
            740,
            110,
            180,
            120,
            "mixture",
            "hospital: on",
            "bank: off",
            "publisher: on",
            "the deployer decides",
            fill="public",
        )
    )
    parts.append(text(830, 256, "off = never merged, bit for bit", 11))
    title = (
        "An anchor goes to three owners; each trains an expert on text that stays with it and "
        "sends a signed bundle; a coordinator merges the bundles into a mixture in which a "
        "deployer switches each owner on or off."
    )
    save("idea.svg", 940, 350, title, *parts)


ROOMS = [
    [("errors files numbers terminal progress config runtime", "words, files, settings", "open")],
    [
        ("bundle", "manifest, signature, checks; no torch", "public"),
        ("data", "documents to tokens; no network", "private"),
    ],
    [("model", "decoder, router, mixture, checkpoint", "public")],
    [("train", "one loop; anchor, expert, compression", "private")],
    [("merge", "mixture on disk, stock export", "public")],
    [
        ("inference", "policy, decoding, engine", "public"),
        ("trace", "where an output may come from", "private"),
    ],
    [("serving", "who may use what, with proof; no torch", "public")],
    [
        ("evaluation", "bits per byte, scorer", "public"),
        ("audit", "attacks on an expert", "private"),
    ],
    [("report", "figures and pages", "public")],
    [("research", "corpora, rivals, steps, demo, study, tasks", "research")],
    [("cli", "one verb, one function", "open")],
]


def draw_rooms() -> None:
    """Rooms of src/flexolmo; each imports only from those above it."""
    parts = []
    for i, row in enumerate(ROOMS):
        width = (640 - 20 * (len(row) - 1)) / len(row)
        for j, (name, says, fill) in enumerate(row):
            parts.append(box(60 + j * (width + 20), 16 + 62 * i, width, 46, name, says, fill=fill))
    end = 16 + 62 * len(ROOMS) - 16
    parts.append(arrow(30, end, 30, 20))
    parts.append(
        f'<g transform="translate(18 {end / 2}) rotate(-90)">{text(0, 0, "imports", 12)}</g>'
    )
    title = "Rooms from the top: " + "; ".join(n for row in ROOMS for n, _, _ in row)
    save("rooms.svg", 720, end + 16, title + ". Each imports only from rooms above it.", *parts)


if __name__ == "__main__":
    draw_idea()
    draw_rooms()
