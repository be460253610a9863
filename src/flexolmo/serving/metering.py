"""Usage of a period, by owner or by principal, from the audit log's `finished` entries.

Sums over requests alone: an owner's share of a request is one number for all its tokens, and
nothing finer was ever written down, for routes per token rebuild a text (arXiv 2602.04105).
"""

import csv
import datetime
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric import ec

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.errors import AuditError
from flexolmo.serving.audit_check import check_log
from flexolmo.serving.entries import Entry, Finished

By = Literal["owner", "principal"]


@dataclass
class Usage:
    """Sums over the requests of one owner or principal.

    A request is an owner's if one of the owner's experts was on.
    """

    name: str | None  # None: public text, which has no owner
    requests: int = 0
    prompt_tokens: int = 0  # in these requests, those taken from the cache included
    written_tokens: int = 0
    tokens: float = 0.0  # of prompts and answers; of an owner, only the owner's share of each


def measure_usage(
    directory: Path,
    first: datetime.date,
    last: datetime.date,
    by: By,
    key: ec.EllipticCurvePublicKey,
) -> list[Usage]:
    """Usage by requests that finished from day `first` to day `last` (UTC), in order of name.

    Raises:
        AuditError: the log does not hold up, or entries of these days were removed from it.
    """
    found: dict[str | None, Usage] = {}
    kept_from = ""

    def count(entry: Entry) -> None:
        nonlocal kept_from
        day = entry.time[:10]
        kept_from = kept_from or day
        if entry.kind == "finished" and first.isoformat() <= day <= last.isoformat():
            finished = Finished.model_validate(entry.fields)
            for name, share in _shares(finished, by).items():
                _add(found.setdefault(name, Usage(name)), finished, share)

    report = check_log(directory, key, see=count)
    if report.num_findings:
        raise AuditError(
            f"Usage is not counted from {directory}, which does not hold up: {report.findings[0]} "
            "See all with flexolmo audit verify."
        )
    if report.num_removed and first.isoformat() < kept_from:
        raise AuditError(
            f"Entries before {kept_from} were removed from {directory}: usage from {first} on can "
            f"no longer be counted. Ask --from {kept_from}."
        )
    return sorted(found.values(), key=lambda usage: (usage.name is None, usage.name or ""))


def _shares(finished: Finished, by: By) -> dict[str | None, float]:
    """The share of a request that counts for each name."""
    if by == "principal":
        return {finished.principal: 1.0}
    shares: dict[str | None, float] = {}
    for expert, share in finished.shares.items():
        owner = None if expert == PUBLIC else finished.owners[expert]
        shares[owner] = shares.get(owner, 0.0) + share
    return shares


def _add(usage: Usage, finished: Finished, share: float) -> None:
    usage.requests += 1
    usage.prompt_tokens += finished.prompt_tokens
    usage.written_tokens += finished.written_tokens
    usage.tokens += share * (finished.prompt_tokens + finished.written_tokens)


def usage_as_csv(rows: Sequence[Usage]) -> str:
    """`rows` as CSV with a header; public text has an empty name.

    A name that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    out = io.StringIO()
    # Names are always quoted: a lone carriage return would otherwise begin a row of its own.
    fields = list(Usage.__dataclass_fields__)
    writer = csv.DictWriter(out, fields, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    for row in rows:
        name = row.name or ""
        is_formula = name.startswith(("=", "+", "-", "@", "\t", "\r"))
        writer.writerow(asdict(row) | {"name": f"'{name}" if is_formula else name})
    return out.getvalue()
