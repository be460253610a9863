"""Metrics of generated answers: laws, cases worked by hand, and the benchmarks' own code.

The oracles are task files of lm-evaluation-harness, run where that package is installed.
"""

import ast
import json
import math
import re
import string
import time
from functools import cache
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError, DataError
from flexolmo.research.tasks.metrics import (
    bbh_answer,
    bbh_match,
    drop_scores,
    gsm8k_answer,
    list_f1,
    math_answer,
    normalise_answer,
    pass_at_k,
    rouge_l,
    same_math,
    same_number,
    token_f1,
)

OFTEN = settings(derandomize=True, max_examples=60)
WORDS = [
    "the",
    "a",
    "An",
    "cat",
    "Cat.",
    "cats",
    "(dog",
    "dog)",
    "5",
    "5.0",
    "1,000",
    "1000",
    "-3",
    "$20",
    "20",
    "u.s.",
    "US",
    "co-op",
    "nan",
    "!",
    "é",
    "½",
    "x_1",
]
PHRASES = st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)
PHRASE_LISTS = st.lists(PHRASES, min_size=1, max_size=4)
TEXTS = PHRASES | st.text(max_size=12)
BEST_OF = [token_f1, list_f1]
ANY_METRIC = pytest.mark.parametrize("metric", BEST_OF, ids=lambda m: m.__name__)


@cache
def oracle(path: str, **names) -> SimpleNamespace:
    """What a task file of lm_eval defines; imports that it guards, or of `names`, are left out."""
    spec = find_spec("lm_eval")
    if spec is None:
        pytest.skip("lm_eval is not installed")
    file = Path(spec.origin).parent / "tasks" / path
    tree = ast.parse(file.read_text())
    tree.body = [
        node
        for node in tree.body
        if not isinstance(node, ast.Try)
        and not (isinstance(node, ast.Import) and node.names[0].asname in names)
    ]
    exec(compile(tree, str(file), "exec"), names)
    return SimpleNamespace(**names)


# --- short answers ------------------------------------------------------------------------------


@ANY_METRIC
@given(prediction=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=4), data=st.data())
@OFTEN
def test_a_score_is_0_to_1_and_the_order_of_references_is_irrelevant(
    metric, prediction, references, data
):
    score = metric(prediction, references)
    assert isinstance(score, float) and 0 <= score <= 1
    assert metric(prediction, data.draw(st.permutations(references))) == score


@given(prediction=TEXTS, references=PHRASE_LISTS, more=PHRASE_LISTS)
@OFTEN
def test_a_further_reference_never_lowers_the_best(prediction, references, more):
    assert token_f1(prediction, [*references, *more]) >= token_f1(prediction, references)
    assert token_f1(prediction, [*references, prediction]) == 1


@given(a=TEXTS, b=TEXTS)
@OFTEN
def test_with_one_reference_both_sides_are_alike(a, b):
    assert token_f1(a, [b]) == token_f1(b, [a]) and token_f1(a, [a]) == 1
    assert rouge_l(a, b) == rouge_l(b, a)
    assert drop_scores(a, ["x" + b])[1] <= 1


@given(text=TEXTS)
@OFTEN
def test_normalised_answers_stay_as_they_are(text):
    plain = normalise_answer(text)
    assert plain == " ".join(plain.split()) and not set(plain) & set(string.punctuation)
    if not re.search(r"\b(a|an|the)\b", plain):
        assert normalise_answer(plain) == plain


def test_answers_are_normalised_as_squad_does():
    assert normalise_answer(" The  U.S. Army's an-a ") == "us armys ana"
    assert token_f1("The cat.", ["dog", "cat"]) == 1
    assert token_f1("a black cat", ["cat"]) == pytest.approx(2 / 3)
    assert token_f1("cat cat dog", ["cat bird cat fish"]) == pytest.approx(4 / 7)
    assert token_f1("the", [""]) == 1 and token_f1("the", ["cat"]) == token_f1("cat", ["a"]) == 0


