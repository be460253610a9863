"""A real server on this machine, and an audit log in memory whose disk can be full."""

import contextlib
import json
import socket
import threading
import time
from typing import NamedTuple

import uvicorn

from flexolmo.errors import AuditError


class MadeLog:
    """A log in memory whose disk can be full; `before(kind)` is called before each entry."""

    def __init__(self):
        self.entries = []
        self.is_full = False
        self.before = lambda kind: None

    def append(self, kind, fields):
        self.before(kind)
        if self.is_full:
            raise AuditError("no space left")
        self.entries.append((kind, json.loads(json.dumps(fields))))
        return len(self.entries) - 1

    def close(self):
        pass


@contextlib.contextmanager
def serving(app):
    """The address of a real server of `app` on this machine, with small buffers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5, ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(10)


class Streamed(NamedTuple):
    """A streamed answer: text, sources, and the code and message of its error, if there is one."""

    text: str
    told: dict | None
    code: str | None
    message: str | None


def read_stream(client, has_begun=None, **request):
    """The whole answer to a `request`; `has_begun()` is called at its first piece."""
    text, told, error = "", None, {}
    with client.stream("POST", **request) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                error = chunk["error"]
                continue
            text += "".join(choice["text"] for choice in chunk["choices"])
            told = chunk.get("flexolmo", told)
            if has_begun is not None:
                has_begun()
                has_begun = None
    return Streamed(text, told, error.get("code"), error.get("message"))


def wait_until(holds, seconds=5.0):
    """Wait until `holds()`; AssertionError if it does not in time."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)
