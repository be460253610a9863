"""An owner's run opens no file of another owner and no network connection.

The run is a process of its own, watched twice: by Python's audit hook, which sees every path that
Python opens or lists, every program it starts and every socket call; and by the kernel's inotify
on the other owner's directories, which also sees compiled libraries and other programs.
"""

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
IN_ACCESS, IN_OPEN = 0x1, 0x20

RECORDER = textwrap.dedent("""
    import json, os, sys
    LOG = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def record(event, args):
        if event in ("open", "os.listdir", "os.scandir"):
            where = args[0]
            if where is None:
                where = "."
            if isinstance(where, int):
                return
            seen = os.path.abspath(os.fsdecode(where))
        elif event.startswith("socket.") or event in ("subprocess.Popen", "os.exec", "os.system",
                                                      "os.posix_spawn"):
            seen = str(args[1] if event.startswith("socket.") and len(args) > 1 else args[0])
        else:
            return
        os.write(LOG, (json.dumps([event, seen]) + "\\n").encode())
    sys.addaudithook(record)
""")

TRAIN = textwrap.dedent("""
    from pathlib import Path
    anchor_dir, data_dir, runs, key = sys.argv[2:6]
    from flexolmo.data.batches import open_set
    from flexolmo.bundle.terms import make_terms
    from flexolmo.model.checkpoint import load_anchor
    from flexolmo.train.expert import ExpertRecipe, pack_expert, save_expert, train_expert
    anchor = load_anchor(Path(anchor_dir))
    data = open_set(Path(data_dir), anchor.tokenizer.digest)
    for kind in ("evidence", "linear"):
        scope = "ffn" if kind == "linear" else "all"
        recipe = ExpertRecipe.model_validate({"scope": scope, "router": {"kind": kind}, "train": {
            "steps": 3, "batch_size": 2, "seq_len": 16, "warmup_steps": 1,
            "checkpoint_every_seconds": 1e-9}})
        run_dir = Path(runs) / kind
        expert = train_expert(anchor, data, "maths", recipe, run_dir, num_threads=1)
        save_expert(expert, run_dir)
        pack_expert(expert, run_dir / "maths.bundle", Path(key), owner="Ann",
                    licence="Apache-2.0", terms=make_terms("Research only.", ["general-research"]))
""")

PEEK = textwrap.dedent("""
    import socket, subprocess
    other = sys.argv[2]
    how = sys.argv[3]
    if how == "open":
        open(os.path.join(other, "card.json")).read(1)
    elif how == "list":
        os.listdir(other)
    elif how == "program":
        subprocess.run(["cat", os.path.join(other, "card.json")], stdout=subprocess.DEVNULL)
    elif how == "connect":
        try:
            socket.create_connection(("127.0.0.1", 9), timeout=1)
        except OSError:
            pass
    elif how == "resolve":
        try:
            socket.getaddrinfo("localhost", 80)
        except OSError:
            pass
""")


