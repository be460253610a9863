"""The report is one file that needs nothing else, and says only what was measured."""

import html.parser
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexolmo.report.page import Picture, render_page
from flexolmo.research.demo import report

MakePage = Callable[..., dict[str, Any]]


class Reader(html.parser.HTMLParser):
    """Collects what a browser would see of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data


def read_page(results: dict[str, Any], directory: Path) -> tuple[str, Reader]:
    text = report.write_report(results, directory).read_text(encoding="utf-8")
    return text, Reader(text)


def plain(sentences: list[str]) -> list[str]:
    return [s.replace("\u00a0", " ") for s in sentences]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, make_page: MakePage) -> tuple[Path, str, Reader]:
    directory = tmp_path_factory.mktemp("report")
    return directory, *read_page(make_page(1), directory)


def test_the_report_is_html_and_figures(page: tuple[Path, str, Reader]) -> None:
    found = {str(p.relative_to(page[0])) for p in page[0].rglob("*") if p.is_file()}
    assert found == {
        "report.html",
        *(
            f"figures/{n}.{kind}"
            for kind in ("png", "svg")
            for n in ("bits_per_byte", "optout_matrix", "routing", "routing_paper", "kept_gain")
        ),
    }


def test_the_html_asks_for_nothing_and_runs_nothing(page: tuple[Path, str, Reader]) -> None:
    _, text, reader = page
    assert "default-src 'none'" in text
    assert "script" not in {tag for tag, _ in reader.tags}
    for _, attributes in reader.tags:
        assert not any(k.startswith("on") or k == "href" for k in attributes)
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png")
    assert "url(" not in text and "@import" not in text


def test_what_models_wrote_is_shown_as_text(page: tuple[Path, str, Reader]) -> None:
    _, text, reader = page
    assert "<script>alert('x')</script>" in reader.words
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)


def test_every_picture_has_a_text_and_every_heading_cell_a_scope(
    page: tuple[Path, str, Reader],
) -> None:
    tags = page[2].tags
    assert all(len(a.get("alt") or "") > 40 for tag, a in tags if tag == "img")
    assert all(a.get("scope") in ("col", "row") for tag, a in tags if tag == "th")
    count = [tag for tag, _ in tags].count
    assert count("img") == count("figcaption") == 5
    assert count("caption") == count("table")
    assert count("h1") == 1


def test_the_opening_is_three_sentences_with_the_numbers(make_page: MakePage) -> None:
    results = make_page(
        1,
        summary={},
        seconds={"total": 480},
        bits_per_byte={
            "anchor": {"public": 2.0, "code": 4.0},
            "expert code": {"public": 2.0, "code": 3.0},
            "mixture": {"public": 2.01, "code": 3.1},
            "mixture without code": {"public": 2.0, "code": 4.01},
        },
    )
    assert plain(report._opening(results)) == [
        "One owner (code) trained one expert on its own text alone, beside a public "
        "model that nobody changed (the anchor, 3.3 million parameters), and handed over one "
        "signed file; a coordinator merged the files into a mixture, all in 8.0 minutes.",
        "Compared with the public model alone, the mixture needs 22.5 % fewer bits (code) to "
        "predict a byte of an owner's text that no model was trained on; on public text it needs "
        "0.5 % more bits.",
        "Switch an owner off, with nothing trained again, and on that owner's text the model is "
        "within 0.3 % of the public model, while no other set moves by more than 0.5 %.",
    ]


def test_a_mixture_that_is_worse_is_said_to_be_worse(make_page: MakePage) -> None:
    results = make_page(3)
    results["bits_per_byte"]["mixture"]["forum"] = results["bits_per_byte"]["anchor"]["forum"] * 1.1
    assert "between 10.0 % more bits (forum) and" in plain(report._opening(results))[1]


def test_a_bar_that_was_missed_is_said_to_be_missed(page: tuple[Path, str, Reader]) -> None:
    assert "1 of 2 met" in page[2].words
    assert "✗ not met" in page[2].words and "87 %" in page[2].words


def test_a_router_that_loses_is_said_to_lose(
    page: tuple[Path, str, Reader], make_page: MakePage
) -> None:
    assert "In this run ours keeps" in page[2].words
    results = make_page(3)
    results["paper_router"]["summary"]["kept_of_pair_gain"]["mean"] = 0.99
    assert "Not so in this run: ours keeps" in report._compare_routers(results)


def test_where_the_summary_is_silent_it_is_computed(make_page: MakePage) -> None:
    results = make_page(3)
    given = report._summary(results)
    computed = report._summary(results | {"summary": None})
    assert given["public_change"] == pytest.approx(computed["public_change"])
    for key in ("kept_of_pair_gain", "optout_vs_anchor", "optout_side_effect"):
        assert given[key] == pytest.approx(computed[key])


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("left_out", ["bits_per_byte", "paper_router", "summary", "owners"])
def test_a_missing_part_leaves_its_section_out(left_out: str, make_page: MakePage) -> None:
    results = make_page(1)
    del results[left_out]
    blocks = [b for b in report._blocks(results) if not isinstance(b, Picture)]
    Reader(render_page(blocks, "html", {}))
    assert render_page(blocks, "md", {}).startswith("# FlexOlmo")


def test_no_results_make_an_empty_report(tmp_path: Path) -> None:
    read_page({}, tmp_path)


def test_the_rows_of_a_table_follow_the_owners() -> None:
    bits = {row: {"public": 1.0} for row in ("mixture", "expert b", "expert a", "anchor")}
    table = report._bits_table({"owners": [{"name": "a"}, {"name": "b"}], "bits_per_byte": bits})
    assert [line[0][0].text for line in table.lines()] == [
        "anchor",
        "anchor + a alone",
        "anchor + b alone",
        "mixture, all on",
    ]


def test_many_sources_are_counted_after_the_first() -> None:
    owners = [{"name": "a", "set_description": "Papers.", "sources": [f"s{i}" for i in range(20)]}]
    text = report._owners_table({"owners": owners}).lines()[0][2][0].text
    assert text.startswith("Papers. Sources in this run: s0, s1,") and text.endswith(" and 8 more")


def test_empty_lines_of_a_sample_are_drawn_together() -> None:
    assert report._close_gaps("\n\n\n    a\n  \n\n\n  b\n\nc\n\n") == "\n\n    a\n\n  b\n\nc"


def test_owners_who_made_different_attacks_are_shown_side_by_side(
    make_page: MakePage, tmp_path: Path, no_figures: None
) -> None:
    attack = {
        "audit": "membership",
        "level": "unclear",
        "headline": {"measure": "AUC, loss", "unit": "auc", "value": 0.6, "low": 0.4, "high": 0.8},
        "off_equals_anchor": True,
    }
    told = {"has_guarantee": False, "page": "owners/b/release/b.report/page.html"}
    release = {"a": told | {"attacks": []}, "b": told | {"attacks": [attack]}}
    page, _ = read_page(make_page(release=release), tmp_path)
    row = page[page.index("Can documents be told") :].split("</tr>")[0]
    assert row.index("not made") < row.index("unclear: AUC, loss 0.600 (0.400 to 0.800)")
    assert 'href="owners/b/release/b.report/page.html"' in page and "Control: with" in page
    attack["off_equals_anchor"] = False
    page, _ = read_page(make_page(release=release), tmp_path)
    assert "Control: with" not in page
