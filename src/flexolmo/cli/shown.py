"""Bundles and mixtures as tables for a terminal. All that they claim is shown as text."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError
from rich.table import Column, Table

from flexolmo.bundle.manifest import Manifest
from flexolmo.bundle.release import stated_budget
from flexolmo.bundle.terms import Terms
from flexolmo.numbers import format_megabytes, format_number
from flexolmo.terminal import PlainConsole, echo


def print_bundle(found: dict[str, Any]) -> None:
    """Print what `inspect_bundle` found, without the digest of each tensor."""
    table = Table("", Column(found["path"], overflow="fold"))  # digests whole
    for about, value in _bundle_rows(found):
        table.add_row(about, value)
    PlainConsole().print(table)


def _bundle_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if found["verified"]:
        yield "holds up", f"yes: whole, and signed by the trusted owner {found['signer']}"
    else:
        yield "holds up", f"no: {found['why_not']}"
    if found["key_id"] is not None:
        yield "key id", found["key_id"]
    if found["claims"] is not None:
        yield from _claim_rows(Manifest.model_validate_json(json.dumps(found["claims"])))
    sizes = [f"{name} {size:,}" for name, size in found["file_bytes"].items()]
    if sizes:
        yield "files, in bytes", "\n".join(sizes)


def _claim_rows(m: Manifest) -> Iterator[tuple[str, str]]:
    """Rows of the table on what the owner says in the manifest."""
    yield "expert", m.name
    yield "owner", m.owner
    yield "serial", f"{m.serial}, packed {m.created}"
    yield "licence", m.licence
    yield "terms", m.terms.text
    yield "use", m.terms.summary().replace("; ", "\n")
    yield "for the anchor", m.anchor_digest
    yield "learned", _learned(m)
    yield "router", f"{m.router.kind}, {m.architecture.num_bigrams:,} word pairs"
    budget = stated_budget(m)
    read = f"{m.tokens_seen:,} tokens"
    yield "has read", read if budget is None else f"{read} at most, in the mean"
    yield "privacy", "no guarantee for the weights" if budget is None else budget.summary()
    yield "data card", m.data_card_digest
    yield "weights", m.weights_digest


def _learned(m: Manifest) -> str:
    """The parts that differ from the anchor's, with the rank of each difference."""
    a = m.architecture
    ffn = f"FFN of width {a.d_ff}, " + (f"by rank {a.rank}" if a.rank else "whole")
    ranks = {"attention": a.attention_rank, "embedding": a.embedding_rank, "head": a.head_rank}
    parts = [
        f"{part}, " + (f"by rank {rank}" if rank < a.d_model else "whole")
        for part, rank in ranks.items()
        if rank
    ]
    return "\n".join([ffn, *parts])


def print_mixture(about: dict[str, Any]) -> None:
    """The content of `mixture.json` in brief: an expert in each row, then who is bound to what."""
    table = Table("expert", "owner", "serial", "licence", "use", "MB", "tokens read")
    for name, told in about["experts"].items():
        table.add_row(
            name,
            str(told.get("owner")),
            str(told.get("serial")),
            str(told.get("licence")),
            _use(told.get("terms")),
            _number(told.get("weights_bytes"), format_megabytes),
            _number(told.get("tokens_seen"), lambda n: format_number(n, 0)),
        )
    PlainConsole().print(table)
    active = about["top_k"] or "all that are on"
    echo(f"anchor: {about['anchor_digest']}")
    echo(f"router: {about['router']['kind']}; experts active for a token: {active}")
    for what in ("influence", "release"):
        limits = (about.get(what) or {"limits": {}})["limits"]
        told = "; ".join(f"{k} at most {v:g}" for k, v in limits.items())
        echo(f"limits of {what}: {told or 'none'}")
    echo("Everything, digests too: --json. Signatures are checked whenever it is loaded.")


def _number(value: Any, shown: Callable[[float], str]) -> str:
    """A number of the index, which nobody signed; what is none, as it stands."""
    return shown(value) if isinstance(value, int | float) else str(value)


def _use(terms: Any) -> str:
    """Terms as the index, which nobody signed, has them."""
    try:
        stated = Terms.model_validate_json(json.dumps(terms))
    except ValidationError:
        return "not readable"
    return f"{stated.text}\n" + stated.summary().replace("; ", "\n")
