"""A page says the same in HTML and in Markdown, and no text in it acts in either."""

import html.parser
from pathlib import Path

import markdown
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from flexolmo.report.page import (
    Cell,
    Fold,
    Items,
    Link,
    Marked,
    Picture,
    Sample,
    Table,
    Text,
    render_page,
    save_page,
)
from flexolmo.terminal import make_printable

ON_A_CODE_HOST = MarkdownIt("commonmark").enable(["table", "strikethrough"])
ON_THE_SITE = ["admonition", "attr_list", "md_in_html", "tables", "pymdownx.superfences"]
VOID = ("meta", "img", "wbr", "br")
EVERY_BLOCK = [
    Text("A page", "h1"),
    Text("A part", "h2"),
    Text(" has words.", term="This"),
    Items([Text("one"), Text(" two", term="and")]),
    Table("Numbers", ["name", "x"], [[Cell("b", "#009E73", bold=True), "1"], ["c", "2"]], "lr"),
    Picture("dot", Figure((1, 1)), "An empty figure", " is empty.", term="Figure 1"),
    Sample("code", "#009E73", "def ", ("f(): ...", "g(): ..."), mono=True),
    Link("The other page", "owners/a b/page.html"),
    Fold("More", Table("Letters", ["a"], [[Cell("d", italic=True)], [Cell("e", mono=True)]])),
    Fold("Recipe", Text('{"a": 1}', "pre")),
    Text("A person's **own** words.", "md"),
    Marked([("plain ", ""), ("found", "1, 2"), (" end", "")]),
]


class Reader(html.parser.HTMLParser):
    """Collects the elements of a page, each with the words in it."""

    def __init__(self, text: str):
        super().__init__()
        self.words: list[tuple[str, str]] = []
        self.open: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(len(self.words))
        self.words.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.words[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self.open:
            tag, words = self.words[i]
            self.words[i] = (tag, words + data)

    def of(self, *tags: str) -> list[str]:
        """Letters of the elements called so, without spaces."""
        return ["".join(words.split()) for tag, words in self.words if tag in tags]


def read_all(page: list) -> list[Reader]:
    """The page as a browser shows it, as a code host does, and as the documentation's site."""
    text = render_page(page, "md", {"dot": b""})
    return [
        Reader(render_page(page, "html", {"dot": b""})),
        Reader(ON_A_CODE_HOST.render(text)),
        Reader(markdown.markdown(text, extensions=ON_THE_SITE)),
    ]


@settings(max_examples=60, deadline=None)
@given(text=st.text() | st.text("-+=>#*_`|~$!<&[](){}:.1 \\\"'\n\tx"))
def test_any_text_is_shown_as_it_is_everywhere(text: str) -> None:
    page = [
        Text(text, "h1"),
        Text(text),
        Items([Text(text), Text(": x", term=text)]),
        Table(text, [text, "x"], [[text, Cell(text, bold=True)], [Cell(": y", term=text), "z"]]),
    ]
    shown = "".join(make_printable(text).split())
    for reader in read_all(page):
        assert reader.of("h1") == [shown]
        assert reader.of("li") == [shown, f"{shown}:x"]
        assert reader.of("th", "td") == [shown, "x", shown, shown, f"{shown}:y", "z"]
        assert not {tag for tag, _ in reader.words} & {"a", "em", "hr", "blockquote", "script"}


def test_every_block_is_in_both_forms() -> None:
    for reader in read_all(EVERY_BLOCK):
        assert reader.of("h1") + reader.of("h2") == ["Apage", "Apart"]
        assert "Thishaswords." in reader.of("p")
        assert reader.of("li") == ["one", "andtwo"]
        assert reader.of("th", "td") == ["name", "x", "b", "1", "c", "2", "a", "d", "e"]
        assert {"This", "and", "Figure1"} <= set(reader.of("b", "strong"))
        assert reader.of("img") == [""] and "Figure1isempty." in reader.of("p", "figcaption")
        assert reader.of("summary") == ["More", "Recipe"]
        assert reader.of("pre")[:3] == ["deff():...", "defg():...", '{"a":1}']
        assert {"found", "found1,2"} & set(reader.of("mark", "strong"))
        assert any("words." in x for x in reader.of("p", "pre"))


def test_a_table_in_a_fold_is_a_table_on_the_site_too() -> None:
    text = render_page([Fold("More", Table("Letters", ["a"], [["d"]]))], "md", {})
    assert "<table>" in markdown.markdown(text, extensions=ON_THE_SITE)


def test_a_persons_markdown_is_kept_in_markdown_and_plain_in_html() -> None:
    text = "The **why**:\n\n- <b>a</b>"
    page = [Text("A page", "h1"), Text(text, "md")]
    assert text in render_page(page, "md", {})
    assert "The **why**:\n\n- &lt;b&gt;a&lt;/b&gt;</pre>" in render_page(page, "html", {})


def test_a_table_of_rows_by_heading_marks_what_a_row_lacks() -> None:
    table = Table.of("t", [{"a": "1"}, {"a": "2", "b": "3"}], "lr")
    assert table.columns() == [("a", False), ("b", True)]
    assert [[cell.text for cell, _ in line] for line in table.lines()] == [["1", "–"], ["2", "3"]]
    assert Table.of("t", [], "l").columns() == []


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        Table("t", ["a", "b"], [["1"]]).lines()


def test_a_page_is_saved_in_each_form_with_its_pictures(tmp_path: Path) -> None:
    assert save_page(EVERY_BLOCK, tmp_path / "p.md", tmp_path / "p.html") == tmp_path / "p.md"
    assert {p.name for p in tmp_path.iterdir()} == {"p.md", "p.html", "dot.png", "dot.svg"}
    assert "(dot.png)" in (tmp_path / "p.md").read_text(encoding="utf-8")
    assert "data:image/png;base64,iVBOR" in (tmp_path / "p.html").read_text(encoding="utf-8")
