"""A directory as after `make demo`, and a shell that runs what the documentation says in it.

Replaced, so that it takes seconds: `make demo` (the same files, of a model of one layer on made
text), `make test` (nothing), and the start of each `flexolmo` and `python`, which is a fork of one
process that has imported torch already, and reads and writes less text than a user's where no
option says how much. Commands, scripts, options, files and the shell are real.
"""

import contextlib
import gc
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType

import typer.main

import made_documents
from flexolmo.data.corpus import DOCUMENTS, FORMAT
from flexolmo.data.documents import Document, write_documents
from flexolmo.files import digest_bytes, digest_file, write_json
from made_commands import build_commands_once

ROOT = Path(__file__).parents[1]
SECONDS = 600
MADE_SETS = (("public", "public", 150), ("code", "maths", 60), ("academic", "news", 60))
SMALLER = {
    "flexolmo.data.batches.EMBEDDING_WINDOWS": 4,
    "flexolmo.evaluation.influence.OWN_SEQUENCES": 4,
    "flexolmo.evaluation.influence.OWN_TOKENS": 24,
    "flexolmo.evaluation.influence.PUBLIC_BYTES": 3000,
    "flexolmo.merge.compare.SEQUENCE_TOKENS": 16,
    "flexolmo.merge.compare.WRITTEN_TOKENS": 2,
    "flexolmo.research.tasks.stories.MAX_NEW_TOKENS": 32,  # read when the next is imported
}
PRELOADED = (
    "flexolmo.audit.access",
    "flexolmo.inference.generate",
    "flexolmo.merge.mixture",
    "flexolmo.merge.export",
    "flexolmo.report.plots",
    "flexolmo.research.tasks.run",
    "flexolmo.train.expert",
    "model_signing.signing",
    "model_signing.verifying",
    "torch._dynamo",  # the first optimizer imports it, which takes two seconds
)

CLIENT = """#!{python} -IS
import json, os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect({address!r})
said = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(s, [len(said).to_bytes(8, "big")], [0, 1, 2])
s.sendall(said)
sys.exit(int(s.recv(16) or b"99"))
"""
ACTIVATE = 'PATH="{bin}:$PATH"\nexport PATH\n'
MAKE = '#!/bin/sh\n[ "$1" = test ] || [ -d runs/demo ]\n'


TINY_DEMO = """
. .venv/bin/activate
mkdir -p runs/demo && cd runs/demo
prepare() {  # files, name, out, public
    mkdir -p "$3/corpus" && cp -r "$1" "$3/corpus/"
    flexolmo data prepare "$3/corpus/$2" --out "$3/prepared" --vocab-size 300 $4
}
owner() { case $1 in code) echo "Code House" ;; academic) echo "Academic House" ;; esac; }
prepare ../../text/public public coordinator
mkdir -p coordinator/trusted
flexolmo anchor train --data coordinator/prepared/public --out coordinator/anchor \\
    --set model.d_model=16 --set model.num_layers=1 --set model.num_heads=2 --set model.d_ff=24 \\
    --set model.max_seq_len=320 --set train.steps=4 --set train.warmup_steps=1 \\
    --set train.seq_len=24 --set train.batch_size=2
for name in code academic; do
    house=owners/$name
    prepare ../../text/$name $name $house "--public coordinator/prepared/public"
    flexolmo expert key $house/key.pem
    for suffix in "" -paper; do
        more=
        [ -z "$suffix" ] || more="--scope ffn --set router.kind=\\"linear\\""
        flexolmo expert train --anchor coordinator/anchor --data $house/prepared/$name \\
            --name $name --out $house/expert$suffix.run --set train.steps=4 \\
            --set train.warmup_steps=1 --set train.seq_len=24 --set train.batch_size=2 $more
        flexolmo expert pack $house/expert$suffix.run --key $house/key.pem --out \\
            $house/outbox$suffix/$name.bundle --owner "$(owner $name)" --licence LicenseRef-Demo \\
            --purpose any
    done
    cp $house/key.pem.pub "coordinator/trusted/$(owner $name).pub"
done
for suffix in "" -paper; do
    flexolmo mix build coordinator/anchor owners/*/outbox$suffix/*.bundle \\
        --trust coordinator/trusted -o model$suffix
done
"""


