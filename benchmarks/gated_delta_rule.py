"""Time the gated delta rule: backends against each other and against the machine's products.

All gates are per channel, everything is float32. The calls of a case take turns, one round after
the other in one process, so that a machine that slows down slows all of them. Beside the minimum
and the median stands the share of the machine: useful FLOPs of a forward pass per second, over
those of torch.mm at 1024^3. Each call adds a row to the CSV file.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gdn2.ops import gated_delta_rule
from gdn2.train.record import commit

BACKENDS = ("chunked", "reference")
RESULTS = Path(__file__).with_name("results.csv")
CHUNK = 64
EXAMPLES = """examples:
  python -m benchmarks.gated_delta_rule
  python -m benchmarks.gated_delta_rule --rounds 20 --threads 1
  python -m benchmarks.gated_delta_rule --device cuda --csv /tmp/results.csv
"""


class Case(NamedTuple):
    """Sizes of a call, and whether its gradients are timed too."""

    B: int
    T: int
    H: int
    K: int
    V: int
    backward: bool

    @property
    def name(self) -> str:
        return f"B={self.B} T={self.T} H={self.H} K={self.K} V={self.V}"

    @property
    def flops(self) -> int:
        """Useful products of a forward pass in chunks of 64."""
        return self.B * self.T * self.H * (10 * CHUNK * self.K + 6 * self.K * self.V)


CASES = (Case(1, 2048, 4, 128, 128, backward=True), Case(2, 4096, 8, 128, 128, backward=False))


class Timing(NamedTuple):
    case: Case
    backend: str
    direction: str
    min_ms: float
    median_ms: float
    share_of_mm: float | None  # of the minimum; None where gradients are in it


def measure(
    cases: Sequence[Case], *, rounds: int, device: torch.device, mm_size: int = 1024
) -> list[Timing]:
    """Time every backend on every case; a shorter ``mm_size`` is for tests."""
    matrix = torch.randn(mm_size, mm_size, device=device)
    timings = []
    for case in cases:
        directions = ("forward", "forward+backward") if case.backward else ("forward",)
        wanted = [(backend, direction) for direction in directions for backend in BACKENDS]
        calls = [_call(case, *each, device) for each in wanted]
        of_mm, *of_calls = _interleaved([lambda: matrix @ matrix, *calls], rounds, device)
        rate = 2 * mm_size**3 / min(of_mm)
        for (backend, direction), seconds in zip(wanted, of_calls, strict=True):
            share = case.flops / min(seconds) / rate if direction == "forward" else None
            low, middle = 1000 * min(seconds), 1000 * statistics.median(seconds)
            timings.append(Timing(case, backend, direction, low, middle, share))
    return timings


def _call(case: Case, backend: str, direction: str, device: torch.device) -> Callable[[], object]:
    """What is timed; its operands are made before."""
    B, T, H, K, V, _ = case
    generator = torch.Generator(device).manual_seed(0)

    def randn(channels: int) -> Tensor:
        return torch.randn(B, T, H, channels, generator=generator, device=device)

    q, k, v = randn(K), F.normalize(randn(K), dim=-1), randn(V)
    log_decay, erase, write = F.logsigmoid(randn(K) + 3), randn(K).sigmoid(), randn(V).sigmoid()
    operands, weight = (q, k, v, log_decay, erase, write), randn(V)

    def forward() -> Tensor:
        return gated_delta_rule(
            q, k, v, log_decay=log_decay, erase=erase, write=write, scale=K**-0.5, backend=backend
        )[0]

    if direction == "forward":
        return torch.no_grad()(forward)
    for operand in operands:
        operand.requires_grad_()
    return lambda: torch.autograd.grad(forward(), operands, weight)


def _interleaved(
    calls: Sequence[Callable[[], object]], rounds: int, device: torch.device
) -> list[list[float]]:
    """Seconds of each call in each round, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, times in zip(calls, seconds, strict=True):
            wait(device)
            started = time.perf_counter()
            call()
            wait(device)
            if number:
                times.append(time.perf_counter() - started)
    return seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def show(timings: Sequence[Timing]) -> None:
    """A table for each case; the ratio is that of a median to the first backend's."""
    for case, of_case in groupby(timings, key=lambda timing: timing.case):
        table = Table("direction", "backend", title=case.name, title_justify="left")
        for heading in ("min ms", "median ms", "ratio", "share of mm"):
            table.add_column(heading, justify="right")
        first: dict[str, float] = {}
        for t in of_case:
            ratio = t.median_ms / first.setdefault(t.direction, t.median_ms)
            share = "" if t.share_of_mm is None else f"{t.share_of_mm:.1%}"
            times = (f"{t.min_ms:.2f}", f"{t.median_ms:.2f}")
            table.add_row(t.direction, t.backend, *times, f"{ratio:.2f}", share)
        Console().print(table)


def append(
    timings: Sequence[Timing], path: Path, device: torch.device, script: str = Path(__file__).name
) -> None:
    machine = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "script": script,
    }
    rows = [machine | _row(t) for t in timings]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*machine, *Timing._fields], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _row(t: Timing) -> dict[str, object]:
    share = None if t.share_of_mm is None else round(t.share_of_mm, 4)
    times = {"min_ms": round(t.min_ms, 3), "median_ms": round(t.median_ms, 3)}
    return t._asdict() | {"case": t.case.name, "share_of_mm": share, **times}


def main(argv: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gated_delta_rule",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's")
    parser.add_argument("--csv", type=Path, default=RESULTS, help=f"default: {RESULTS.name} here")
    args = parser.parse_args(argv)
    for name in ("rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    timings = measure(cases, rounds=args.rounds, device=device)
    show(timings)
    append(timings, args.csv, device)
    print(f"added {len(timings)} rows to {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
