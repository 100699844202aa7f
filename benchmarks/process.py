"""Measuring in a process of its own: memory as Linux counts it."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def apart(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call it in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **options).result()


def free_bytes() -> int | None:
    return _bytes("/proc/meminfo", "MemAvailable")


def resident_bytes() -> int | None:
    return _bytes("/proc/self/status", "VmRSS")


def peak_bytes() -> int | None:
    return _bytes("/proc/self/status", "VmHWM")


def forget_peak() -> None:
    """Let the peak start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_beyond(call: Callable[[], object]) -> int:
    """What the call needs at most, beyond what is resident before it."""
    before = resident_bytes()
    if before is None:
        raise RuntimeError("this machine does not say how much memory a process has (no /proc)")
    forget_peak()  # what making the inputs took for a moment is not what is asked
    call()
    return (peak_bytes() or 0) - before


def _bytes(path: str, name: str) -> int | None:
    """None where the system does not say."""
    if not Path(path).exists():
        return None
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
