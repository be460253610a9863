"""The options that say whose signature counts and what is hashed again, the same in every command
that asks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flexolmo.bundle.trust import TrustedOwners

TrustDirectory = Annotated[
    Path | None,
    typer.Option(
        "--trust",
        envvar="FLEXOLMO_TRUST",
        help="Directory of trusted owners' public keys, one OWNER.pub each.",
    ),
]
TrustAny = Annotated[
    bool,
    typer.Option(
        "--trust-any-signer", help="Accept signers you do not know. Every other check stays."
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Hash every file again, also those that your record says were verified and that have "
        "not changed since. FLEXOLMO_VERIFY=1 asks for it too.",
    ),
]


def trusted_owners(trust: Path | None, trust_any_signer: bool) -> "TrustedOwners | None":
    """The owners these options trust; None if neither is given, which opens no mixture."""
    from flexolmo.bundle.trust import load_owners

    return load_owners(trust, trust_any_signer)
