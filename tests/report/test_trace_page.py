"""The page of a traced text: marks where spans are, and nothing that acts."""

import html.parser
import stat

from hypothesis import given
from hypothesis import strategies as st

from flexolmo.report.trace_page import mark_spans, write_trace_page
from flexolmo.trace.index import Occurrence
from flexolmo.trace.spans import Span

HOSTILE = "<script>alert(1)</script> \x1b[2J \u202e & \"'> </pre> {{ 7 * 7 }} "


def made_span(first, last, **more):
    return Span("clinic", 0, 8, first, last, **more)


SPANS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 20))
    .filter(lambda pair: pair[0] < pair[1])
    .map(lambda pair: made_span(*pair)),
    max_size=5,
)


@given(st.text(min_size=20, max_size=25), SPANS)
def test_every_letter_is_marked_with_the_numbers_of_its_spans_and_none_is_lost(text, spans):
    pieces = mark_spans(text, spans)
    assert "".join(piece for piece, _ in pieces) == text
    marks = [note for piece, note in pieces for _ in piece]
    for place, note in enumerate(marks):
        inside = [n for n, s in enumerate(spans, 1) if s.first <= place < s.last]
        assert note == ", ".join(map(str, inside))


class Tags(html.parser.HTMLParser):
    """Elements of a page, and the words in marks."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.marked, self.depth = set(), "", 0
        self.attributes = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.depth += tag == "mark"

    def handle_endtag(self, tag):
        self.depth -= tag == "mark"

    def handle_data(self, data):
        self.marked += data if self.depth else ""


def test_hostile_text_and_names_are_shown_and_do_not_act(tmp_path):
    place = Occurrence(HOSTILE, 3, HOSTILE, HOSTILE, HOSTILE)
    span = made_span(0, len(HOSTILE), bits=12.5, count=3, occurrences=(place,))
    text = HOSTILE + "after"
    page = write_trace_page(text, [span], [HOSTILE], tmp_path / "page.html").read_text()
    found = Tags(page)
    assert "script" not in found.tags and "mark" in found.tags
    assert not any(name.startswith("on") or name == "href" for name, _ in found.attributes)
    assert "\x1b" not in page and "\u202e" not in page
    assert "<script>alert(1)</script>" in found.marked and "{{ 7 * 7 }}" in found.marked
    assert "after" not in found.marked
    assert "default-src 'none'" in page
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o600


def test_a_text_without_spans_has_a_page_that_says_so(tmp_path):
    page = write_trace_page("nothing", [], ["clinic", "bank"], tmp_path / "page.html").read_text()
    assert "training text of clinic, bank: 0." in page
    assert "<mark>" not in page and "<table>" not in page
