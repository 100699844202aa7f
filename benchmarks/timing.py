"""What the scripts share: timing by turns, rows of results.csv, tables, and the command line."""

import argparse
import csv
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """A row: `case` has a name; shares are of the minimum, None where they are not known.

    Attributes:
        share_of_mm: useful FLOPs per second, over those of torch.mm.
        share_of_copy: bytes that must move at least per second, over those of a copy.
        peak_mb: memory that the call needs beyond its operands and results.
    """

    case: Any
    backend: str
    direction: str
    min_ms: float
    median_ms: float
    share_of_mm: float | None = None
    share_of_copy: float | None = None
    peak_mb: float | None = None

    @classmethod
    def of(cls, case: Any, backend: str, direction: str, seconds: Sequence[float]) -> "Timing":
        low, middle = min(seconds), statistics.median(seconds)
        return cls(case, backend, direction, 1000 * low, 1000 * middle)


def runs(name: str, call: Callable[[], object]) -> bool:
    """Whether a peer's first call gets through; what it says if not is printed."""
    try:
        call()
    except (RuntimeError, NotImplementedError) as error:
        if "CUDA error" in str(error):  # nothing runs any more
            raise
        print(f"  {name} does not run: {str(error).strip().partition(chr(10))[0]}", flush=True)
        return False
    return True


def interleaved(
    calls: Sequence[Callable[[], object]], rounds: int, device: torch.device
) -> list[list[float]]:
    """Seconds of each call in each round, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    timed = _seconds_on_a_gpu if device.type == "cuda" else _seconds
    for number in range(rounds + 1):
        for call, times in zip(calls, seconds, strict=True):
            taken = timed(call)
            if number:
                times.append(taken)
    return seconds


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _seconds_on_a_gpu(call: Callable[[], object]) -> float:
    """Between two events, after a write that leaves nothing else in the cache.

    Then the GPU waits about ten milliseconds, in which the host can launch what is timed.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(2**28, dtype=torch.int8, device="cuda").zero_()
    torch.cuda._sleep(20_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


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
        "triton": _triton_version() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "script": script,
    }
    columns = [*machine, *Timing._fields]
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            if next(csv.reader(file), None) != columns:
                raise SystemExit(f"{path} has other columns than {','.join(columns)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(machine | _row(t) for t in timings)
    print(f"added {len(timings)} rows to {path}", flush=True)


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _row(t: Timing) -> dict[str, object]:
    digits = {"min_ms": 3, "median_ms": 3, "share_of_mm": 4, "share_of_copy": 4, "peak_mb": 1}
    numbers = {n: None if (x := getattr(t, n)) is None else round(x, d) for n, d in digits.items()}
    return t._asdict() | {"case": t.case.name, **numbers}


def show_table(table: Table) -> None:
    Console(width=None if Console().is_terminal else WIDE).print(table)


def show_timings(
    rows: Sequence[Timing], title: str, more: Mapping[str, Callable[[Timing], str]]
) -> None:
    """With `more` columns by heading. Ratios are of medians, to the direction's first row."""
    first: dict[str, Timing] = {}
    table = Table("direction", "backend", title=title, title_justify="left")
    for heading in ("min ms", "median ms", "ratio", "peak MB", *more):
        table.add_column(heading, justify="right")
    for t in rows:
        ratio = t.median_ms / first.setdefault(t.direction, t).median_ms
        numbers = f"{t.min_ms:.3f}", f"{t.median_ms:.3f}", f"{ratio:.2f}"
        peak = "" if t.peak_mb is None else f"{t.peak_mb:.0f}"
        table.add_row(t.direction, t.backend, *numbers, peak, *(text(t) for text in more.values()))
    show_table(table)


def command_line(
    name: str, doc: str | None, examples: str, suites: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """A parser for ``python -m benchmarks.name``, with --threads and the choice of suites."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: torch's"
    )
    known = list(suites)
    names = ", ".join(known)

    def suite(name: str) -> str:
        if name in known:
            return name
        raise argparse.ArgumentTypeError(f"there is no suite {name!r}, only {names}")

    if known:
        text = f"{names}; default: all"
        parser.add_argument(
            "suites", nargs="*", type=suite, default=known, metavar="SUITE", help=text
        )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Every number must be at least 1, and the device be there; sets the number of threads."""
    args = parser.parse_args(argv)
    if getattr(args, "device", None) == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    for name, value in vars(args).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and number < 1:
                parser.error(f"--{name} must be at least 1, got {number}")
    torch.set_num_threads(args.threads)
    return args


def add_csv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, default=RESULTS, help=f"default: {RESULTS.name} here")