def serve(address: str) -> None:
    """Fork for every client and run the command line as its process; never returns."""
    gc.disable()
    for name, number in SMALLER.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, number)
    for name in PRELOADED:
        importlib.import_module(name)
    from flexolmo.cli import app, main

    build_commands_once()
    typer.main.get_command(app)
    gc.freeze()  # what is loaded is never garbage; a fork that looks through it copies it, too
    gc.enable()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    while True:
        client, _ = listening.accept()
        if os.fork() == 0:
            code = 99
            with contextlib.suppress(BaseException):
                code = _serve_one(client, main)
            client.sendall(str(code).encode())
            os._exit(0)
        client.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _serve_one(client: socket.socket, main) -> int:
    head, fds, _, _ = socket.recv_fds(client, 8, 3)
    said = b""
    while len(said) < int.from_bytes(head, "big"):
        said += client.recv(1 << 16)
    sys.argv, directory, environment = json.loads(said)
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, (0, 1, 2), "rww")
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if Path(sys.argv[0]).name == "flexolmo":
            main()
        else:
            _run_script()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 98
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _run_script() -> None:
    """Do as `python FILE` or `python - < FILE` would."""
    _, name, *arguments = sys.argv
    sys.argv = [name, *arguments]
    sys.modules["__main__"] = script = ModuleType("__main__")
    text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    sys.path.insert(0, os.getcwd() if name == "-" else str(Path(name).resolve().parent))
    exec(compile(text, name, "exec"), vars(script))


class Shell:
    """A directory with .venv, make and the repository's examples, and the process to fork from."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.address = str(directory / "socket")
        self.server = subprocess.Popen(
            [sys.executable, "-c", f"import made_shell; made_shell.serve({self.address!r})"],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        tools = {
            "bin/make": MAKE,
            "venv/flexolmo": CLIENT.format(python=sys.executable, address=self.address),
            "venv/python": CLIENT.format(python=sys.executable, address=self.address),
            "venv/activate": ACTIVATE.format(bin=directory / "venv"),
        }
        for name, text in tools.items():
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self._wait()

    def _wait(self) -> None:
        for _ in range(SECONDS * 20):
            if os.path.exists(self.address) or self.server.poll() is not None:
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.server.wait(0.05)

    def furnish(self, root: Path) -> Path:
        """Make `root` look like a checkout whose environment is set up."""
        root.mkdir(parents=True, exist_ok=True)
        (root / ".venv").mkdir(exist_ok=True)
        (root / ".venv/bin").symlink_to(self.directory / "venv")
        (root / "examples").symlink_to(ROOT / "examples")
        return root

    def run(self, script: str, root: Path) -> str:
        """What `script` prints, run by `sh -e` in `root`; fails unless every line works."""
        environment = {
            "PATH": f"{self.directory / 'bin'}:/usr/bin:/bin",
            "HOME": str(root),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        done = subprocess.run(
            ["sh", "-ex"],
            input=script,
            cwd=root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    def close(self) -> None:
        """End the process that is forked."""
        self.server.terminate()
        self.server.wait()


def write_fetched_set(directory: Path, name: str, domain: str, count: int) -> None:
    """A set as `flexolmo data fetch` leaves it, of made text."""
    directory.mkdir(parents=True)
    texts = made_documents.write_documents(domain, count, 0)
    write_documents(directory / DOCUMENTS, (Document(text, "made") for text in texts))
    source = {"source": "made", "client": "pip", "package": "made", "version": "1"}
    card = {
        "format": FORMAT,
        "name": name,
        "sources": [source | {"licence": "CC0-1.0", "digest": digest_bytes(b"")}],
        "documents": count,
        "files": {DOCUMENTS: {"digest": digest_file(directory / DOCUMENTS)}},
    }
    write_json(directory / "card.json", card)


def _blocks(page: Path, languages: tuple[str, ...]) -> list[tuple[str, str]]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(language, body) for language, body in found if language in languages]


def blocks_of(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages ("": none is named), in order."""
    return [body for _, body in _blocks(page, languages)]


def script_of(page: Path, *languages: str) -> str:
    """All blocks of a page in these languages as one script; Python in a here-document."""
    return "".join(
        f"python - <<'PYTHON'\n{body}PYTHON\n" if language == "python" else body
        for language, body in _blocks(page, languages)
    )


def make_demo(shell: Shell, root: Path) -> Path:
    """A checkout in `root` with the files that `make demo` leaves, of a tiny model."""
    shell.furnish(root)
    for name, domain, count in MADE_SETS:
        write_fetched_set(root / "text" / name, name, domain, count)
    shell.run(TINY_DEMO, root)
    return root
