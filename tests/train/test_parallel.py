import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from gdn2.train.parallel import keep_freed_memory
keep_freed_memory()
def use(): [torch.ones(10 * 2**18) for _ in range(6)]  # 10 MB each, freed together
for _ in range(5): use()  # until blocks lie where the next ones fit
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_not_paid_for_twice():
    """Without it, every page of the 60 MB faults again: 15,000 times a round."""
    printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True)
    assert int(printed.stdout) < 5000
