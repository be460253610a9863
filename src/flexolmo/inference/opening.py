"""Settings of an engine in a process of its own, which is told them when it starts. No torch."""

from pathlib import Path
from typing import Any

from pydantic import Field

from flexolmo.bundle.trust import TrustedOwners, load_owners
from flexolmo.config import Settings
from flexolmo.errors import SignatureError


class Opening(Settings):
    """A mixture's directory, whom to trust about it, and sizes of the engine that runs it."""

    model: Path = Field(description="Directory of the mixture.")
    trust: Path | None = Field(None, description="Directory of trusted owners' public keys.")
    trusts_any_signer: bool = Field(False, description="True to accept signers you do not know.")
    verify: bool = Field(False, description="True to hash again what was verified before.")
    experts: tuple[str, ...] | None = Field(None, description="Experts to load; none: all.")
    seen: dict[str, dict[str, dict[str, Any]]] = Field(
        {}, description="Record of bundles that were seen: no expert older than these is loaded."
    )
    memory_bytes: int = Field(1 << 30, ge=1, description="Memory for keys and values, in bytes.")
    max_running: int = Field(64, ge=1, description="Requests that are read and written at once.")
    step_tokens: int = Field(
        512, ge=1, description="Tokens that one step reads at most, of prompts and answers."
    )

    def read_owners(self) -> TrustedOwners:
        """The trusted owners as they are now; SignatureError if nobody is trusted."""
        owners = load_owners(self.trust, self.trusts_any_signer)
        if owners is None:
            raise SignatureError("Nobody was said to be trusted. Give --trust DIR.")
        return owners
