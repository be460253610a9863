"""The parts of a preparation that is cut up: what each does, and the notes by which others know.

Four stages, each of which needs all of the one before: documents are cleaned in many parts, chosen
in one, tokenized in many, and written in one. What is kept and what is written is decided by the
functions of the small path alone, so the result has the same bytes. A part can be asked for any
number of times, at once too, by whoever has the path of the work: one at a time does it, under a
lock, and its result, which is written last, says that it is done. Knows nothing of who asks.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexolmo.data.corpus import Corpus
from flexolmo.data.pieces import (
    PieceStore,
    Removed,
    batch_documents,
    clean_documents,
    remove_pieces,
)
from flexolmo.data.plan import Plan, read_plan
from flexolmo.data.prepare import (
    MARKER,
    choose_pieces,
    chosen_batches,
    refuse_another,
    remove_choice,
    write_set,
)
from flexolmo.data.shards import Tokenized, tokenize_texts
from flexolmo.errors import ConfigError, DataError, FlexOlmoError, UnfinishedError
from flexolmo.files import read_json, write_directory_aside
from flexolmo.terminal import echo

_SHOWN_PARTS = 10


def do_part(work: Path, stage: str, part: int) -> None:
    """Do one part of a stage, unless it is done. Another process may be at work on it, of this run
    or of one that was killed: wait for its end.

    Args:
        work: directory of the files of all parts, in which a plan was begun.
    Raises:
        UnfinishedError: parts of the stage before were not done, or the run is over.
        FlexOlmoError: as `prepare_set`; the reason is noted for whoever asked.
    """
    if stage not in STAGES:
        raise ConfigError(f"There is no stage {stage!r}: expected one of {', '.join(STAGES)}.")
    try:
        plan = read_plan(work)
        if not 0 <= part < parts_of(plan, stage):
            raise ConfigError(
                f"There is no part {part} of {stage} in {work}, which has parts 0 to "
                f"{parts_of(plan, stage) - 1}."
            )
        with _hold_part(work, stage, part):
            result = _result(work, stage, part)
            if not result.exists():
                _check_before(plan, stage)
                found = STAGES[stage].work_on(plan, part)
                os.sync()  # the files are there before the result, which says that they are
                _write_note(result, found)
    except Exception as e:
        note_failure(work, stage, part, e)
        raise


def parts_of(plan: Plan, stage: str) -> int:
    """Number of parts of a stage."""
    return plan.tasks if STAGES[stage].is_dealt_out else 1


def num_parts(plan: Plan) -> int:
    """Number of parts of all stages."""
    return sum(parts_of(plan, stage) for stage in STAGES)


def missing_parts(plan: Plan) -> dict[str, list[int]]:
    """Parts that were not done, by stage; stages of which none is missing are left out."""
    there = set(os.listdir(plan.work))
    missing = {
        stage: [n for n in range(parts_of(plan, stage)) if _result_name(stage, n) not in there]
        for stage in STAGES
    }
    return {stage: parts for stage, parts in missing.items() if parts}


def lines_said(plan: Plan) -> list[str]:
    """Sentences that the parts found to tell, as `prepare_set` tells them."""
    return [
        line for stage in ("choose", "write") for line in read_json(_result(plan.work, stage, 0))
    ]


def note_failure(work: Path, stage: str, part: int, error: Exception) -> None:
    """Note why a part failed, for whoever asked for it elsewhere."""
    reason = str(error) if isinstance(error, FlexOlmoError) else f"{type(error).__name__}: {error}"
    with suppress(OSError):  # a full disk, which is what the error then says where it is shown
        _write_note(_failure(work, stage, part), reason)


def has_failed(work: Path, stage: str, part: int) -> bool:
    """True if the last try of a part said why it failed."""
    return _failure(work, stage, part).exists()


def failed_parts(
    plan: Plan, missing: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, int, str]]:
    """Stage, number and reason of each missing part whose last try said why it failed."""
    there = set(os.listdir(plan.work))
    for stage, parts in missing.items():
        for part in parts:
            path = _failure(plan.work, stage, part)
            if path.name in there:
                yield stage, part, str(read_json(path))


def check_done(plan: Plan) -> None:
    """Refuse to go on unless all parts were done.

    Raises:
        UnfinishedError: with what `describe_missing` says.
    """
    if missing_parts(plan):
        raise UnfinishedError(
            f"{plan.task.out} was not written: {describe_missing(plan)}\n"
            f"What was done is kept in {plan.work.parent}, with text of the set. Give the same "
            "command again to do what is missing alone, or remove that directory."
        )


def describe_missing(plan: Plan) -> str:
    """The parts of the first stage that lacks some, and why they were not done, in lines."""
    stage, parts = next(iter(missing_parts(plan).items()))
    reasons = {part: reason for _, part, reason in failed_parts(plan, {stage: parts})}
    lines = [f"{len(parts)} of {parts_of(plan, stage)} parts of {stage} were not done."]
    for part in parts[:_SHOWN_PARTS]:
        reason = reasons.get(part) or _last_words(log_of(plan.work, stage, part))
        lines.append(f"  part {part}: {reason}")
    if len(parts) > _SHOWN_PARTS:
        lines.append(f"  and parts {show_numbers(parts[_SHOWN_PARTS:])}")
    return "\n".join(lines)


def _last_words(log: Path) -> str:
    """The end of what a part printed before it was killed."""
    if not log.exists():
        return "it left no word, so it was not begun, or was killed"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "it was cut off; the last it printed: " + (" / ".join(lines[-3:]) or "nothing")


def log_of(work: Path, stage: str, part: int) -> Path:
    """File of what a part prints where no terminal shows it."""
    return work / f"{stage}-{part}.log"


def forget_failures(plan: Plan) -> None:
    """Remove what failed tries of missing parts left to be read, before they are tried again."""
    for stage, parts in missing_parts(plan).items():
        for part in parts:
            _failure(plan.work, stage, part).unlink(missing_ok=True)
            log_of(plan.work, stage, part).unlink(missing_ok=True)


def _check_before(plan: Plan, stage: str) -> None:
    """Refuse to begin before all parts of the stage before are done."""
    order = list(STAGES)
    for before in order[: order.index(stage)]:
        missing = missing_parts(plan).get(before, [])
        # asked for by name, for a listing of what other machines wrote may be old
        parts = [part for part in missing if not _result(plan.work, before, part).exists()]
        if parts:
            raise UnfinishedError(
                f"{stage} needs all of {before}, of which {len(parts)} of "
                f"{parts_of(plan, before)} parts were not done: {show_numbers(parts)}."
            )


def show_numbers(numbers: Sequence[int]) -> str:
    """Ascending numbers in few words, such as 0-5,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def _clean(plan: Plan, part: int) -> dict[str, Any]:
    """Clean, cut and fingerprint documents."""
    task, work = plan.task, plan.work
    remove_pieces(work, part)  # of a run that was killed
    store = PieceStore(work, part)
    corpus, group, lane, lanes = share_of(task.corpus, plan.sizes, part, plan.tasks)
    removed = Removed()
    first_batches: dict[str, int] = {}
    for number, documents in enumerate(batch_documents(corpus.read())):
        if number % lanes != lane:
            continue
        cleaned = clean_documents(task.settings, documents)
        store.add((group << 40) + number, cleaned)
        removed.add(cleaned.removed)
        for reason in cleaned.removed.documents:
            first_batches.setdefault(reason, (group << 40) + number)
    return {
        "written": store.counts,
        "first_batches": first_batches,
        "documents": removed.documents,
        "bytes": removed.bytes,
        "found": removed.found,
        "replaced_characters": removed.replaced_characters,
        "noted": corpus.noted if lane == 0 else {},  # all lanes read all
    }


