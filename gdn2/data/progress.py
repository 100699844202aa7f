"""Progress on stderr: a bar with ETA on a terminal, otherwise a line now and then."""

import os
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SECONDS_BETWEEN_LINES = 20.0


class Terminal(Console):
    """A console that may lose its reader: a Ctrl-C ends `| tee` before what it reads from."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What is still buffered must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def say(text: str) -> None:
    """One line on stderr, never wrapped or coloured."""
    Terminal(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


class ProgressBar:
    """How many of `total` bytes of input are done; `note` tells what has come out of them."""

    def __init__(self, total: int, start: int = 0):
        self._total = max(1, total)
        self._console = Terminal(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("reading", total=self._total, completed=start)
        self._last_line = time.monotonic()

    def update(self, done: int, note: str) -> None:
        self._bar.update(self._task, completed=done, description=note)
        if self._bar.disable and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(f"{done / self._total:4.0%}  {note}")

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
