"""The work of a preparation in tasks, kept beside its result so that a killed run can go on.

It holds an owner's text, so it is readable by its owner alone, and goes when the set is finished or
refused, or when the set is prepared in another way; never while jobs are at work on it. Knows
nothing of what the tasks do.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flexolmo.data.slurm import find_jobs, job_name
from flexolmo.errors import FlexOlmoError, UnfinishedError
from flexolmo.files import read_json
from flexolmo.terminal import echo

PLAN = "plan.json"
SLURM = "slurm"  # the executor that leaves jobs behind


def work_directory(out: Path) -> Path:
    """Directory beside the set `out` where its tasks keep their work."""
    return out.with_name(f".{out.name}.scale")


@contextmanager
def hold_work(out: Path) -> Iterator[Path]:
    """Hold the lock on the work of the set `out`; yields its directory, which may not be there.

    The system frees the lock when its holder ends, however it ends. Processes made from this one,
    which may outlive it, do not hold it.

    Raises:
        FlexOlmoError: another run holds it, or the directory is not one that we made.
    """
    work = work_directory(out)
    lock = work.with_name(f"{work.name}.lock")
    file = _open_locked(lock, work)
    try:
        check_ours(work)
        yield work
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def _open_locked(lock: Path, work: Path) -> int:
    """Open the file `lock`, which guards `work`, and lock it; returns its descriptor."""
    import fcntl  # not on every system that reads files

    while True:
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as e:
            raise FlexOlmoError(f"{lock} cannot be opened: {e.strerror}.") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(file)
            if not isinstance(e, BlockingIOError | PermissionError):
                raise FlexOlmoError(
                    f"{lock} cannot be locked ({e.strerror}), so two runs might work there at "
                    "once. Put the set on a file system with locks."
                ) from None
            raise FlexOlmoError(
                f"Another run is at work in {work}. Wait for its end, or stop it: this one then "
                "goes on from there."
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(file)):
                return file
        os.close(file)  # its last holder removed it before we had it


@contextmanager
def remove_if_refused(work: Path) -> Iterator[None]:
    """Remove `work` on a refusal, unless jobs are at work there; after any other end it stays, for
    the next run."""
    try:
        yield
    except UnfinishedError:
        raise
    except FlexOlmoError:
        with suppress(UnfinishedError):
            remove_work(work)
        raise


def remove_work(work: Path) -> None:
    """Remove `work`, whose lock is held, if it is there.

    Raises:
        UnfinishedError: jobs of its run are at work there, or may be.
    """
    if work.exists():
        refuse_living_jobs(work)
        (work / PLAN).unlink(missing_ok=True)  # first: after a kill midway nobody goes on from it
        shutil.rmtree(work)


def refuse_living_jobs(work: Path) -> None:
    """Refuse what would harm jobs in Slurm's queue, which hold no lock while they wait.

    Raises:
        UnfinishedError: there are some, or there may be.
    """
    plan = read_json(work / PLAN) if (work / PLAN).is_file() else {}
    if plan.get("executor") != SLURM:
        return
    name = job_name(work / plan["work"])
    jobs = find_jobs(name)
    if jobs is None:
        raise UnfinishedError(
            f"Slurm does not say whether jobs are at work in {work}. Ask it where squeue answers; "
            f"or, if `squeue --name={name}` lists none, remove that directory."
        )
    if jobs:
        raise UnfinishedError(
            f"Jobs of another run are at work in {work}, or wait to be. Give the command that "
            f"began it to go on with it, or end them with `scancel --name={name}`."
        )


@contextmanager
def without_dead_work(out: Path) -> Iterator[None]:
    """Remove, on success and on a refusal, work on the set `out` that a run in tasks left when it
    was killed; that of a living run stays."""
    try:
        yield
    except FlexOlmoError:
        _remove_dead_work(out)
        raise
    _remove_dead_work(out)


def _remove_dead_work(out: Path) -> None:
    if os.path.lexists(work_directory(out)):
        try:
            with hold_work(out) as work:
                remove_work(work)
        except FlexOlmoError as e:
            echo(f"Text of a run in tasks stays in {work_directory(out)}: {e}", err=True)


def check_ours(work: Path) -> None:
    """Refuse a link, another user's directory, and one that others can write to or read."""
    if not os.path.lexists(work):
        return
    found = work.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise FlexOlmoError(
            f"{work} is not a directory that you alone can read, as a run makes it: it is "
            f"{stat.filemode(found.st_mode)} of user {found.st_uid}. Remove it, or choose another "
            "--out."
        )
