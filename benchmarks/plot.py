"""Draw docs/cpu_speed.png from results.csv: the operator beside other code, and over length.

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

PICTURE = Path(__file__).parents[1] / "docs" / "cpu_speed.png"
DIRECTIONS = ("forward", "forward+backward")
OURS = "chunked"
Times = Mapping[tuple[str, str, str], float]  # least ms by case, backend, direction


def read(path: Path, device: str | None) -> tuple[Times, str]:
    """The operator's rows of one device, and the device: that of the file's last row, if None."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["script"] == "gated_delta_rule.py"]
    device = device or rows[-1]["device"]
    rows = [row for row in rows if row["device"] == device]
    key = "case", "backend", "direction"
    return {tuple(row[name] for name in key): float(row["min_ms"]) for row in rows}, device


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    add_csv(parser)
    parser.add_argument("--device", help="default: that of the last row")
    parser.add_argument("--png", type=Path, default=PICTURE, help="default: docs/cpu_speed.png")
    args = parser.parse_args(argv)
    times, device = read(args.csv, args.device)
    draw(times, args.png, device)
    print(f"wrote {args.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