@given(prediction=PHRASES, reference=PHRASES)
@OFTEN
def test_token_f1_is_that_of_the_squad_script(prediction, reference):
    script = oracle("qasper/metrics.py")
    assert normalise_answer(prediction) == script.normalize_answer(prediction)
    if normalise_answer(prediction) or normalise_answer(reference):
        expected = script.f1_abstractive([prediction], [reference])
        assert token_f1(prediction, [reference]) == pytest.approx(expected)


# --- DROP ---------------------------------------------------------------------------------------


@given(prediction=PHRASE_LISTS, references=st.lists(PHRASE_LISTS, min_size=1, max_size=3))
@OFTEN
def test_drop_scores_are_those_of_the_script(prediction, references):
    script = oracle("drop/utils.py")
    references = [*references, ["gold", "5"]]
    expected = script.process_results({"answers": references}, prediction)
    assert drop_scores(prediction, references) == (expected["em"], expected["f1"])


@given(
    spans=st.lists(st.sampled_from(["cat", "5", "red dog", "1,000 men"]), min_size=1),
    data=st.data(),
)
@OFTEN
def test_the_order_of_dropped_spans_is_irrelevant_and_identity_is_full(spans, data):
    mixed = data.draw(st.permutations(spans))
    assert drop_scores(mixed, [["other"], spans]) == (1, 1)
    half = drop_scores(mixed[:1], [spans])
    assert half[0] == (len(spans) == 1) and 0 <= half[1] <= 1


def test_drop_knows_numbers_and_pairs_spans():
    assert drop_scores("1,500 men", [["1500"]]) == (0, 0.67)
    assert drop_scores("5", [["5.0"]]) == (1, 1)
    assert drop_scores("5 yards", [["6 yards"]]) == (0, 0)  # a number, but not the right one
    assert drop_scores("six yards", [["five yards"]]) == (0, 0.5)
    assert drop_scores("-3", [["3"]]) == (1, 1)  # a hyphen splits words, as in the script
    assert drop_scores(["red cat", "dog"], [["dog", "cat"]]) == (0, 0.83)
    assert drop_scores("dog", [["dog", "cat"]]) == (0, 0.5)
    assert drop_scores("dog", [[" "], ["dog"]]) == (1, 1)
    assert drop_scores([], [["dog"]]) == (0, 0)
    assert drop_scores("dog", [["dog", "x"], ["dog"]]) == drop_scores("dog", ["dog"]) == (1, 1)


# --- lists and summaries ------------------------------------------------------------------------


@given(
    items=st.lists(st.text("abc XYZ-", min_size=1, max_size=6).filter(str.strip), min_size=1),
    data=st.data(),
)
@OFTEN
def test_lists_are_compared_as_sets_without_case(items, data):
    mixed = data.draw(st.permutations(items))
    text = f"Sure: {json.dumps([i.upper() for i in mixed])} I hope [this] helps."
    assert list_f1(text, items) == 1
    assert list_f1(json.dumps(items + items), items) == 1
    assert list_f1(json.dumps(items), [*items, "other"]) == pytest.approx(
        2 * (n := len({" ".join(i.lower().split()) for i in items})) / (2 * n + 1)
    )


def test_a_list_without_json_is_split_at_commas_and_lines():
    gold = ["MYC", "TP53", "BRCA1"]
    for text in (
        "MYC, tp53, BRCA1.",
        '["MYC", "TP53", "BRCA1"',
        "- MYC\n- TP53\n- BRCA1\n",
        "1. MYC\n2. TP53\n3) BRCA1",
        "['MYC', 'TP53', 'BRCA1']",
    ):
        assert list_f1(text, gold) == 1
    assert list_f1("MYC", gold) == 0.5
    assert list_f1("", gold) == list_f1("[]", gold) == list_f1("[null]", gold) == 0
    assert list_f1('[1, 2.503, ["a", "b"], {"c": 3}]', ["1", "2.5", "a b"]) == 6 / 7
    assert list_f1("[" * 3000, gold) == 0


