"""Messages between a gateway's process and its engine's: one line of JSON each. No torch.

The line is a pair of sockets that only the two processes hold: there is no address at which
somebody else could ask.

To the engine, in order of their first words:

    open      version settings           once, at the start; version: of flexolmo
    submit    number request             number: of the text, for all that is said of it
    cancel    number
    withdraw  call experts why           call: a number that the answer has too
    reload    call
    stats     call
    close     call                       end all that is under way, and the process

From it:

    opened    facts seen                 or, in place of it, failed with call 0; seen: as Opening's
    said      number kind event
    returned  call value                 of reload: facts and seen
    failed    call error message         error: name of a class in `errors`
"""

import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter

from flexolmo import errors
from flexolmo.errors import FlexOlmoError
from flexolmo.inference.engine import (
    Ended,
    EngineRequest,
    EngineStats,
    Event,
    ModelFacts,
    PromptRead,
    TokenWritten,
)

REQUEST: TypeAdapter[EngineRequest] = TypeAdapter(EngineRequest)
_FACTS: TypeAdapter[ModelFacts] = TypeAdapter(ModelFacts)
STATS: TypeAdapter[EngineStats] = TypeAdapter(EngineStats)
_EVENTS: dict[str, TypeAdapter[Any]] = {
    kind.__name__: TypeAdapter(kind) for kind in (PromptRead, TokenWritten, Ended)
}


class Line:
    """One end of a line; `send` may be called from any thread."""

    def __init__(self, end: socket.socket, send_seconds: float = 0):
        """The other end has so many seconds to make room for a message; 0: as long as it takes."""
        whole = int(send_seconds)
        limit = struct.pack("ll", whole, int((send_seconds - whole) * 1e6))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._end = end
        self._file = end.makefile("rb")
        self._sending = threading.Lock()

    def send(self, word: str, *values: Any) -> None:
        """Send a message, of values as JSON has them. OSError if the other end is gone, or
        makes no room: then the message may be broken off, and the line is of no more use."""
        data = json.dumps([word, *values]).encode() + b"\n"
        with self._sending:
            self._end.sendall(data)

    def messages(self) -> Iterator[tuple[str, list[Any]]]:
        """First word and values of each message, until the other end is gone."""
        with suppress(ConnectionError):
            for data in self._file:
                if not data.endswith(b"\n"):  # the other end is gone in the middle of one
                    return
                word, *values = json.loads(data)
                yield word, values

    def close(self) -> None:
        """Let the other end know that nothing more is said or heard."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()


def write_facts(facts: ModelFacts) -> Any:
    """Facts of a model, as `opened` has them."""
    return _FACTS.dump_python(facts, mode="json")


def read_facts(content: Any) -> ModelFacts:
    """The facts that `write_facts` wrote."""
    return _FACTS.validate_json(json.dumps(content))  # terms are strict about what is no JSON


def write_event(event: Event) -> list[Any]:
    """Kind and content of an event, as `said` has them."""
    kind = type(event).__name__
    return [kind, _EVENTS[kind].dump_python(event)]  # mode "json" would make infinity null


def read_event(kind: str, content: Any) -> Event:
    """The event that `write_event` wrote."""
    event: Event = _EVENTS[kind].validate_python(content)
    return event


def write_error(error: Exception) -> list[str]:
    """Name and message of an error, as `failed` has them."""
    return [type(error).__name__, str(error)]


def read_error(name: str, message: str) -> FlexOlmoError:
    """The error that `write_error` wrote; one that is none of ours as its base."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, FlexOlmoError) and name != "DiskFullError":
        return kind(message)
    return FlexOlmoError(f"{name}: {message}")
