"""Licences are SPDX expressions of known identifiers, in one plain spelling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.bundle.licence import spell_licence

words = st.sampled_from(
    [
        *("MIT", "Apache-2.0", "GPL-2.0-only", "Classpath-exception-2.0", "LicenseRef-x", "Nope"),
        *("gpl", "AND", "OR", "WITH", "and", "(", ")", "+", ":", "-", "é", "\\", "\t"),
    ]
)


@pytest.mark.parametrize(
    "text, plain",
    [
        ("MIT", "MIT"),
        ("mit or (isc)", "MIT OR ISC"),
        ("GPL-2.0+", "GPL-2.0-or-later"),
        ("MIT OR ISC AND 0BSD", "MIT OR (ISC AND 0BSD)"),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "GPL-2.0-only WITH Classpath-exception-2.0"),
        ("LicenseRef-St.Mary-2", "LicenseRef-St.Mary-2"),
        ("DocumentRef-a:LicenseRef-b", "DocumentRef-a:LicenseRef-b"),
    ],
)
def test_an_expression_has_one_plain_spelling(text, plain):
    assert spell_licence(text) == plain == spell_licence(plain)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "(", "()", "( AND -", "(" * 1000, "()WITHClasspath-exception-2.0"),
        *("MIT AND", "MIT ISC", "MIT WITH MIT", "MIT+", "Classpath-exception-2.0", "NONE"),
        *("Nope-1.0", "MIT OR Nope-1.0"),
        *("LicenseRef-", "LicenseRef-a b", "LicenseRef-a_b", "LicenseRef-é", "XLicenseRef-a"),
    ],
)
def test_what_is_no_expression_or_not_of_the_list_is_refused(text):
    with pytest.raises(ValueError, match="SPDX"):
        spell_licence(text)


@given(st.lists(words, max_size=30).map(" ".join) | st.lists(words, max_size=30).map("".join))
def test_any_text_is_spelled_plainly_for_good_or_refused(text):
    try:
        plain = spell_licence(text)
    except ValueError as e:
        assert "SPDX" in str(e)
    else:
        assert spell_licence(plain) == plain