@given(a=TEXTS, b=TEXTS)
@settings(OFTEN, max_examples=30)
def test_rouge_l_is_that_of_the_reference_package(a, b):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    expected = scorer.RougeScorer(["rougeL"]).score(a, b)["rougeL"].fmeasure
    assert rouge_l(a, b) == pytest.approx(expected)


def test_rouge_l_counts_the_longest_common_subsequence():
    assert rouge_l("The cat sat!", "the CAT sat") == 1
    assert rouge_l("a b c d", "d a x b") == 0.5
    assert rouge_l("...", "...") == 0


# --- numbers ------------------------------------------------------------------------------------


@given(number=st.decimals(-(10**7), 10**7, places=2), before=PHRASES)
@OFTEN
def test_the_last_number_is_found_whatever_stands_around_it(number, before):
    for spelled in (f"{number}", f"{number:,}", f"{number:f}"):
        for text in (
            f"{before} So it is {spelled}.",
            f"{before}\n#### {spelled}",
            f"{before} 7 of {spelled} apples",
        ):
            assert same_number(gsm8k_answer(text), spelled)


def test_numbers_are_read_with_their_sign_and_without_their_dress():
    assert gsm8k_answer("She has 3, then 1,234,567.50 dollars.") == "1234567.50"
    assert gsm8k_answer("It is -.5") == "-.5" and gsm8k_answer("so 20-5") == "5"
    assert gsm8k_answer("no idea") == ""
    assert same_number("$1,000.", "1000") and same_number("5.0", "5") and same_number("+3", "3")
    assert not same_number("5", "-5") and not same_number("5", "5.01")
    assert not same_number("", "") and not same_number("five", "five")


# --- mathematics --------------------------------------------------------------------------------

ATOMS = st.integers(1, 99).map(str) | st.sampled_from(["x", r"\pi", "7.25", r"\infty"])
PLAIN = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: rf"\frac{{{p[0]}}}{{{p[1]}}}"),
        inner.map(lambda i: rf"\sqrt{{{i}}}"),
        inner.map(lambda i: f"({i},-{i})"),
        st.tuples(inner, inner).map("+".join),
    ),
    max_leaves=3,
)
DRESSES = [
    lambda t: t.replace(r"\frac", r"\dfrac"),
    lambda t: t.replace(r"\frac", r"\tfrac"),
    lambda t: t.replace("(", r"\left(").replace(")", r"\right)"),
    lambda t: re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", t),
    lambda t: re.sub(r"^\\frac\{(\d+)\}\{(\d+)\}$", r"\1/\2", t),
    lambda t: re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", t),
    lambda t: t.replace(",", ", ").replace("+", " + "),
    lambda t: rf"\!{t}",
    lambda t: f"x = {t}" if "=" not in t else t,
    lambda t: rf"{t}^\circ",
    lambda t: rf"{t}\%",
    lambda t: rf"\${t}",
    lambda t: rf"{t}\text{{ cm}}" if "text" not in t else t,
]
DRESSED = st.tuples(PLAIN, st.lists(st.sampled_from(DRESSES), max_size=3))


def dress(drawn) -> str:
    text, dresses = drawn
    for change in dresses:
        text = change(text)
    return text


@given(drawn=DRESSED, other=PLAIN)
@OFTEN
def test_latex_is_the_same_in_any_dress_and_only_then(drawn, other):
    assert same_math(dress(drawn), drawn[0]) and same_math(drawn[0], dress(drawn))
    assert same_math(dress(drawn), other) == (drawn[0] == other)


@given(drawn=DRESSED, others=st.lists(st.sampled_from(DRESSES), max_size=3), other=DRESSED)
@OFTEN
def test_what_the_math_code_calls_equal_is_the_same(drawn, others, other):
    is_equiv = oracle("hendrycks_math/utils.py").is_equiv
    for a, b in ((dress(drawn), dress((drawn[0], others))), (dress(drawn), dress(other))):
        assert same_math(a, b) or not is_equiv(a, b)


