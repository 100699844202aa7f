"""Train every system of the comparison under one recipe, with several seeds, and compare them.

    python -m recipes.systems --data DIR                       the demo's sizes: 2 hours on 2 cores
    python -m recipes.systems --data DIR --size 20m --device cuda
    python -m recipes.systems --data DIR --seeds 3 --only gdn2 kda transformer

DIR is what `gdn2 prepare` wrote. Every run is `gdn2 train` and `gdn2 eval`, and goes on where it
was interrupted; after each of them systems.csv and systems.png in OUT show all runs that are done.
Seeds are the outer loop: all systems are compared after one round.
"""

import argparse
import csv
import io
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from gdn2 import cli
from gdn2.data.durable import write_file
from gdn2.models.accounting import account
from gdn2.presets import PRESETS, SYSTEMS, load_preset, preset_name

FIELDS = ("preset", "blocks", "seed", "bits_per_byte", "loss", "tokens_per_s")


def presets_of(size: str) -> dict[str, str]:
    """The presets of one size by system, in the order of the paper, each before its hybrid."""
    every = {
        f"{system}_hybrid" if hybrid else system: preset_name(system, size, hybrid=hybrid)
        for system in SYSTEMS
        for hybrid in (False, True)
    }
    return {system: preset for system, preset in every.items() if preset in PRESETS}


def train_and_score(preset: str, seed: int, data: Path, folder: Path, device: str) -> None:
    """What is done stays; SystemExit with the command's code if one fails."""
    where = ["--device", device]
    train = ["train", preset, "--data", data, "--out", folder, *where, f"seed={seed}"]
    for command in (train, ["eval", folder, *where]):
        if (folder / "eval.json").is_file():
            return
        words = [str(word) for word in command]
        print(f"$ gdn2 {' '.join(words)}", file=sys.stderr)
        if code := cli.main(words):
            raise SystemExit(code)


def finished(out: Path, presets: Iterable[str]) -> list[dict[str, Any]]:
    """A row for every run that was scored, by seed and then in the order of `presets`."""
    rows = []
    for preset in presets:
        blocks = account(load_preset(preset).model, length=1)["parameters"]["blocks"]
        for scores in out.glob(f"{preset}/seed_*/eval.json"):
            score = json.loads(scores.read_text())
            lines = map(json.loads, (scores.parent / "metrics.jsonl").read_text().splitlines())
            speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
            row = {
                "preset": preset,
                "blocks": blocks,
                "seed": int(scores.parent.name.removeprefix("seed_")),
                "bits_per_byte": round(score["bits_per_byte"], 5),
                "loss": round(score["loss"], 5),
                "tokens_per_s": round(statistics.median(speeds)),
            }
            rows.append(row)
    return sorted(rows, key=lambda row: row["seed"])


def by_preset(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Bits per byte of all seeds, the best mean first."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["preset"], []).append(row["bits_per_byte"])
    return dict(sorted(scores.items(), key=lambda item: statistics.mean(item[1])))


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("preset", title="bits per byte of validation text", title_justify="left")
    for heading in ("blocks", "mean", "each seed", "tokens/s"):
        table.add_column(heading, justify="right")
    for preset, scores in by_preset(rows).items():
        mine = [row for row in rows if row["preset"] == preset]
        speed = statistics.median(row["tokens_per_s"] for row in mine)
        each = " ".join(f"{score:.3f}" for score in scores)
        mean = f"{statistics.mean(scores):.3f}"
        table.add_row(preset, f"{mine[0]['blocks']:,}", mean, each, f"{speed:,.0f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def draw(rows: list[dict[str, Any]]) -> bytes:
    """A dot for each seed, a bar at the mean; the best on top."""
    scores = by_preset(rows)
    figure = Figure(figsize=(7, 1 + 0.3 * len(scores)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, values in enumerate(scores.values()):
        axes.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.6)
        axes.plot([statistics.mean(values)], [y], "|", color="black", markersize=14)
    axes.set_yticks(range(len(scores)), list(scores))
    axes.invert_yaxis()
    axes.set_xlabel("bits per byte of validation text (a dot for each seed)")
    axes.grid(axis="x", alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def write(rows: list[dict[str, Any]], out: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / "systems.csv", text.getvalue().encode())
    write_file(out / "systems.png", draw(rows))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="recipes.systems",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("runs/systems"), metavar="OUT")
    parser.add_argument("--size", default="demo", help="demo (default), 20m, 125m, 350m or 1p3b")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="gdn2, kda_hybrid, ...")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    presets = presets_of(args.size)
    if not presets:
        parser.error(f"there is no size {args.size!r}")
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    for system in args.only or ():
        if system not in presets:
            parser.error(f"--only takes {', '.join(presets)}, got {system!r}")
    for seed in range(1, args.seeds + 1):
        for system in args.only or presets:
            folder = args.out / presets[system] / f"seed_{seed}"
            train_and_score(presets[system], seed, args.data, folder, args.device)
            rows = finished(args.out, presets.values())
            write(rows, args.out)
            show(rows)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
