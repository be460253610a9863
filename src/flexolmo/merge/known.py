"""The anchor and the bundles of a mixture that the user's record says were verified before.

Finds out whether files are still those that were verified, also after links to them have been made
or removed, and keeps that they are. Knows nothing of what is checked, nor of mixture.json.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flexolmo.bundle.bundle import WEIGHTS_FILE, Bundle, VerifiedWeights, subject_of
from flexolmo.bundle.verified import Identities, Identity, VerifiedFiles, identify
from flexolmo.errors import CheckpointError, DataError
from flexolmo.files import path_of_open, read_json
from flexolmo.model.checkpoint import Anchor, VerifiedAnchor, anchor_files, load_anchor

# --- bundles ------------------------------------------------------------------------------------


def find_known(
    path: Path, digests: Mapping[str, str], record: VerifiedFiles | None
) -> VerifiedWeights | None:
    """The weights in the bundle at `path`, if `record` says that they were verified as those of
    these `digests` of its files, and they have not changed."""
    if record is None:
        return None
    try:
        found = identify(path, [WEIGHTS_FILE])
    except OSError:
        return None  # the bundle is refused for it later
    facts = record.find(path, subject_of(digests), found)
    return None if facts is None else VerifiedWeights(found[WEIGHTS_FILE], facts["largest"])


def find_again(known: VerifiedWeights | None, bundle: Path) -> VerifiedWeights | None:
    """The weights in `bundle` if they are the `known` ones, to which links were made or removed
    since, while nobody but us could change them."""
    if known is None or not (bundle / WEIGHTS_FILE).exists():
        return None
    found = Identity.of(bundle / WEIGHTS_FILE)
    return replace(known, identity=found) if found.is_same_content(known.identity) else None


def remember_bundle(path: Path, bundle: Bundle, record: VerifiedFiles | None) -> None:
    """Keep that the weights in `path`, which are the opened bundle's, passed every check."""
    if record is not None and bundle.verified is not None:
        files = {WEIGHTS_FILE: bundle.verified.identity}
        facts = {"largest": dict(bundle.verified.largest)}
        record.keep(path, subject_of(bundle.digests), files, facts)


def remember_moved(path: Path, bundle: Bundle, record: VerifiedFiles | None) -> None:
    """Keep that the weights in `path` passed every check, if they are those of `bundle`, which was
    opened elsewhere and has been moved or linked to `path` since."""
    remember_bundle(path, replace(bundle, verified=find_again(bundle.verified, path)), record)


# --- the anchor ---------------------------------------------------------------------------------


def find_anchor(
    directory: Path, record: VerifiedFiles | None
) -> tuple[dict[str, Identity], VerifiedAnchor | None]:
    """Identities of the files of the anchor in `directory`, and what `record` says was found when
    they were last verified, if they have not changed."""
    found = identify(directory, anchor_files(directory))
    if record is None or "anchor.json" not in found:
        return found, None
    about = read_json(directory / "anchor.json", CheckpointError)
    digest = str(about.get("digest")) if isinstance(about, dict) else ""
    facts = record.find(directory, _subject(digest), found)
    return found, None if facts is None else VerifiedAnchor(digest, facts["largest"])


def open_anchor(
    directory: Path, found: Identities, verified: VerifiedAnchor | None, *, is_mapped: bool = False
) -> Anchor:
    """The anchor in `directory`, whose files are those `found` there, `verified` before or not.

    Raises CheckpointError if its files are not the same, before they are read and afterwards.
    """
    with _hold(directory) as held:
        _refuse_others(held, found)
        is_held = held != directory
        anchor = load_anchor(
            held, is_mapped=is_mapped and is_held, verified=verified if is_held else None
        )
        _refuse_others(held, found)
    return anchor


@contextmanager
def _hold(directory: Path) -> Iterator[Path]:
    """A path to `directory` that leads there even if others exchange it, or one around it, for
    another meanwhile, which changes no time of a file; `directory` itself where the system has no
    such path. Errors name `directory`."""
    try:
        number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield directory  # is refused for it
        return
    held = path_of_open(number) or directory
    try:
        yield held
    except (CheckpointError, DataError) as e:
        raise type(e)(str(e).replace(str(held), str(directory))) from None
    finally:
        os.close(number)


def _refuse_others(directory: Path, found: Identities) -> None:
    """Raises CheckpointError if the anchor's files in `directory` are others than those `found`."""
    try:
        now = identify(directory, anchor_files(directory))
    except OSError:  # one has gone in between
        now = {}
    if now != found:
        raise CheckpointError(f"{directory} changed while it was read. Read it again once at rest.")


def remember_anchor(
    directory: Path, anchor: Anchor, found: Identities, record: VerifiedFiles | None
) -> None:
    """Keep that the files of the anchor in `directory`, which are those `found` but for links made
    and removed since, passed every check."""
    if record is None:
        return
    now = identify(directory, anchor_files(directory))
    if are_same(now, found):
        record.keep(directory, _subject(anchor.digest), now, {"largest": dict(anchor.largest)})


def are_same(now: Identities, before: Identities) -> bool:
    """True if both are the same files, but for links made and removed in between."""
    return now.keys() == before.keys() and all(now[n].is_same_content(before[n]) for n in now)


def _subject(digest: str) -> str:
    return f"the anchor {digest}"
