"""One function over many items, in several processes; results come in the order of the items.

Knows nothing of what is computed. What the processes need is sent to them, and what they find is
sent back, so that the number of processes changes no result.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from flexolmo.errors import UnfinishedError

Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
_WAITING_EACH = 2  # items that wait for each process


def count_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def open_workers(count: int) -> Iterator[Run]:
    """Yield `run(function, items)`, which works like `map`: in processes if `count` is above 1.

    Items are taken as they are needed, so there may be more than memory holds. A function for
    processes is one that pickle can name, and its errors come out here.
    """
    if count == 1:
        yield map
        return
    # spawn: a forked process would hold locks of threads that it does not have
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=_begin) as pool:

        def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            waiting = deque[Future[Any]]()
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _WAITING_EACH * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield run
        except BrokenProcessPool:
            raise UnfinishedError(
                f"One of {count} processes ended before its work was done: for lack of memory, or "
                "because a script calls this outside `if __name__ == '__main__':`. Run it again "
                "with fewer workers."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def end_at_interrupt() -> None:
    """Let Ctrl-C end this process at once, if it is one of ours, for an item that takes long."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked ends these
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the process that asked is gone; a killed one would leave these waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
