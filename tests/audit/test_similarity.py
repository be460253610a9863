"""Edit distance against the table of all distances."""

from hypothesis import given
from hypothesis import strategies as st

from flexolmo.audit.similarity import edit_distance, similarity

TEXTS = st.text(alphabet="abéz ", max_size=12) | st.text(max_size=90)


def table_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@given(TEXTS, TEXTS)
def test_a_distance_is_that_of_the_table(a, b):
    assert edit_distance(a, b) == table_distance(a, b)


def test_similarity_is_over_the_longer_text():
    assert similarity("abcd", "abcd") == similarity("", "") == 1.0
    assert similarity("abcd", "wxyz") == similarity("", "x") == 0.0
    assert similarity("ab", "abcd") == similarity("abcd", "ab") == 0.5