def _choose(plan: Plan, _part: int) -> list[str]:
    """Drop repeats, split, and learn the tokenizer where none was given."""
    task, work = plan.task, plan.work
    remove_choice(work)
    removed, noted = _join_removed(work, plan.tasks)
    task.corpus.noted.update(noted)
    said: list[str] = []
    choose_pieces(task, work, plan.tasks, removed, said.append)
    return said


def _tokenize(plan: Plan, part: int) -> int:
    """Tokenize pieces that were chosen."""
    work = plan.work
    with open(_tokens(work, part), "wb") as f:
        for number, places in enumerate(chosen_batches(work)):
            if number % plan.tasks == part:
                found = tokenize_texts(work, places)
                head = {
                    "bytes": len(found.tokens),
                    "lengths": found.lengths,
                    "changed": found.changed,
                }
                f.write(json.dumps(head).encode() + b"\n" + found.tokens)
        return f.tell()


def _write(plan: Plan, _part: int) -> list[str]:
    """Write the prepared set; a set that came to its place since the plan was made is refused, as
    it would have been then."""
    task, work = plan.task, plan.work
    if not plan.may_replace:
        refuse_another(task.out, task.corpus, task.recipe)
    said: list[str] = []
    is_private = task.corpus.is_private
    with (
        ExitStack() as files,
        write_directory_aside(task.out, MARKER, is_private=is_private) as aside,
    ):
        write_set(task, work, aside, _Replay(work, plan.tasks, files), said.append)
    return said


@dataclass(frozen=True)
class Stage:
    """One stage of a preparation."""

    work_on: Callable[[Plan, int], Any]  # doing a part again gives the same files; returns JSON
    is_dealt_out: bool  # in as many parts as there are tasks; else it is one


