import re
import time

import pytest
from hypothesis import given, strategies

from flexolmo.research.corpora import word_problems
from flexolmo.research.corpora.markup import (
    plain_brown,
    plain_fragment,
    plain_html,
    plain_mail,
    plain_wiki,
)


@pytest.mark.parametrize(
    "source, plain",
    [
        ("'''A''' is [[b|c]] and [[d]].<ref name=x>no</ref>", "A is c and d."),
        ("{{Infobox|a={{b}}}}Text {{convert|3|km|mi}} on.", "Text 3 km on."),
        ("a\n{| class=x\n|-\n| cell\n{|\n| inner\n|}\n|}\nb", "a\n\nb"),
        ("[[File:x.png|thumb|a [[link]] here]]Text", "Text"),
        ("== Life ==\ntext\n== References ==\nno\n== Later ==\nyes", "Life\ntext\nLater\nyes"),
        ("See [http://x.example the page] &amp;amp; more", "See the page & more"),
        ("* one\n* two", "- one\n- two"),
        ("Name ({{lang-el|Ἀχ}}; {{IPA|x}}) was", "Name (Ἀχ; ) was"),
    ],
)
def test_wikipedia_source_is_made_plain(source, plain):
    assert plain_wiki(source) == plain


def test_html_keeps_code_and_drops_navigation():
    page = """<html><head><title>t</title></head><body><div class="related">Next</div>
    <h1>Title<a class="headerlink" href="#">¶</a></h1><p>One &lt;b&gt;
    two.<br>Three</p><ul><li><p>item</p></li><li>other</li></ul>
    <pre>def f():
    return <b>1</b></pre><div class="toc"><div>x</div></div><p>End</p><script>no</script></body>"""
    assert plain_html(page) == (
        "Title\n\nOne <b> two.\nThree\n\n- item\n\n- other\n\ndef f():\n    return 1\n\nEnd"
    )


def test_html_prefers_the_article():
    assert plain_html("<body>side<article role='main'><p>Main</p></article></body>") == "Main"


def test_fragments_keep_paragraphs():
    assert plain_fragment("<p>One &amp; two</p><p>three<br>four</p>") == "One & two\nthree\nfour"


def test_brown_tags_and_spaces_go():
    tagged = "``/`` Stop/vb !/. !/.\nHe/pps 's/bez here/rb ''/'' (/( now/rb )/) ./."
    assert plain_brown(tagged).startswith('"Stop!')
    assert not re.search(r"/\w| \.", plain_brown(tagged))


MAIL = """From: A <a@b.example>
Subject: Re: [list] Trains

On Monday, B <b@c.example> wrote:
> quoted words
I think that trains are the best way to travel, and I can be reached at a@b.example always.
They also leave on time, mostly, which cannot be said of many other things in this world.

-- 
A, of B
"""


def test_mail_keeps_own_words_only():
    text = plain_mail(MAIL)
    assert text.startswith("Trains\n\nI think that trains")
    for gone in ("quoted", "@", "A, of B", "wrote:", "From"):
        assert gone not in text


@pytest.mark.parametrize(
    "source",
    [
        "",
        "Subject: x\n\nshort",
        "Content-Type: text/plain; charset=nothing\n\n\xff" + "word " * 50,
        "Content-Type: multipart/mixed; boundary=x\n\nno parts",
    ],
)
def test_mails_without_words_or_with_broken_headers_give_nothing_or_text(source):
    assert isinstance(plain_mail(source), str)


def test_every_stated_step_of_a_word_problem_is_right():
    checked = 0
    for _, page in word_problems.pages(40):
        for left, right in re.findall(r"(?<![\d*/+-] )(\d+(?: [*+/-] \d+)+) = (\d+)(?!\d|x)", page):
            assert eval(left) == int(right), (left, right)
            checked += 1
    assert checked > 500


HTML_UNITS = [
    *("<pre>\t", "<a", "<a ", "<", "</", "</a", "<!", "<!--", "<?", "<![CDATA[", "&", "&#", "&#1"),
    *("<script", "<script>", "<script>x</script", "<script x/>", "<style a", "<article>"),
    *('<a b="', "<a b='", "<a b= ", '<a x" b="', "<a b=\"c' d='e", "<a ='\"\"' <", "<div>", "<p/>"),
]


@pytest.mark.parametrize(
    ("plain", "unit"),
    [
        (plain_wiki, "="),
        (plain_wiki, "[//a "),
        (plain_wiki, "<ref"),
        (plain_wiki, "<!--"),
        (plain_wiki, "{{"),
        (plain_wiki, "{|\n"),
        (plain_brown, "a"),
        (plain_brown, "/"),
        (plain_mail, "a."),
        (plain_mail, "-1"),
        (plain_wiki, "&#1"),
        *((plain_html, unit) for unit in HTML_UNITS),
    ],
)
def test_marked_up_text_takes_time_in_proportion(plain, unit):
    """Each of these took minutes, or hours, when its time grew with the square of the length."""
    started = time.process_time()
    plain("a\n" + unit * (200_000 // len(unit)) + "x")
    assert time.process_time() - started < 5


@given(strategies.text(alphabet="<>/!-=\"'a &#;", max_size=80))
def test_text_without_a_whole_tag_is_read_and_never_refused(page):
    plain = plain_html(page)
    assert isinstance(plain, str)
    if not re.search("<[a-z!/?]", page):
        assert plain == plain_html(page.replace("<", "&lt;"))


@pytest.mark.parametrize(
    ("page", "plain"),
    [
        ("<p title='a > b'>x</p>", "x"),
        ("a <!-- <p>no</p> --> b", "a b"),
        ("a <!-- never closed <p>b", "a"),
        ("a < b and c &lt; d", "a < b and c < d"),
        ("<p>a<script>if (x<b) '</p>'</script>c", "ac"),
        ("<script src=x />a", "a"),
        ("a <b", "a"),
        ("<DIV CLASS='toc'>no</DIV>yes", "yes"),
        ("<p>a&#99999999999999999999;b", "a\ufffdb"),
        ("&#" + "9" * 5000 + ";", "\ufffd"),
    ],
)
def test_odd_html_is_read_as_a_browser_reads_it(page, plain):
    assert plain_html(page) == plain