@pytest.mark.parametrize(
    "a, b",
    [
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac{72}1", r"\frac{72}{1}"),
        (r"\frac \pi 4", r"\frac{\pi}{4}"),
        (r"\frac{\sqrt2}2", r"\frac{\sqrt{2}}{2}"),
        (r"\cfrac{1}{2}", "0.5"),
        (".5", "1/2"),
        ("-1/2", r"\frac{-1}{2}"),
        ("(1/2, 3)", r"(\frac12,3)"),
        (r"\sqrt[3]8", r"\sqrt[3]{8}"),
        (r"2 \sqrt 5", r"2\sqrt{5}"),
        (r"\tfrac 3 4", r"\dfrac34"),
        (r"x=5", "5"),
        (r"y = 2x+3", "2x + 3"),
        (r"5.", "5"),
        ("$5$", "5"),
        (r"\$1,\!000", "1000"),
        ("12,345,678", "12345678"),
        ("5{,}525", "5525"),
        (r"30^{\circ}", "30°"),
        (r"25\%", "25%"),
        (r"10\text{ cm}", "10"),
        (r"10\,\mbox{ cm}^2", "10"),
        (r"8\sqrt{3} \text { square inches}", r"8\sqrt{3}"),
        (r"25\mathrm{km}", "25"),
        ("12 square units", "12"),
        ("3 dollars", "3"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"(\text{E})", r"\text{(E)}"),
        (r"\mbox{even}", r"\textbf{even}"),
        (r"19 \text{ and } 43", "19, 43"),
        (r"7, -2, \text{ and } -5", "7,-2,-5"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"a\quad b", "ab"),
        (
            r"\begin{pmatrix} 1/2 \\ -3/5 \end{pmatrix}",
            r"\begin{pmatrix}\frac12\\-\frac{3}{5}\end{pmatrix}",
        ),
        (r"5\ ", "5"),
        ("", " "),
        (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{pmatrix}1\-2\end{pmatrix}"),
    ],
)
def test_spellings_of_one_answer(a, b):
    assert same_math(a, b) and same_math(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        ("5", "-5"),
        ("5", "6"),
        (r"\frac{1}{2}", r"\frac{2}{1}"),
        ("(1,2)", "[1,2]"),
        ("1,2", "12"),
        ("x=5", "x=6"),
        ("2^3/4", r"2^\frac34"),
        (r"3\frac{-1}{2}", r"3-\frac{1}{2}"),
        (r"19 \text{ and } 43", "19"),
        (r"3\mathrm{i}", "3"),
        ("even", "Even"),
        ("A", "B"),
        (r"\text{even}", ""),
        ("1/2x", r"\frac{1}{2}"),
        ("3m", "3"),
        (r"\leftarrow", "arrow"),
        (r"0.\overline{3}", "0.3"),
        (r"f\circ g", "fg"),
        (r"\sqrt{12}", r"\sqrt{1}2"),
        ("a=b=c", "b=c"),
        (None, "5"),
        (None, None),
    ],
)
def test_answers_that_stay_apart(a, b):
    assert not same_math(a, b) and not same_math(b, a)


def test_a_solutions_answer_is_the_final_line_then_the_box_then_the_last_dollars():
    final = "Final Answer: The final answer is $7$. I hope it is correct."
    assert math_answer(rf"$1$ \boxed{{2}} {final} Problem: $3$ \boxed{{4}}") == "7"
    assert math_answer(r"$1$, \boxed{2}, \boxed{\frac{3}{4}} then $5$.") == r"\frac{3}{4}"
    assert math_answer(r"First $1$, then $$x = 5$$.") == "x = 5"
    assert math_answer(r"It costs \$5 or \$6.") is None and math_answer("") is None
    assert math_answer(final.replace("$7$", r"$\boxed{8}$")) == "8"
    assert math_answer(final.replace("$7$", r"3.5")) == "3.5"
    assert math_answer(final.replace("$7$", r"$3$ and $5$")) == "$3$ and $5$"
    assert math_answer(final.replace("$7$", r"\$3 and \$5")) == r"\$3 and \$5"
    assert math_answer("Final Answer: The final answer is 12.\nNext $5$") == "12"
    assert math_answer(r"\boxed{1} and \boxed{2") == "1" and math_answer(r"\fbox{3}") == "3"
    assert math_answer(r"$\boxed 9$ so") == "9" and math_answer(r"\boxed{\{1\} \\}") == r"\{1\} \\"
    assert math_answer(r"\boxed{\left\{ 1 \right.} + {2}") == r"\left\{ 1 \right."


