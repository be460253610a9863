"""The process."""

import platform
import subprocess
import sys

import pytest
import torch

from flexolmo.runtime import leave_a_core

REPEAT = """
import resource, torch
from flexolmo.runtime import keep_memory

limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (2**34, limits[1]))
print(keep_memory.__wrapped__())
resource.setrlimit(resource.RLIMIT_AS, limits)
print(keep_memory())
def take():
    for _ in range(20):
        found = [torch.ones(2**21) for _ in range(4)]
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_memory_that_was_freed_is_used_again_without_the_system():
    """Pages asked of the system once all sizes have been used: hardly any. Where addresses are
    limited, memory is left alone."""
    said = subprocess.check_output([sys.executable, "-c", REPEAT], text=True)
    is_kept_if_limited, is_kept, faults = said.split()
    assert (is_kept_if_limited, is_kept) == ("False", "True")
    assert int(faults) < 100


@pytest.mark.parametrize(("has", "asked", "left"), [(8, None, 7), (1, None, 1), (3, "3", 3)])
def test_a_server_leaves_a_core_unless_told_otherwise(monkeypatch, has, asked, left):
    threads = [has]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    leave_a_core()
    assert threads[-1] == left
