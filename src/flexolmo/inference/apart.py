"""An engine in a process of its own, such as vLLM's, whose packages fit beside no others. No torch.

The process is started here, with another Python, and told by lines of JSON. It ends with this one,
however that ends. Should it end by itself, requests under way are ended as failed, and it is
started again; until then new ones are told that the engine is busy. One that does not answer in
time is killed, and started again too.
"""

import itertools
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flexolmo.errors import BusyError, ConfigError, FlexOlmoError
from flexolmo.inference.admission import refuse_request
from flexolmo.inference.engine import (
    Ended,
    EngineRequest,
    EngineStats,
    Event,
    Interruption,
    ModelFacts,
)
from flexolmo.inference.messages import REQUEST, STATS, Line, read_error, read_event, read_facts
from flexolmo.inference.opening import Opening
from flexolmo.merge.rollback import Seen, join_seen

_log = logging.getLogger(__name__)
_START_SECONDS = 5.0  # between starts of a process that ends by itself, at least
_STOP_SECONDS = 10.0  # that a process has to end
_ANSWER_SECONDS = 30.0  # that it has to take a message in, and to answer one between two steps
_READ_SECONDS = 3600.0  # that it has to read a model


@dataclass
class ApartText:
    """A request under way in the process; see `engine.Request`."""

    number: int
    request: EngineRequest
    say: Callable[[Event], None]
    line: Line  # to the process that it is under way in

    def cancel(self) -> None:
        """End it soon."""
        _tell(self.line, "cancel", self.number)


