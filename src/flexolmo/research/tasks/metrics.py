r"""Scores of generated answers, by the rules of the benchmarks they come from.

Pure functions on strings. Scores are 0 to 1; functions named `..._answer` find the answer in a
longer text. OLMES is AI2's harness (oe-eval, olmo-eval): its rule is taken where it has one, and
each function says where it differs. Knows no task, no model and no file; LaTeX is compared as
text, so that $\frac{2}{4}$ is not $\frac{1}{2}$, and $x+1$ is not $1+x$.
"""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from itertools import islice
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from flexolmo.errors import ConfigError, DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
MOST_BRACKETS = 100  # of a text, from which a JSON array is looked for
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and needless space; may become empty.

    Source: Rajpurkar et al. 2016 (arXiv 1606.05250), SQuAD's evaluation script.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the bags of normalised words, against the reference it fits best.

    Where one bag is empty the score is 1 if both are, else 0. Raises DataError without references.

    Source: SQuAD 2.0's script (Rajpurkar et al. 2018, arXiv 1806.03822).
    """
    found = normalise_answer(prediction).split()
    return max(_bag_f1(found, normalise_answer(r).split()) for r in _some(references))


def drop_scores(
    prediction: str | Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """Exact match and F1 of one answer's spans against its references; the best of each.

    A reference is a list of spans; one whose first span is blank does not count. A span is a set
    of words, numbers in one form, hyphens splitting words ("-5" is therefore 5). Spans are paired
    so that the sum of F1 is largest; a pair has 0 if the reference has numbers and shares none.
    F1 is a mean over the longer side, to two decimals. Raises DataError where no reference counts.

    Source: Dua et al. 2019 (arXiv 1903.00161), section 5 and DROP's script (allennlp-reading-
    comprehension), which pairs spans by `linear_sum_assignment` too.
    """
    found = [_drop_span(s) for s in _spans(prediction)]
    counted = [gold for gold in map(_spans, references) if gold and gold[0].strip()]
    scores = [_drop_pair(found, [_drop_span(s) for s in gold]) for gold in _some(counted)]
    return max(em for em, _ in scores), max(f1 for _, f1 in scores)


def list_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the set of items that a text lists, against one list of references; case is ignored.

    The items are the first JSON array in the text; where there is none, what commas and line
    breaks separate, without quotes, brackets and bullets. Empty items do not count; no item in
    common is 0. Raises DataError without references.

    Source: SciRIFF (Wadden et al. 2024, arXiv 2406.07835), its `ListF1` for BioASQ list questions,
    which pools counts over all questions and gives text without JSON an empty list.
    """
    found = _plain_items(_listed(prediction))
    gold = _plain_items(_some(references))
    return 2 * len(found & gold) / max(1, len(found) + len(gold))


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of lower-case runs of a-z and 0-9, unstemmed.

    0 if either text has no such run. Source: Lin 2004 (ROUGE), beta = 1 as in `rouge_score`.
    """
    found, gold = (re.findall("[a-z0-9]+", t.lower()) for t in (prediction, reference))
    longest = [0] * (len(gold) + 1)  # of found so far and gold[:j]
    for token in found:
        row = [0]
        for j, other in enumerate(gold):
            row.append(longest[j] + 1 if token == other else max(row[j], longest[j + 1]))
        longest = row
    return 2 * longest[-1] / max(1, len(found) + len(gold))


def _some(references: Sequence[Any]) -> Sequence[Any]:
    if isinstance(references, str):
        raise DataError(f"One text {references[:40]!r} found as references; give a list of texts.")
    if not references:
        raise DataError("No reference answer found; an item needs at least one to be scored.")
    return references


def _bag_f1(found: list[str], gold: list[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    return 2 * (Counter(found) & Counter(gold)).total() / (len(found) + len(gold))


def _spans(answer: str | Sequence[str]) -> Sequence[str]:
    return [answer] if isinstance(answer, str) else answer


def _drop_span(span: str) -> str:
    words = []
    for word in re.split("[ -]", span.lower()):
        bare = word if _is_number(word) else word.translate(_NO_PUNCTUATION)
        bare = str(float(bare)) if _is_number(bare) else _ARTICLES.sub(" ", bare)
        words += bare.split()
    return " ".join(words)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _drop_pair(found: list[str], gold: list[str]) -> tuple[float, float]:
    """Exact match and F1 of normalised spans."""
    scores = np.zeros((len(gold), len(found)))
    for (i, j), _ in np.ndenumerate(scores):
        scores[i, j] = _span_f1(set(found[j].split()), set(gold[i].split()))
    pairs = linear_sum_assignment(scores, maximize=True)
    is_same = set(found) == set(gold) and len(found) == len(gold)
    return float(is_same), float(np.round(scores[pairs].sum() / max(scores.shape), 2))


def _span_f1(found: set[str], gold: set[str]) -> float:
    numbers = {w for w in gold if _is_number(w)}
    if numbers and not numbers & found:
        return 0.0
    return _bag_f1(sorted(found), sorted(gold))


def _listed(text: str) -> list[Any]:
    for start in islice(re.finditer(r"(?:\[\s*)+", text), MOST_BRACKETS):
        try:
            return json.JSONDecoder().raw_decode(text, start.start())[0]
        except (ValueError, RecursionError):
            continue
    return [
        re.sub(r"^\s*(?:[-*•]|\d+[.)])\s", "", part).strip(" \t\"'[].")
        for part in re.split(r"[,\n]", text)
    ]


def _plain_items(items: Iterable[Any]) -> set[str]:
    """Lower-case text of each item; an array within an array is one item, its words joined."""
    plain = set()
    for item in items:
        if isinstance(item, list):
            item = " ".join(sorted(_plain_items(item)))
        elif isinstance(item, float):
            item = round(item, 2)
        plain.add("" if item is None else " ".join(str(item).lower().split()))
    return plain - {""}


_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:[0-9]++(?:\.[0-9]++)?|\.[0-9]++)")


def gsm8k_answer(text: str) -> str:
    """The last number in a text, without commas; "" if there is none.

    A minus or plus is part of it unless it follows a digit, a letter or a bracket, as in "20-5",
    where OLMES reads -5. Source: OLMES `gsm8k`; Cobbe et al. 2021 (arXiv 2110.14168) for the data.
    """
    numbers = _NUMBER.findall(re.sub(r"(?<=[0-9]),(?=[0-9])", "", text))
    return numbers[-1] if numbers else ""


def same_number(a: str, b: str) -> bool:
    """True if both are numbers, and equal; commas, $, space and a last full stop are ignored.

    OLMES compares digits, so that it takes 5.0 for wrong where 5 is right; here they are equal.
    """
    bare = [re.sub(r"[,$\s]", "", x).rstrip(".") for x in (a, b)]
    return all(_NUMBER.fullmatch(x) for x in bare) and Decimal(bare[0]) == Decimal(bare[1])


_FINAL_ANSWER = re.compile(r"Final Answer: The final answer is(.*)")
_DOLLARS = re.compile(r"(?<!\\)\$+")
_SPACING = re.compile(r",\\!|\{,\}|\\[ ,;:!]|\\q?quad(?![a-zA-Z])|~|\s")
_TEXT = r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf)\{([^{}]*)\}"
_UNITS = (
    "degrees? dollars? cents? units? inch inches foot feet ft miles? mph mm cm km meters? "
    "gm grams? kg pounds? seconds? minutes? hours? days? years? points? ways?"
)
_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"\\[tdc]frac", r"\\frac"),
        (r"\\(?:left|right)(?![a-zA-Z])", ""),
        (r"\^\\circ|\^\{\\circ\}|\\degree|°", ""),
        (r"\\?[$%]", ""),
        (r",?\\text\{and\}", ","),
        (
            r"(?<=[\w})!])\\(?:text|mbox|mathrm(?=\{\w\w))\{[^{}]*\}(?:\^\{?[0-9]\}?)?\.?$",
            "",
        ),  # a unit
        (_TEXT, r"\1"),
        (rf"(?<=[0-9])(?:square|cubic)?(?:{_UNITS.replace(' ', '|')})\.?$", ""),
        (r"\.$", ""),
        (r"^[a-zA-Z][a-zA-Z]?=(?=[^=]*$)", ""),
        (r"(?<![0-9])\.(?=[0-9])", "0."),
        (r"(\\sqrt(?:\[[^\]]*\])?)([0-9a-zA-Z])", r"\1{\2}"),
        (r"\\frac(\\(?!sqrt|frac)[a-zA-Z]+|[0-9a-zA-Z])", r"\\frac{\1}"),
        (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})(\\(?!sqrt|frac)[a-zA-Z]+|[0-9a-zA-Z])", r"\1{\2}"),
        (r"(?<![\w.^/])([0-9]+)/([0-9]+)(?![\w.^!/({]|\\(?!end)[a-zA-Z])", r"\\frac{\1}{\2}"),
        (r"(?<![\w)}])\\frac\{-", r"-\\frac{"),
        (r"^0\.5$", r"\\frac{1}{2}"),
        (r"\\\\", r"\\"),
    ]
]


def math_answer(text: str) -> str | None:
    r"""The answer that a solution ends in, as LaTeX; None if there is no sign of one.

    What the first "Final Answer: The final answer is X. I hope it is correct." gives, or such a
    line cut short; else the last \boxed{X} or \fbox{X} whose braces close; else the last $X$. An
    X that itself holds a box or a single $...$ gives what is inside.

    Source: Lewkowycz et al. 2022 (arXiv 2206.14858), appendix D; the order is that of OLMES, which
    however counts an item as right if any of them is, and reads a text without any as an answer.
    """
    final = _FINAL_ANSWER.search(text)
    answer, closing, _ = (final[1] if final else "").partition(". I hope it is correct")
    if not closing:
        answer = answer.rstrip().removesuffix(".")
    if answer.strip():
        parts = _DOLLARS.split(answer)
        return _last_boxed(answer) or (parts[1] if len(parts) == 3 else answer).strip()
    parts = _DOLLARS.split(text)
    return _last_boxed(text) or (parts[-2].strip() if len(parts) > 2 else "") or None


def same_math(a: str | None, b: str | None) -> bool:
    r"""True if two LaTeX answers read the same once their spelling is uniform; None never does.

    Spacing, sizes of brackets and fractions, degrees, %, $, a last unit or \text{unit}, "x=" at
    the start, .5, \frac12, a/b, \sqrt3 and commas in thousands make no difference. Nothing is
    calculated, and letters keep their case.

    Source: Hendrycks et al. 2021 (arXiv 2103.03874), `is_equiv` of the MATH code. Beyond it: units
    without a space, "and" for a comma, 1,000, a/b within tuples, \frac{-a}{b}. Unlike it, text
    after a \text{ and } stays. OLMES also asks sympy, which we do not.
    """
    return a is not None and b is not None and _plain_math(a) == _plain_math(b)


def _plain_math(latex: str) -> str:
    plain = _SPACING.sub("", latex)
    for pattern, new in _REWRITES:
        plain = pattern.sub(new, plain)
    return plain.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", plain) else plain


def _last_boxed(text: str) -> str:
    r"""The content of the last box that is closed, or after "\boxed " without braces; or ""."""
    opened: list[int] = []
    closed_at = {}  # by where the inside of a pair of braces starts
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened:
            closed_at[opened.pop()] = brace.start()
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?:\s*(\{)|\s+)", text))):
        if not box[1]:
            return re.split(r"[$\n]", text[box.end() :], maxsplit=1)[0].strip()
        if box.end() in closed_at:
            return text[box.end() : closed_at[box.end()]].strip()
    return ""


def bbh_answer(text: str) -> str:
    """The text after the first "the answer is ", to the end of its sentence or line; "" if nothing.

    Source: Suzgun et al. 2022 (arXiv 2210.09261), prompts that end in "So the answer is X.";
    lm-evaluation-harness takes the whole line but for its last character.
    """
    line = text.partition("the answer is ")[2].partition("\n")[0]
    sentence = re.split(r"\.(?=\s)", line, maxsplit=1)[0]
    return sentence.rstrip().removesuffix(".").strip()


def bbh_match(prediction: str, target: str) -> float:
    """1 if both are the same but for space around them and brackets around one letter, else 0.

    Case counts, as in the original: "true" is not "True". Source: as `bbh_answer`; that "A" equals
    "(A)" is ours, harmless since no task has both among its targets.
    """
    bare = [re.sub(r"^\(([A-Z])\)$", r"\1", text.strip()) for text in (prediction, target)]
    return float(bare[0] == bare[1])


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that of k samples one at least is right, c of n samples being right.

    Raises ConfigError unless 1 <= k <= n and 0 <= c <= n. Source: Chen et al. 2021 (arXiv
    2107.03374), equation 1.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ConfigError(
            f"pass@{k} with {c} of {n} samples right found; expected k from 1 to the "
            "number of samples, and no more right than that; draw more samples."
        )
    return 1 - math.comb(n - c, k) / math.comb(n, k)
