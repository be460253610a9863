"""Marked-up text made plain: Wikipedia source, HTML pages, tagged words, mails.

Pure functions of one text; what each leaves out is said where it does.
"""

import email
import email.message
import email.policy
import html
import re

_WIKI_DROP = re.compile(
    r"<!--(?:(?!<!--).)*?-->|<ref[^<>]*/>|<ref(?:(?!<ref).)*?</ref>|"
    r"<(gallery|math|timeline|score|imagemap|source)\b(?:(?!<\1\b).)*?</\1>|__[A-Z]+__",
    re.DOTALL | re.IGNORECASE,
)
_WIKI_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_WIKI_MEASURE = re.compile(r"\{\{(?:convert|cvt)\|([\d.,/+-]+)\|([^|{}]+)[^{}]*\}\}", re.IGNORECASE)
_WIKI_FOREIGN = re.compile(r"\{\{lang(?:-[a-z]+|\|[a-z-]+)\|([^|{}]+)[^{}]*\}\}", re.IGNORECASE)
_WIKI_TABLE = re.compile(r"^[ :*]*\{\|(?:(?!^[ :*]*\{\|).)*?^[ \t]*\|\}", re.DOTALL | re.MULTILINE)
_WIKI_FILE = re.compile(
    r"\[\[(?:File|Image|Category|[a-z-]{2,12}):"
    r"(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]",
    re.IGNORECASE,
)
_WIKI_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_WIKI_URL = re.compile(r"\[(?:https?:)?//[^\s\[\]]+ ?([^\[\]]*)\]")
_WIKI_TAIL = re.compile(
    r"^==+ *(See also|References|External links|Notes|Further reading|"
    r"Bibliography|Sources|Footnotes|Citations|Gallery|Notes and references)"
    r" *==+.*?(?=^==[^=]|\Z)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
_WIKI_HEADING = re.compile(r"^=.*= *$", re.MULTILINE)
_DEEPEST = 50  # of templates and tables within one another


def unescape(text: str) -> str:
    """`text` with characters for its HTML references, however many digits they have."""
    return html.unescape(re.sub(r"&#\d{9,};?", "\ufffd", text))  # Python refuses long numbers


def plain_wiki(text: str) -> str:
    """Plain text of a Wikipedia article's source: no templates, tables, notes or link marks."""
    text = _WIKI_DROP.sub("", text)
    text = _WIKI_MEASURE.sub(r"\1 \2", _WIKI_FOREIGN.sub(r"\1", text))
    for pattern in (_WIKI_TEMPLATE, _WIKI_TABLE, _WIKI_TEMPLATE, _WIKI_FILE):
        for _ in range(_DEEPEST):  # innermost first
            text, found = pattern.subn("", text)
            if not found:
                break
    text = _WIKI_TAIL.sub("", text)
    text = _WIKI_URL.sub(r"\1", _WIKI_LINK.sub(r"\1", _WIKI_LINK.sub(r"\1", text)))
    text = re.sub(r"'{2,}", "", text)
    text = _WIKI_HEADING.sub(lambda m: m[0].strip("= "), text)
    text = unescape(unescape(re.sub(r"<[^<>]{0,200}>", "", text)))
    text = re.sub(r"^[*#:;]+ *", "- ", text, flags=re.MULTILINE)
    text = re.sub(r"^[|!{}].*$|^- *$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\( *[,;] *|\(\s*\)", lambda m: "(" if m.group()[-1] != ")" else "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" {2,}", " ", text)).strip()


def plain_fragment(fragment: str) -> str:
    """Text of an HTML fragment: paragraphs stay apart, tags go."""
    fragment = re.sub(r"<br\s*/?>|</p>|</li>|</div>|</tr>", "\n", fragment)
    return re.sub(r"\n{3,}", "\n\n", unescape(re.sub(r"<[^<>]*>", "", fragment))).strip()


_SKIPPED_ELEMENTS = {"script", "style", "head", "nav", "footer", "svg", "button"}
_SKIPPED_CLASSES = re.compile(
    r"\b(docnav|navheader|navfooter|toc|chlink\w*|ChapSects|ContSect|nav-panel|header|headerlink|"
    r"sphinxsidebar|related|clearer|breadcrumbs|footer)\b"
)
_SKIPPED_IDS = {"banner", "title", "mathjaxlink"}
_PARAGRAPH = {
    "p",
    "div",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "ul",
    "ol",
    "dl",
    "table",
    "section",
    "blockquote",
    "dd",
    "hr",
    "pre",
}
_LINE = {"br", "dt", "tr", "li"}
_NEVER_CLOSED = {"br", "hr", "img", "input", "link", "meta", "col", "wbr"}


# A comment, a script or style sheet, a tag, or a declaration. Each takes all that it has looked at,
# to the end of the page if nothing closes it, as a browser does, so that any page is read in linear
# time; Python's own HTML parser, before its releases of late 2025, takes quadratic time.
_MARKUP = re.compile(
    r"<!--.*?(?:-->|\Z)"
    r"|<(script|style)\b[^>]*+(?<!/)(?:\Z|>.*?(?:</\1\s*>|\Z))"
    r"|<(?P<end>/?)(?P<tag>[a-z][^\s/>]*)"
    r"(?P<attributes>(?:=\s*\"[^\"]*\"|=\s*'[^']*'|[^>])*+)(?:>|\Z)"
    r"|<[!?/][^>]*+(?:>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_ATTRIBUTE = re.compile(r"""([^\s/=]+)\s*(?:=\s*("[^"]*"|'[^']*'|\S*))?""")


class _PageReader:
    """Collects the text of a page; `pre` keeps its lines, all else is laid out by its tags."""

    def __init__(self, page: str) -> None:
        self.pieces: list[str] = []
        self._skipping: list[str] = []  # the skipped element and those of its name inside it
        self._pre = 0
        at = 0
        for found in _MARKUP.finditer(page):
            self._read_text(page[at : found.start()])
            at = found.end()
            if found["tag"] is None:
                continue
            tag = found["tag"].lower()
            if not found["end"]:
                pairs = _ATTRIBUTE.findall(found["attributes"])
                self._start(tag, {name.lower(): unescape(v.strip("\"'")) for name, v in pairs})
            if found["end"] or found["attributes"].endswith("/"):
                self._end(tag)
        self._read_text(page[at:])

    def _start(self, tag: str, named: dict[str, str]) -> None:
        if self._skipping:
            if tag == self._skipping[0]:
                self._skipping.append(tag)
        elif tag not in _NEVER_CLOSED and (
            tag in _SKIPPED_ELEMENTS
            or named.get("id") in _SKIPPED_IDS
            or _SKIPPED_CLASSES.search(named.get("class", ""))
        ):
            self._skipping.append(tag)
        elif tag in _PARAGRAPH:
            self._pre += tag == "pre"
            self.pieces.append("\n\n")
        elif tag in _LINE:
            self.pieces.append("\n- " if tag == "li" else "\n")
        elif tag in ("td", "th"):
            self.pieces.append(" ")

    def _end(self, tag: str) -> None:
        if self._skipping:
            if tag == self._skipping[0]:
                self._skipping.pop()
        elif tag in _PARAGRAPH:
            self._pre -= tag == "pre" and self._pre > 0
            self.pieces.append("\n\n")

    def _read_text(self, source: str) -> None:
        if not self._skipping:
            text = unescape(source)
            self.pieces.append(
                text.replace("\n", "\0").replace(" ", "\1")
                if self._pre
                else re.sub(r"[ \t\r\n]+", " ", text)
            )


def plain_html(page: str) -> str:
    """Text of an HTML page: paragraphs apart, `pre` as it stands, no navigation or contents."""
    article = re.search(r"<article\b", page)
    end = page.rfind("</article>")
    if article and article.start() < end:
        page = page[article.start() : end]
    text = "".join(_PageReader(page).pieces).replace("\xa0", " ")
    text = re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", text))
    text = re.sub(r"(?m)^- *\n+(?=\S)", "- ", text)
    text = re.sub(r"\n{3,}", "\n\n", text).replace("\0", "\n").replace("\1", " ")
    return re.sub(r"(?<![ \t])[ \t]+\n", "\n", text).strip()


def plain_brown(tagged: str) -> str:
    """Text of a Brown corpus file without its `/tag` marks and the spaces before punctuation."""
    words = re.sub(r"\S+", lambda m: m[0].rpartition("/")[0] or m[0], tagged)
    lines = [re.sub(r"\s+", " ", line).strip() for line in words.split("\n")]
    text = "\n".join(lines)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r"([.,:;?!])\s\1", r"\1", text)
    text = re.sub(r" ([.,:;?!)])", r"\1", re.sub(r"\( ", "(", text))
    paragraphs = re.split(r"\n{2,}", text.strip())
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


_ADDRESS = re.compile(r"<?(?<![\w.+-])[\w.+-]+@[\w-]+(\.[\w-]+)+>?")
_ATTRIBUTION = re.compile(r"^.{0,120}\b(wrote|writes|said|schrieb|says):?\s*$")
_FOOTER = re.compile(r"^(-- ?|_{10,}.*|-{20,}.*|={20,}.*|\*{20,}.*)$")


def plain_mail(source: str) -> str:
    """Subject and own words of a mail: no headers, quotes, signature, list footer or addresses."""
    message = email.message_from_string(source.removeprefix("\n"), policy=email.policy.default)
    try:
        part = message.get_body(("plain",))
        body = part.get_content() if part is not None else ""
        subject = str(message["subject"] or "")
    except (LookupError, ValueError, AttributeError, TypeError):
        return ""  # malformed headers or an unknown character set
    lines: list[str] = []
    for line in body.splitlines():
        if _FOOTER.match(line):
            break
        if re.match(r"\s*([>|}:]|[A-Za-z]{1,4}>)", line):
            if lines and _ATTRIBUTION.match(lines[-1]):
                lines.pop()
            continue
        if line.strip() or (lines and lines[-1]):
            lines.append(line.strip())
    while lines and (not lines[-1] or "mailman/listinfo" in lines[-1]):
        lines.pop()
    text = _ADDRESS.sub("", "\n".join(lines))
    subject = re.sub(r"^((re|fwd?|aw): *|\[[^\]]*\] *)+", "", subject, flags=re.IGNORECASE)
    return f"{subject.strip()}\n\n{text.strip()}" if len(text) >= 100 else ""
