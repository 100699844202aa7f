import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource
from gdn2.train.parallel import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
libc.free.argtypes = (ctypes.c_void_p,)
blocks = [None] * 6
def use():
    for i in range(6):
        blocks[i] = libc.malloc(10_000_000)
        libc.memset(blocks[i], 1, 10_000_000)
    for i in range(6):
        libc.free(blocks[i])
for _ in range(3): use()  # until blocks lie where the next ones fit
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_not_paid_for_twice():
    """Without it, every page of the 60 MB faults again: 15,000 times a round."""
    printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True)
    assert int(printed.stdout) < 5000