class Watch:
    """Names of whatever any process opens or reads below `directory`, from the kernel."""

    def __init__(self, directory: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        for path in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
            added = libc.inotify_add_watch(self._fd, os.fsencode(path), IN_OPEN | IN_ACCESS)
            assert added >= 0, os.strerror(ctypes.get_errno())

    def touched(self) -> set[str]:
        """File names touched since the last call; "" stands for a directory itself."""
        try:
            data = os.read(self._fd, 1 << 20)
        except BlockingIOError:
            return set()
        names, at = set(), 0
        while at < len(data):
            _, _, _, size = struct.unpack_from("iIII", data, at)
            names.add(data[at + 16 : at + 16 + size].rstrip(b"\0").decode())
            at += 16 + size
        return names

    def close(self):
        os.close(self._fd)


@pytest.fixture
def house(tmp_path, pico_anchor_dir, pico_set_dirs, owner_keys):
    """Ann's house with all that is hers, and Bob's next door."""
    ann, bob = tmp_path / "ann", tmp_path / "bob"
    shutil.copytree(pico_anchor_dir, ann / "anchor")
    shutil.copytree(pico_set_dirs["maths"], ann / "data")
    shutil.copytree(pico_set_dirs["news"], bob / "data")
    (bob / "run").mkdir()
    (bob / "run" / "expert.safetensors").write_bytes(b"secret")
    (ann / "run").mkdir()
    (ann / "keys").mkdir()
    shutil.copy(owner_keys["Ann"], ann / "keys")
    (tmp_path / "scratch").mkdir()
    return tmp_path


def run_recorded(house: Path, code: str, *args: str):
    """Run `code` in a process of its own: its events, and what the kernel saw of Bob's files."""
    log, scratch = house / "log", str(house / "scratch")
    log.unlink(missing_ok=True)
    places = {
        n: scratch
        for n in (
            "HOME",
            "TMPDIR",
            "XDG_CACHE_HOME",
            "XDG_CONFIG_HOME",
            "HF_HOME",
            "TORCHINDUCTOR_CACHE_DIR",
        )
    }
    watch = Watch(house / "bob")
    try:
        done = subprocess.run(
            [sys.executable, "-c", RECORDER + code, str(log), *args],
            cwd=house / "ann" / "run",
            env={**os.environ, **places},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        touched = watch.touched()
    finally:
        watch.close()
    return [json.loads(line) for line in log.read_text().splitlines()], touched


def find_strangers(events, house: Path) -> list[str]:
    """Every path, connection or program that an owner's run has no business with."""
    ann = house / "ann"
    own = [
        ann / "anchor",
        ann / "data",
        ann / "run",
        ann / "keys",
        house / "scratch",
        sys.prefix,
        sys.base_prefix,
        sys.exec_prefix,
        SOURCE,
        "/proc",
        "/sys",
        "/dev",
        *(p for p in sys.path if p),
    ]
    own = {os.path.realpath(p) for p in own} | {os.path.abspath(p) for p in own}
    assert not any(str(house).startswith(p + os.sep) for p in own), "the check would see nothing"
    strangers = []
    for event, seen in events:
        if event in ("open", "os.listdir", "os.scandir"):
            if not any(seen == p or seen.startswith(p.rstrip(os.sep) + os.sep) for p in own):
                strangers.append(f"{event} {seen}")
        elif event.startswith("socket."):
            if event not in ("socket.__new__", "socket.bind"):  # neither leaves the machine
                strangers.append(f"{event} {seen}")
        # this checkout's commit, the machine, and the libraries that CUDA builds of torch look for
        elif os.path.basename(seen) not in ("git", "uname", "ldconfig"):
            strangers.append(f"{event} {seen}")
    return strangers


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_an_owners_run_opens_nothing_of_another_owner_and_no_connection(house):
    ann = house / "ann"
    events, touched = run_recorded(
        house,
        TRAIN,
        str(ann / "anchor"),
        str(ann / "data"),
        str(ann / "run"),
        str(ann / "keys" / "Ann"),
    )
    for kind in ("evidence", "linear"):
        assert (ann / "run" / kind / "maths.bundle").is_dir(), "it did train and pack"
    opened = {seen for event, seen in events if event == "open"}
    assert str(ann / "data" / "train_tokens.npy") in opened, "the recorder sees the run's files"
    assert find_strangers(events, house) == []
    assert touched == set()


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
@pytest.mark.parametrize(
    ("how", "by_python", "by_kernel"),
    [
        ("open", "open ", {"card.json"}),
        ("list", "os.listdir ", {""}),
        ("program", "subprocess.Popen cat", {"card.json"}),
        ("connect", "socket.connect ", set()),
        ("resolve", "socket.getaddrinfo ", set()),
    ],
)
def test_the_watch_sees_a_process_that_looks_next_door_or_calls_out(
    house, how, by_python, by_kernel
):
    events, touched = run_recorded(house, PEEK, str(house / "bob" / "data"), how)
    assert any(s.startswith(by_python) for s in find_strangers(events, house))
    assert by_kernel <= touched if by_kernel else not touched


def test_the_temporary_directory_is_not_among_the_places_allowed(house):
    assert find_strangers([["open", tempfile.gettempdir() + "/x"]], house)
