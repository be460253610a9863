"""`flexolmo doctor`: the state of this installation, and the remedy for each fault."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from flexolmo.terminal import echo

State = Literal["ok", "optional", "problem"]
_GIB = 1 << 30
_MEMORY_BYTES, _DISK_BYTES = 4 * _GIB, 2 * _GIB  # the demo with room to spare


@dataclass(frozen=True)
class Check:
    """One finding: `problem` must be mended, `optional` limits what can be done."""

    name: str
    state: State
    found: str
    advice: str = ""


def _state(is_well: bool, otherwise: Literal["optional", "problem"]) -> State:
    return "ok" if is_well else otherwise


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what is installed, what is missing, and what to do. Exits 1 if something must be mended.

    Example: flexolmo doctor
    """
    import json

    checks = [*_environment(), *_packages(), *_machine(), *_clients(), _sandbox(), *_keys()]
    if as_json:
        echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            echo(f"{check.state:<9} {check.name:<16} {check.found}")
            if check.advice:
                echo(f"{'':<27}{check.advice}")
    raise typer.Exit(1 if any(check.state == "problem" for check in checks) else 0)


def _environment() -> Iterator[Check]:
    """Python, and whether `flexolmo` on the path is this one."""
    version = ".".join(map(str, sys.version_info[:3]))
    fits = sys.version_info >= (3, 11)
    advice = "" if fits else "Install Python 3.11 or newer and make the environment anew."
    yield Check("Python", _state(fits, "problem"), f"{version} at {sys.prefix}", advice)
    bin_directory = Path(sys.executable).parent
    found = shutil.which("flexolmo")
    if found is not None and Path(found).parent.resolve() == bin_directory.resolve():
        yield Check("command", "ok", found)
        return
    says = "flexolmo is not on the path" if found is None else f"the path leads to {found}"
    yield Check(
        "command",
        "optional",
        f"{says}; this is {bin_directory}",
        f"Activate the environment in every new shell: . {bin_directory / 'activate'}",
    )


def _packages() -> Iterator[Check]:
    """The packages needed, and those of each extra, as the installed metadata asks for them."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    def fault(package: Requirement) -> str | None:
        try:
            found = version(package.name)
        except PackageNotFoundError:
            return package.name
        fits = package.specifier.contains(found, prereleases=True)
        return None if fits else f"{package.name} {found}, not {package.specifier}"

    wanted = [Requirement(line) for line in requires("flexolmo") or ()]
    uses = {"": "all that is needed", "eval": "the hub, the harness"}
    uses |= {"serve": "flexolmo serve, policy", "private": "private training"}
    uses |= {"trace": "flexolmo trace index", "scale": "data prepare --engine datatrove"}
    uses |= {"docs": "make docs", "test": "make test"}
    for extra, use in uses.items():
        # "None" is the marker of what is always needed
        mark = f'extra == "{extra}"' if extra else "None"
        faults = [f for r in wanted if mark in str(r.marker) and (f := fault(r))]
        target = f"'.[{extra}]'" if extra else "."
        yield Check(
            f"extra {extra}" if extra else "packages",
            _state(not faults, "optional" if extra else "problem"),
            f"{use}; missing: {', '.join(faults)}" if faults else use,
            f"Run: pip install -c constraints.txt -e {target}" if faults else "",
        )


def _machine() -> Iterator[Check]:
    """Memory, disk, torch's threads and a GPU."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = shutil.disk_usage(".").free
    for name, size, least, advice in (
        ("memory", memory, _MEMORY_BYTES, "Take smaller batches: --set train.batch_size=2."),
        ("free disk", free, _DISK_BYTES, "Free some, or work in a directory of another disk."),
    ):
        is_enough = size >= least
        found = f"{size / _GIB:.1f} GiB; the demo wants {least / _GIB:.0f}"
        yield Check(name, _state(is_enough, "optional"), found, "" if is_enough else advice)
    try:
        import torch
    except ImportError as e:
        yield Check("torch", "problem", f"cannot be imported: {e}", "Run: pip install -e .")
        return
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    yield Check("torch", "ok", f"{torch.__version__}, {threads}")
    has_gpu = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name(0) if has_gpu else "none; everything runs on the CPU"
    yield Check("GPU", _state(has_gpu, "optional"), gpu)


def _clients() -> Iterator[Check]:
    """Package clients that public text is fetched with."""
    from importlib.util import find_spec

    apt = bool(shutil.which("apt-get") and shutil.which("dpkg-deb"))
    for name, is_there, use in (
        ("pip", bool(find_spec("pip") or shutil.which("pip")), "the demo's text"),
        ("npm", bool(shutil.which("npm")), "some text of `flexolmo demo --sets all`"),
        ("apt-get", apt, "some text of `flexolmo demo --sets all`"),
    ):
        advice = "" if is_there else f"Install {name}, or do without that text."
        found = f"{'here' if is_there else 'missing'}; fetches {use}"
        yield Check(name, _state(is_there, "optional"), found, advice)


def _sandbox() -> Check:
    """Check that programs which a model wrote can be run."""
    from flexolmo.errors import FlexOlmoError
    from flexolmo.research.tasks.sandbox.sandbox import check_sandbox

    try:
        return Check("sandbox", "ok", "; ".join(check_sandbox()))
    except (FlexOlmoError, OSError) as e:
        return Check("sandbox", "optional", str(e), "Leave --run-code out of flexolmo eval.")


def _keys() -> Iterator[Check]:
    """Private keys here, and the directory of trusted owners."""
    from flexolmo.bundle.trust import TrustedOwners
    from flexolmo.errors import FlexOlmoError

    for path in sorted(Path(".").glob("*.pem")):
        mode = path.stat().st_mode & 0o777
        is_private = not mode & 0o077
        advice = f"Run: chmod 600 {path}; if others use this machine, make a new key."
        found = f"{path}, mode {mode:o}"
        yield Check(
            "private key", _state(is_private, "problem"), found, "" if is_private else advice
        )
    named = os.environ.get("FLEXOLMO_TRUST")
    if not named:
        advice = "Set FLEXOLMO_TRUST to a directory of OWNER.pub files, or give --trust."
        yield Check("trusted owners", "optional", "FLEXOLMO_TRUST is not set", advice)
        return
    try:
        owners = TrustedOwners.load(Path(named)).owners
        yield Check("trusted owners", "ok", f"{named}: {', '.join(owners) or 'nobody'}")
    except (FlexOlmoError, OSError) as e:
        advice = "Name a directory of OWNER.pub files, or unset FLEXOLMO_TRUST."
        yield Check("trusted owners", "problem", str(e), advice)