class ApartEngine:
    """An `engine.Engine` in a process of its own."""

    def __init__(self, command: Sequence[str], opening: Opening, max_waiting: int = 256):
        """Start the process: `command`, and the number of its end of the line.

        Raises what the process fails with, such as the errors of `load_mixture`, and ConfigError
        if it cannot be started.
        """
        self._command = list(command)
        self._opening = opening
        self._most = opening.max_running + max_waiting
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        # of what follows, all is shared between threads
        self._texts: dict[int, ApartText] = {}
        self._calls: dict[int, Future[Any]] = {}
        self._withdrawn: dict[str, tuple[str, str]] = {}  # by expert: digest of its bundle, and why
        self._is_closing = False
        self._line: Line | None = None
        self._process: subprocess.Popen[bytes]
        self._facts: ModelFacts
        line = self._start()
        self._thread = threading.Thread(
            target=self._listen, args=(line,), name="engine apart", daemon=True
        )
        self._thread.start()

    # --- from any thread ------------------------------------------------------------------------

    @property
    def facts(self) -> ModelFacts:
        """See `Engine`; experts that were withdrawn are not among them."""
        return self._facts

    @property
    def is_running(self) -> bool:
        """See `Engine`."""
        return self._line is not None

    @property
    def process_id(self) -> int:
        """The process that runs now, or starts."""
        return self._process.pid

    def submit(self, request: EngineRequest, say: Callable[[Event], None]) -> ApartText:
        """See `Engine`."""
        refuse_request(request, self._facts)
        content = REQUEST.dump_python(request, mode="json")
        with self._changed:
            if self._is_closing:
                raise _closing()
            if self._line is None:
                raise BusyError("The engine is being started again. Ask again later.")
            if len(self._texts) >= self._most:
                raise BusyError(f"{len(self._texts)} requests are under way. Ask again later.")
            text = ApartText(next(self._numbers), request, say, self._line)
            self._texts[text.number] = text
        _tell(text.line, "submit", text.number, content)
        return text

    def reload(self) -> ModelFacts:
        """See `Engine`. While the new model is read from disk both are in memory. ConfigError for
        a model of other sizes, which needs the server to be started again; BusyError while the
        process does not run."""
        line = self._line
        try:
            facts, seen = self._call(_READ_SECONDS, "reload")
        except TimeoutError:
            self._kill()
            raise BusyError("The engine did not read the model in time; it starts again.") from None
        with self._changed:
            if self._line is not line:
                raise BusyError("The engine was started again meanwhile.")
            self._facts = self._without_withdrawn(read_facts(facts))
            self._keep_seen(seen)
            return self._facts

    def withdraw(self, experts: Collection[str], why: str) -> int:
        """See `Engine`. Weights of `experts` are overwritten in memory; a process that does not do
        so in time is killed, and all that is under way in it fails."""
        with self._changed:
            held = self._facts.experts
            known = sorted(set(experts) & held.keys())
            self._withdrawn |= {name: (held[name].bundle_digest, why) for name in known}
            self._facts = self._without_withdrawn(self._facts)
        try:
            return int(self._call(_ANSWER_SECONDS, "withdraw", known, why))
        except BusyError:  # nothing runs; it is told when it starts
            return 0
        except TimeoutError:
            num_running = len(self._texts)
            self._kill()
            return num_running

    def stats(self) -> EngineStats:
        """See `Engine`; of a process that does not answer, nothing but what waits."""
        with suppress(BusyError, TimeoutError):
            return STATS.validate_python(self._call(_ANSWER_SECONDS, "stats"))
        waiting = len(self._texts)
        return EngineStats(0, waiting, 0, 0, 0, 0, 0, 0, 0, sorted(self._facts.experts))

    def close(self, seconds: float) -> None:
        """See `Engine`; any number of times, but not from a request's `say`."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._texts, seconds)
        try:
            self._call(_STOP_SECONDS, "close")
        except (BusyError, TimeoutError):  # it has ended, has not begun to serve, or hangs
            self._kill()
        line = self._line
        if line is not None:
            line.close()
        self._stop(self._process)
        self._thread.join()

    # --- the process ----------------------------------------------------------------------------

    def _call(self, seconds: float, word: str, *values: Any) -> Any:
        """The value that the process returns. BusyError if it does not run or ends meanwhile,
        TimeoutError if it says nothing for so many seconds."""
        number = next(self._numbers)
        done: Future[Any] = Future()
        with self._changed:
            line = self._line
            if line is None:
                raise BusyError("The engine does not run at present.")
            self._calls[number] = done
        _tell(line, word, number, *values)
        try:
            return done.result(seconds)
        finally:
            self._calls.pop(number, None)

    def _kill(self) -> None:
        """End the process, whatever it does; returns when it has ended."""
        process = self._process
        process.kill()
        process.wait()

    def _start(self) -> Line:
        """The line to a new process that has opened the model, and is used from now on."""
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                process = self._spawn(theirs)
        except OSError as e:
            raise ConfigError(
                f"The engine cannot be started with {self._command[0]} ({e.strerror}). Give the "
                "Python of the environment that it is installed in."
            ) from None
        line = Line(ours, _ANSWER_SECONDS)
        too_late = threading.Timer(_READ_SECONDS, process.kill)
        too_late.daemon = True
        too_late.start()
        try:
            # one that is gone already says nothing then
            _tell(line, "open", version("flexolmo"), self._opening.model_dump(mode="json"))
            word, values = next(line.messages(), ("", []))
            if word == "failed":
                raise read_error(*values[1:])
            if word != "opened":
                raise ConfigError(
                    f"{' '.join(self._command)} ended with {self._stop(process)} before it was "
                    "ready; its last words are above. docs/guides/vllm.md says how to make an "
                    "environment for it; give its Python with --engine-python."
                )
            self._take_up(line, read_facts(values[0]), values[1])
        except BaseException:
            line.close()
            self._stop(process)
            raise
        finally:
            too_late.cancel()
        return line

    def _spawn(self, end: socket.socket) -> "subprocess.Popen[bytes]":
        """A new process with that end of a line."""
        command = [*self._command, str(end.fileno())]
        with self._changed:  # so that `close` has one to kill, or there is none any more
            if self._is_closing:
                raise _closing()
            self._process = subprocess.Popen(
                command,
                pass_fds=[end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # ours has no room for its log
                start_new_session=True,  # so that Ctrl-C lets answers end
            )
            return self._process

    def _take_up(self, line: Line, facts: ModelFacts, seen: Seen) -> None:
        """Use the process at `line` from now on, without what was withdrawn before it began."""
        with self._changed:
            self._line = line
            self._facts = self._without_withdrawn(facts)
            self._keep_seen(seen)
            for name in facts.experts.keys() - self._facts.experts.keys():
                _tell(line, "withdraw", 0, [name], self._withdrawn[name][1])
            if self._is_closing:
                line.close()

    def _keep_seen(self, seen: Seen) -> None:
        """Have the next process too take nothing that is older than was `seen`."""
        joined = join_seen(self._opening.seen, seen)
        self._opening = self._opening.model_copy(update={"seen": joined})

    def _stop(self, process: "subprocess.Popen[bytes]") -> int:
        """Wait for its end, and kill it if that does not come; its exit status."""
        try:
            return process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _without_withdrawn(self, facts: ModelFacts) -> ModelFacts:
        """`facts` less the experts that were withdrawn, if their bundles are still those."""
        withdrawn = {(name, digest) for name, (digest, _) in self._withdrawn.items()}
        experts = {
            name: own
            for name, own in facts.experts.items()
            if (name, own.bundle_digest) not in withdrawn
        }
        return replace(facts, experts=experts)

    # --- on a thread of its own -----------------------------------------------------------------

    def _listen(self, line: Line | None) -> None:
        """Take in what the process says, and start another one when it ends."""
        while line is not None:
            try:
                for word, values in line.messages():
                    self._take_in(word, values)
            except Exception:  # nothing that it says can be relied on
                _log.exception("The engine's process is not understood, and ended.")
                self._process.kill()
            line.close()
            self._end_all()
            self._stop(self._process)
            line = self._start_again()

    def _take_in(self, word: str, values: list[Any]) -> None:
        if word == "said":
            number, kind, content = values
            event = read_event(kind, content)
            with self._changed:
                text = self._texts.get(number)
                if text is not None and isinstance(event, Ended):
                    del self._texts[number]
                    self._changed.notify_all()
            if text is not None:
                self._say(text, event)
            return
        with self._changed:
            done = self._calls.pop(values[0], None)
        if done is None:  # nobody waits for it any more
            return
        if word == "returned":
            done.set_result(values[1])
        else:
            done.set_exception(read_error(*values[1:]))

    def _say(self, text: ApartText, event: Event) -> None:
        try:
            text.say(event)
        except Exception:  # whoever asked is at fault; the others go on
            _log.exception("An event of a request was not taken.")
            text.cancel()

    def _end_all(self) -> None:
        """End all that waits for the process, which has ended."""
        with self._changed:
            self._line = None
            texts = list(self._texts.values())
            calls = list(self._calls.values())
            self._texts.clear()
            self._calls.clear()
            reason: Interruption = "closed" if self._is_closing else "failed"
            self._changed.notify_all()
        for done in calls:
            done.set_exception(BusyError("The engine's process has ended."))
        for text in texts:
            self._say(text, Ended(reason, 0, 0, 0, {}, "The engine's process has ended."))

    def _start_again(self) -> Line | None:
        """The line to another process, however often that has to be tried; None when closing."""
        while True:
            with self._changed:
                if self._is_closing:
                    return None
            _log.error("the engine's process has ended and is started again")
            begun = time.monotonic()
            try:
                return self._start()
            except Exception as e:  # whatever it is may be over soon
                detail = str(e) if isinstance(e, FlexOlmoError) else repr(e)
                _log.error("the engine cannot be started", extra={"detail": detail})
                with self._changed:
                    rest = begun + _START_SECONDS - time.monotonic()
                    self._changed.wait_for(lambda: self._is_closing, max(rest, 0.0))


def _tell(line: Line, word: str, *values: Any) -> None:
    """Send a message. A line that takes none in is closed; then all that waits for it is ended."""
    try:
        line.send(word, *values)
    except OSError:
        line.close()


def _closing() -> BusyError:
    return BusyError("The engine is closing and takes no more requests.")


def vllm_command(python: Path | None) -> list[str]:
    """The command of an engine on vLLM, with the Python of vLLM's environment; None: this one."""
    return [str(python or sys.executable), "-m", "flexolmo_vllm"]
