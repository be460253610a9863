"""A disk that is full, for tests."""

import resource
from contextlib import contextmanager


@contextmanager
def file_size_limit(size):
    """Stands for a full disk: no file can grow beyond `size` bytes meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