STAGES = {
    "clean": Stage(_clean, is_dealt_out=True),
    "choose": Stage(_choose, is_dealt_out=False),
    "tokenize": Stage(_tokenize, is_dealt_out=True),
    "write": Stage(_write, is_dealt_out=False),
}


def share_of(
    corpus: Corpus, sizes: Sequence[int], part: int, parts: int
) -> tuple[Corpus, int, int, int]:
    """The files that part `part` of `parts` reads, and which batches of their documents are its.

    Files are dealt out in neighbouring groups of about as many bytes. Where there are fewer files
    than parts, several parts (lanes) read the same group and take its batches in turn.

    Args:
        sizes: bytes of each file when the preparation was begun. What a file has now is not asked,
            or parts would not agree on who reads which; one that has changed is refused when read.
    Returns:
        The files as a corpus, the number of their group, the lane, and lanes of that group.
    """
    groups = max(1, min(parts, len(corpus.files)))
    lane, group = divmod(part, groups)
    lanes = len(range(group, parts, groups))
    total = max(1, sum(sizes))
    files = []
    before = 0
    for (file, digest), size in zip(corpus.files, sizes, strict=True):
        if min(before * groups // total, groups - 1) == group:  # empty files may come last
            files.append((file, digest))
        before += size
    return replace(corpus, files=files, noted=Counter()), group, lane, lanes


def _join_removed(work: Path, parts: int) -> tuple[Removed, Counter[str]]:
    """Losses of cleaning, and what reading noted, in all parts; reasons in order of reading.

    Raises:
        DataError: files of a part are missing, or not as long as its task wrote them.
    """
    found = [read_json(_result(work, "clean", part), DataError) for part in range(parts)]
    for part, one in enumerate(found):
        _check_written(work, part, PieceStore(work, part, is_read_only=True).counts, one["written"])
    first_batches = [(batch, r) for one in found for r, batch in one["first_batches"].items()]
    removed = Removed()
    for _, reason in sorted(first_batches, key=lambda pair: pair[0]):
        removed.documents[reason] = 0
        removed.bytes[reason] = 0
    noted = Counter[str]()
    for one in found:
        counts = Removed(found=one["found"], replaced_characters=one["replaced_characters"])
        counts.documents.update(one["documents"])
        counts.bytes.update(one["bytes"])
        removed.add(counts)
        noted.update(one["noted"])
    return removed, noted


class _Replay:
    """Stands in for the processes of `write_set`: tokens that the tasks wrote, in order."""

    def __init__(self, work: Path, parts: int, files: ExitStack) -> None:
        paths = [_tokens(work, part) for part in range(parts)]
        for part, path in enumerate(paths):
            expected = read_json(_result(work, "tokenize", part), DataError)
            _check_written(work, part, path.stat().st_size if path.exists() else None, expected)
        self._files = [files.enter_context(path.open("rb")) for path in paths]
        self._next = 0  # number of the batch

    def __call__(self, _: Any, batches: Iterable[Any]) -> Iterator[Tokenized]:
        for _batch in batches:
            file = self._files[self._next % len(self._files)]
            self._next += 1
            head = json.loads(file.readline())
            changed = {int(number): text for number, text in head["changed"].items()}
            yield Tokenized(file.read(head["bytes"]), head["lengths"], changed)


def _tokens(work: Path, part: int) -> Path:
    return work / f"tokens-{part:05d}"


def _result(work: Path, stage: str, part: int) -> Path:
    """The file that says that a part is done, written after all others of that part."""
    return work / _result_name(stage, part)


def _result_name(stage: str, part: int) -> str:
    return f"done-{stage}-{part:05d}.json"


def _failure(work: Path, stage: str, part: int) -> Path:
    return work / f"failed-{stage}-{part:05d}.json"


def _write_note(path: Path, value: Any) -> None:
    """Write JSON, all or nothing, in a directory that is there. `files.write_json` would make it,
    and that of a run that is over may be gone."""
    aside = path.with_name(f"{path.name}.new")
    with open(aside, "w", encoding="ascii") as f:
        json.dump(value, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def _check_written(work: Path, part: int, found: Any, expected: Any) -> None:
    if found != expected:
        raise DataError(
            f"{work}: part {part} is not as its task left it: found {found}, expected {expected}. "
            f"Remove {work.parent}, if it is still there, and run this again to begin anew."
        )


@contextmanager
def _hold_part(work: Path, stage: str, part: int) -> Iterator[None]:
    """Hold the lock of one part; wait for another who holds it. Its directory is not made, as
    `files.hold_lock` would, for the work of a killed run may be removed while its parts end."""
    path = work / f"lock-{stage}-{part:05d}"
    with open(path, "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            echo(f"Another process is at work on part {part} of {stage}: waiting.", err=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError as e:
            raise FlexOlmoError(
                f"{path} cannot be locked ({e.strerror}), so two processes might do the same part "
                "at once. Put the set on a file system with locks."
            ) from None
        yield
