"""Draw the operator's rows of results.csv: docs/cpu_speed.png and docs/gpu_speed.png.

Of rows that differ only in when they were measured, the last counts.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gated_delta_rule import SUITES, Case
from benchmarks.timing import add_csv

DOCS = Path(__file__).parents[1] / "docs"
DIRECTIONS = ("forward", "forward+backward")
OURS = "chunked"
Key = tuple[str, str, str]  # case, backend, direction
Times = Mapping[Key, float]  # least ms


def read(
    path: Path, script: str, device: str | None = None, column: str = "min_ms"
) -> tuple[Times, str]:
    """A column of a script's rows of one device, and the device: the last to run it, if None."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["script"] == script]
    device = device or (rows[-1]["device"] if rows else "")
    rows = [row for row in rows if row["device"] == device and row[column]]
    key = "case", "backend", "direction"
    return {tuple(row[name] for name in key): float(row[column]) for row in rows}, device


def draw(times: Times, path: Path, title: str) -> None:
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    figure.suptitle(title)
    peers, length = figure.subplots(1, 2, width_ratios=(2, 1))
    _draw_peers(peers, times, [case for case in SUITES["speed"] if case.member])
    _draw_length(length, times, SUITES["length"])
    figure.savefig(path, dpi=120)


def _draw_peers(axes: Axes, times: Times, cases: Sequence[Case]) -> None:
    """How many times as long as ours the others take."""
    bars = [key for key in times if key[0] in {case.name for case in cases} and key[1] != OURS]
    labels = list(dict.fromkeys((case, backend) for case, backend, _ in bars))
    for shift, direction in enumerate(DIRECTIONS):
        at = [(i, *label, direction) for i, label in enumerate(labels)]
        at = [(i, *key) for i, *key in at if tuple(key) in times]
        ratios = [times[case, name, way] / times[case, OURS, way] for _, case, name, way in at]
        drawn = axes.barh([i + 0.4 * shift for i, *_ in at], ratios, 0.38, label=direction)
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8)
    names = [f"{case.partition(':')[0]}: {backend}" for case, backend in labels]
    axes.set_yticks([i + 0.2 for i in range(len(labels))], names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel=f"time, in times that of backend={OURS!r} ({cases[0].sizes})")
    axes.margins(x=0.12)
    axes.legend(loc="lower right")


def _draw_length(axes: Axes, times: Times, cases: Sequence[Case]) -> None:
    for direction in DIRECTIONS:
        points = [
            (case.T, 1000 * times[case.name, OURS, direction] / (case.B * case.T))
            for case in cases
            if (case.name, OURS, direction) in times
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=direction)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="T, of one sequence with 4 heads", ylabel="us per token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


def draw_gpu(times: Times, shares: Times, path: Path, title: str) -> None:
    members = list(dict.fromkeys(c.partition(":")[0] for c, _, way in times if way == "forward"))
    figure = Figure(figsize=(5 * len(members) + 4, 5), layout="constrained")
    figure.suptitle(title)
    *sequences, steps = figure.subplots(1, len(members) + 1, squeeze=False)[0]
    for axes, member in zip(sequences, members, strict=True):
        keys = [key for key in times if key[0].startswith(f"{member}: ") and key[2] == "forward"]
        _draw_sequences(axes, times, shares, keys)
        axes.set(title=member, xlabel="forward, ms; beside it: share of a copy of its bytes")
    for backend in dict.fromkeys(name for _, name, direction in times if direction == "step"):
        of_backend = [key for key in shares if key[1:] == (backend, "step")]
        batches = [int(case.partition("B=")[2].split()[0]) for case, *_ in of_backend]
        steps.plot(batches, [shares[key] for key in of_backend], marker="o", label=backend)
        steps.legend()
    steps.set_xscale("log", base=2)
    steps.set(xlabel="batch, decoding", ylabel="share of a copy of the states", ylim=(0, 1))
    steps.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _draw_sequences(axes: Axes, times: Times, shares: Times, keys: Sequence[Key]) -> None:
    cases = list(dict.fromkeys(case for case, *_ in keys))
    backends = list(dict.fromkeys(name for _, name, _ in keys))
    for shift, backend in enumerate(backends):
        mine = [key for key in keys if key[1] == backend]
        at = [cases.index(case) + 0.4 * shift for case, *_ in mine]
        drawn = axes.barh(at, [times[key] for key in mine], 0.38, label=backend)
        axes.bar_label(drawn, [f"{shares[key]:.0%}" for key in mine], padding=2, fontsize=7)
    axes.set_yticks([i + 0.2 for i in range(len(cases))], [c.partition(": ")[2] for c in cases])
    axes.tick_params("y", labelsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.legend(fontsize=7)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    add_csv(parser)
    parser.add_argument("--device", metavar="NAME", help="default: that of a script's last row")
    parser.add_argument("--to", type=Path, default=DOCS, metavar="FOLDER", help="default: docs")
    args = parser.parse_args(argv)
    times, device = read(args.csv, "gated_delta_rule.py", args.device)
    if times:
        draw(times, args.to / "cpu_speed.png", device)
        print(f"wrote {args.to / 'cpu_speed.png'}")
    on_gpu, device = read(args.csv, "gpu.py", args.device, "median_ms")
    if on_gpu:
        shares, _ = read(args.csv, "gpu.py", args.device, "share_of_copy")
        draw_gpu(on_gpu, shares, args.to / "gpu_speed.png", device)
        print(f"wrote {args.to / 'gpu_speed.png'}")
    if not times and not on_gpu:
        parser.error(f"{args.csv} has no rows to draw")
    return 0


if __name__ == "__main__":
    sys.exit(main())
