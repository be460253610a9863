"""Licences as SPDX expressions, of identifiers that the SPDX list holds. No torch."""

import functools
import re

from license_expression import Licensing, get_spdx_licensing

_OWN = re.compile(r"(DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+")


@functools.cache
def _spdx() -> Licensing:
    return get_spdx_licensing()


def spell_licence(text: str) -> str:
    """The plain spelling of the SPDX expression `text`: `mit or isc` is `MIT OR ISC`.

    ValueError unless it is one, of identifiers of the SPDX list as the `license-expression`
    package carries it, and `LicenseRef-NAME` for licences of one's own.
    """
    try:
        parsed = _spdx().parse(text, strict=True)
        unknown = [key for key in _spdx().unknown_license_keys(parsed) if not _OWN.fullmatch(key)]
    except Exception:  # the parser raises several kinds, IndexError too, on what is no expression
        parsed = None
        unknown = []
    if parsed is None:
        raise ValueError("an SPDX licence expression, such as Apache-2.0 or MIT OR ISC")
    if unknown:
        raise ValueError(
            "identifiers of the SPDX licence list, or LicenseRef-NAME for your own licence; "
            f"unknown: {', '.join(unknown)}"
        )
    return str(parsed)