@given(answer=PLAIN, before=PLAIN)
@OFTEN
def test_answers_are_found_where_the_minerva_code_finds_them(answer, before):
    code = oracle("minerva_math/utils.py")
    text = rf"As ${before}$ and \boxed{{{before}}}, it is $\boxed{{{answer}}}.$"
    assert math_answer(text) == code.remove_boxed(code.last_boxed_only_string(text)) == answer
    text += f"\nFinal Answer: The final answer is ${before}$. I hope it is correct.\n\nProblem: $1$"
    assert math_answer(text) == code.get_unnormalized_answer(text).strip("$") == before


# --- other texts --------------------------------------------------------------------------------


@given(
    target=st.sampled_from(["(A)", "True", "-50", "] ] >", "valid", "3.5", "barn damp dot"]),
    after=st.sampled_from(["", "\n", "\n\nQ: more, the answer is 5.", "  "]),
)
@OFTEN
def test_bbh_answers_are_those_of_the_prompts_own_form(target, after):
    text = f"Let's think.\nTwo steps. So the answer is {target}.{after}"
    assert bbh_answer(text) == target
    # the pattern of lm_eval's bbh/cot_fewshot, which eats the last character whatever it is
    assert re.findall(r"(?<=the answer is )(.*)(?=.)", text.rstrip(" "))[0] == target


def test_bbh_answers_end_with_their_sentence_and_letters_need_no_brackets():
    assert bbh_answer("So the answer is (B). Next one.") == "(B)"
    assert bbh_answer("the answer is no\nthe answer is yes") == "no"
    assert bbh_answer("The answer, is it 5?") == bbh_answer("So the answer is ") == ""
    assert bbh_match(" A\n", "(A)") == bbh_match("(A)", "A") == bbh_match("] ]", "] ]") == 1
    assert bbh_match("true", "True") == bbh_match("(a)", "A") == bbh_match("", "(A)") == 0
    assert bbh_match("(A) red", "(A)") == bbh_match("(1)", "1") == 0


@given(n=st.integers(1, 8), data=st.data())
@OFTEN
def test_pass_at_k_is_the_mean_over_every_choice_of_k_samples(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    right = [True] * c + [False] * (n - c)
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in combinations(right, k)]))


def test_pass_at_k_holds_for_many_samples_and_refuses_too_few():
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4)
    assert pass_at_k(5, 5, 5) == 1 and math.isclose(pass_at_k(200, 20, 100), 1, abs_tol=1e-6)
    for n, c, k in ((4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0), (0, 0, 1)):
        with pytest.raises(ConfigError, match=f"pass@{k} with {c} of {n}"):
            pass_at_k(n, c, k)


@pytest.mark.parametrize("metric", [*BEST_OF, drop_scores], ids=lambda m: m.__name__)
def test_an_item_without_references_is_refused(metric):
    with pytest.raises(DataError, match="No reference"):
        metric("cat", [])
    if metric is not drop_scores:
        with pytest.raises(DataError, match="give a list"):
            metric("cat", "cat")
    else:
        with pytest.raises(DataError, match="No reference"):
            drop_scores("cat", [[], [" "]])


@pytest.mark.parametrize(
    ("measure", "unit"),
    [
        (lambda text: list_f1(text, ["a"]), "[1,"),
        (lambda text: same_number(text, text), "1"),
        (math_answer, r"\boxed{"),
        (math_answer, "Final Answer: The final answer is\t\t\t\t"),
        (bbh_answer, "the answer is " + "\t" * 1000),
        (gsm8k_answer, "1,"),
    ],
)
def test_answers_are_found_in_time_in_proportion(measure, unit):
    started = time.process_time()
    measure(unit * (60_000 // len(unit)) + "x")
    assert time.process_time() - started < 5
