"""Logs of a running server: one JSON object a line, for programs that collect them.

Holds what this package says about itself: no prompt, no answer and nobody's name.
"""

import json
import logging
import time
import traceback

_USUAL = set(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "color_message"}


class JsonLines(logging.Formatter):
    """One line for each record: time (UTC), level, event, and whatever `extra` names."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of `record`; of an exception, kind and places, for its words may quote text."""
        said: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        said |= {name: value for name, value in vars(record).items() if name not in _USUAL}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            said |= {"detail": type(error).__name__, "places": places_of(error)}
        return json.dumps(said, default=str)


def places_of(error: BaseException) -> list[str]:
    """File and line of each step on the way to `error`, the innermost last; at most twenty."""
    steps = traceback.extract_tb(error.__traceback__)[-20:]
    return [f"{step.filename}:{step.lineno}" for step in steps]


def log_as_json() -> None:
    """Write this process's log to standard error, from the level INFO on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
