"""What a run tells while it goes: metrics.jsonl, loss.png, and lines or a live bar."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gdn2.data.progress import Terminal


class Metrics:
    """One JSON line per step, exactly once, however often the run was interrupted."""

    def __init__(self, out: Path, *, total: int, done: int, print_every: int) -> None:
        self.path, self.plot_path = out / "metrics.jsonl", out / "loss.png"
        self.total, self.done, self.print_every = total, done, print_every
        self.started = time.monotonic()
        truncate(self.path, done)
        self.file = self.path.open("a")
        self.console = Terminal(highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total, completed=done)

    def __enter__(self) -> Metrics:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()
        self.file.close()

    def log(self, row: Mapping[str, Any]) -> None:
        """Record one step: step, tokens, loss, grad_norm, lr, tokens_per_second,
        and what else there is to tell: gates, val_loss."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def show(self, row: Mapping[str, Any]) -> None:
        """Move the bar; print the line of a step that is due."""
        step = row["step"]
        text = (
            f"loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}  "
            f"lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tokens/s"
        )
        self.progress.update(self.task, completed=step, description=text)
        due = step % self.print_every == 0 or step in (1, self.total)
        if not self.console.is_terminal and (due or "val_loss" in row):
            self.say(f"step {step}/{self.total}  {text}  ETA {self._remaining(step)}")
        if "val_loss" in row:
            self.say(f"step {step}/{self.total}  validation loss {row['val_loss']:.4f}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def sync(self) -> None:
        """Before a checkpoint is written: the lines of its steps are on the disk."""
        os.fsync(self.file.fileno())

    def plot(self) -> None:
        """Draw what there is; a picture that can not be drawn does not stop a run."""
        try:
            plot_loss(self.path, self.plot_path)
        except Exception as error:  # noqa: BLE001 - a drawing library may raise any
            self.say(f"warning: {self.plot_path} is not drawn: {error}")

    def _remaining(self, step: int) -> timedelta:
        pace = (time.monotonic() - self.started) / (step - self.done)
        return timedelta(seconds=round(pace * (self.total - step)))


def truncate(path: Path, step: int) -> None:
    """Cut ``path`` after the line of ``step``, and before the first line that is not whole."""
    end = 0
    if path.exists():
        with path.open("rb+") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") or _step(path, number, line) > step:
                    break
                end += len(line)
            file.truncate(end)


def _step(path: Path, number: int, line: bytes) -> int:
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        return int(json.loads(line)["step"])
    raise RuntimeError(f"{path}:{number} is damaged: put it right, or delete what follows")


def plot_loss(metrics: Path, target: Path) -> None:
    """Draw training loss, its trailing mean and validation loss over tokens into a PNG."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not rows:
        return
    tokens, losses = [row["tokens"] for row in rows], [row["loss"] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training, a step")
    axes.plot(tokens, _trailing_mean(losses), color="tab:blue", label="training, mean")
    validated = [row for row in rows if "val_loss" in row]
    if validated:
        axes.plot(
            [row["tokens"] for row in validated],
            [row["val_loss"] for row in validated],
            color="tab:orange",
            marker="o",
            markersize=3,
            label="validation",
        )
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    unfinished = target.with_name(target.name + ".tmp")
    figure.savefig(unfinished, format="png", dpi=120)
    unfinished.replace(target)


def _trailing_mean(values: list[float]) -> list[float]:
    """The mean of the last fiftieth of the run, up to each value."""
    window = max(1, len(values) // 50)
    sums = [0.0, *accumulate(values)]
    return [
        (sums[end] - sums[max(0, end - window)]) / min(window, end)
        for end in range(1, len(values) + 1)
    ]
