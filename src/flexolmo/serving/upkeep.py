"""Upkeep of a running server: what changed on disk is taken over, and what ended is withdrawn.

Called about once a second on a thread of its own. What does not hold up leaves the former in force,
and is said in the log and in a metric; but an expert that is revoked, or whose terms have ended, is
withdrawn at once, whatever else holds up.
"""

import datetime
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from flexolmo.bundle.facts import ExpertFacts
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import AuditError, BusyError, FlexOlmoError
from flexolmo.inference.engine import ModelFacts
from flexolmo.serving.chat import ChatTemplate
from flexolmo.serving.entries import Kind
from flexolmo.serving.gateway import Gateway, note_barred
from flexolmo.serving.identity import Identity
from flexolmo.serving.policy import Policies
from flexolmo.serving.prompts import TextModel

_log = logging.getLogger(__name__)

Stamp = Sequence[tuple[str, object]]


def stamp(paths: Iterable[Path]) -> Stamp:
    """A value that changes when one of `paths` does, or a file in one that is a directory."""
    found: list[tuple[str, object]] = []
    for path in paths:
        try:
            inside = sorted(path.iterdir()) if path.is_dir() else []
        except OSError:
            inside = []
        for file in (path, *inside):
            try:
                status = file.stat()
            except OSError:
                found.append((str(file), None))
            else:
                found.append((str(file), (status.st_mtime_ns, status.st_size, status.st_ino)))
    return found


def find_revoked(owners: TrustedOwners, experts: Mapping[str, ExpertFacts]) -> dict[str, str]:
    """Experts that their owners have revoked, or whose signer is not trusted any more, and why."""
    found = {}
    for name, facts in experts.items():
        revocation = owners.find_revocation(name, facts)
        if revocation is not None:
            found[name] = f"{name} was {revocation}."
        elif not owners.allows_unknown and owners.owner_of(facts.key_id) != facts.owner:
            found[name] = f"The key that signed {name} is not trusted any more."
    return found


@dataclass(frozen=True)
class Sources:
    """Places of a server's model, policies and trust, and ways to read them."""

    policies: Path  # directory
    model: Sequence[Path]  # files and directories after a change of which the engine reloads
    read_texts: Callable[[], tuple[Tokenizer, ChatTemplate | None]]
    read_owners: Callable[[], TrustedOwners]


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def look_at(identity: Identity, sources: Sources) -> dict[str, Stamp]:
    """Stamps of all that may change while serving, by what it is."""
    return {
        "auth": stamp(identity.files),
        "policy": stamp([sources.policies]),
        "model": stamp(sources.model),
    }


class Upkeep:
    """The upkeep of one gateway.

    Args:
        seen: Stamps from `look_at`, of before anything was read.
    """

    def __init__(self, gateway: Gateway, sources: Sources, seen: Mapping[str, Stamp]):
        self._gateway = gateway
        self._sources = sources
        self._seen = seen
        self._day = _today()
        self._told = gateway.barred(gateway.engine.facts)  # of which the log knows
        self._must_reload = False

    def look(self) -> None:
        """Take over all that has changed since the last look."""
        gateway = self._gateway
        found = look_at(gateway.identity, self._sources)
        changed = {what for what in found if found[what] != self._seen[what]}
        self._seen = found
        if "auth" in changed:
            self._try("auth", gateway.identity.reread)
        self._try("issuer", gateway.identity.refresh)
        if "policy" in changed:
            self._try("policy", self._reread_policies)
        self._try("terms", self._withdraw_ended)
        if "model" in changed or self._has_begun():
            self._try("revocations", self._withdraw_revoked)
            self._must_reload = True
        if self._must_reload:
            self._try("model", self._reload)
        elif gateway.texts.digest != gateway.engine.facts.digest:
            self._try("model", self._catch_up)
        if not gateway.can_audit:
            self._try("audit", self._retry_audit)

    def _try(self, what: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as e:  # upkeep goes on whatever fails
            self._gateway.metrics.upkeep_failures.labels(what).inc()
            detail = str(e) if isinstance(e, FlexOlmoError) else type(e).__name__
            _log.error("upkeep failed", extra={"what": what, "detail": detail})

    def _reread_policies(self) -> None:
        self._gateway.policies = Policies.load(self._sources.policies)
        self._append("reloaded", self._gateway.describe())

    def _reload(self) -> None:
        """Have the engine read the model; at a later look if it is being started again now."""
        self._must_reload = False
        texts = self._sources.read_texts()
        try:
            facts = self._gateway.engine.reload()
        except BusyError:
            self._must_reload = True
        else:
            self._take_up(facts, *texts)

    def _catch_up(self) -> None:
        """Serve the model that the engine runs since it was started again."""
        self._take_up(self._gateway.engine.facts, *self._sources.read_texts())

    def _take_up(self, facts: ModelFacts, tokenizer: Tokenizer, chat: ChatTemplate | None) -> None:
        gateway = self._gateway
        gateway.texts = TextModel(facts.digest, tokenizer, chat)
        self._append("reloaded", gateway.describe())
        for name, barred in facts.barred.items():
            if self._told.get(name) != barred:
                self._append("revoked", note_barred(name, barred.why))
        self._told = gateway.barred(facts)

    def _has_begun(self) -> bool:
        """True, once a day, if the terms of an expert that was not loaded have begun."""
        day, self._day = self._day, _today()
        waits = [x.until for x in self._gateway.engine.facts.barred.values() if x.until is not None]
        return day < self._day and any(until <= self._day for until in waits)

    def _withdraw_ended(self) -> None:
        today = _today()
        terms = {n: facts.terms for n, facts in self._gateway.engine.facts.experts.items()}
        self._withdraw(
            {
                name: f"{name}: {', '.join(found.refusals_of_day(today))}."
                for name, found in terms.items()
                if found.valid_until is not None and found.valid_until < today
            }
        )

    def _withdraw_revoked(self) -> None:
        owners = self._sources.read_owners()
        self._withdraw(find_revoked(owners, self._gateway.engine.facts.experts))

    def _withdraw(self, experts: Mapping[str, str]) -> None:
        gone = self._gateway.withdraw(experts)
        for name, why in gone.items():
            self._append("revoked", note_barred(name, why))
        barred = self._gateway.barred(self._gateway.engine.facts)
        self._told |= {name: barred[name] for name in gone.keys() & barred.keys()}

    def _append(self, kind: Kind, fields: Mapping[str, JsonValue]) -> None:
        """Log what has been done already; that the log cannot be written undoes nothing."""
        try:
            self._gateway.audit.append(kind, fields)
        except AuditError as e:
            self._gateway.note_audit_failure(e)

    def _retry_audit(self) -> None:
        """Log what is served, as the first entry after those that could not be written."""
        self._gateway.audit.append("reloaded", self._gateway.describe())
        self._gateway.can_audit = True
