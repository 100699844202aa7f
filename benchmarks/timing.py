"""What the scripts share: timing by turns, rows of results.csv, tables, and the command line."""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from gdn2.train.record import commit

RESULTS = Path(__file__).with_name("results.csv")
WIDE = 120  # of a table in a file or a pipe, where rich would cut numbers short to fit 80


class Timing(NamedTuple):
    """A row: `case` has a name; the share is of the minimum, None where gradients are in it."""

    case: Any
    backend: str
    direction: str
    min_ms: float
    median_ms: float
    share_of_mm: float | None = None

    @classmethod
    def of(cls, case: Any, backend: str, direction: str, seconds: Sequence[float]) -> "Timing":
        low, middle = min(seconds), statistics.median(seconds)
        return cls(case, backend, direction, 1000 * low, 1000 * middle)


def interleaved(
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


def append(timings: Sequence[Timing], path: Path, device: torch.device, script: str) -> None:
    """Add rows to the file, and say so."""
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
    print(f"added {len(rows)} rows to {path}")


def _row(t: Timing) -> dict[str, object]:
    share = None if t.share_of_mm is None else round(t.share_of_mm, 4)
    times = {"min_ms": round(t.min_ms, 3), "median_ms": round(t.median_ms, 3)}
    return t._asdict() | {"case": t.case.name, "share_of_mm": share, **times}


def show_table(table: Table) -> None:
    Console(width=None if Console().is_terminal else WIDE).print(table)


def command_line(name: str, doc: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser for ``python -m benchmarks.name``, with --threads."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: torch's"
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Every number must be at least 1; as many threads as asked for are used from here on."""
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and number < 1:
                parser.error(f"--{name} must be at least 1, got {number}")
    torch.set_num_threads(args.threads)
    return args


def add_csv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, default=RESULTS, help=f"default: {RESULTS.name} here")
