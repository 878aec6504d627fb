"""Progress on stderr: a live bar with the time left on a terminal, plain lines elsewhere."""

import json
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from exl2jax.report.clock import clock
from exl2jax.stream.progress import Progress as ProgressReceiver

QUANTIZING = ("trace", "outputs", "quantize", "tune")
"""Stages that stock's status lines count as quantizing; what comes before them measures."""


class BarProgress:
    """A live bar per stage, with the time left."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def start(self, stage: str, total: int, done: int) -> None:
        """Open the bar of a stage."""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.start()
        self._task = self._bar.add_task(stage, total=total, completed=done)

    def step(self, message: str) -> None:
        """Print what came out above the bar and move it."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False, markup=False)
            self._bar.advance(self._task)

    def finish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class LineProgress:
    """A plain line per step with the time left, for logs."""

    def __init__(self, console: Console) -> None:
        """Write to `console`."""
        self._console = console
        self._stage, self._total, self._done, self._first, self._begun = "", 0, 0, 0, 0.0

    def start(self, stage: str, total: int, done: int) -> None:
        """Begin a stage."""
        self._stage, self._total, self._done, self._first = stage, total, done, done
        self._begun = time.monotonic()
        self._say(f"{stage}: {total} steps" + (f", resuming after {done}" if done else ""))

    def step(self, message: str) -> None:
        """Report a step."""
        self._done += 1
        each = (time.monotonic() - self._begun) / (self._done - self._first)
        left = each * (self._total - self._done)
        self._say(f"{self._stage} {self._done}/{self._total}, {clock(left)} left: {message}")

    def finish(self) -> None:
        """End a stage."""
        self._say(f"{self._stage}: done in {clock(time.monotonic() - self._begun)}")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class StatusProgress:
    """Adds the stock converter's machine-readable status lines to another progress."""

    def __init__(self, inner: ProgressReceiver, console: Console) -> None:
        """Pass everything on to `inner`, status lines to `console`."""
        self._inner, self._console = inner, console
        self._stage, self._total, self._done = "", 1, 0

    def start(self, stage: str, total: int, done: int) -> None:
        """Begin a stage."""
        self._stage, self._total, self._done = stage, total, done
        self._inner.start(stage, total, done)
        self._status()

    def step(self, message: str) -> None:
        """Report a step."""
        self._done += 1
        self._inner.step(message)
        self._status()

    def finish(self) -> None:
        """End a stage."""
        self._inner.finish()

    def _status(self) -> None:
        stage = "Quantizing" if self._stage.endswith(QUANTIZING) else "Measuring"
        record = {"stage": stage, "completion": round(self._done / self._total, 4)}
        self._console.print(f"[STATUS]{json.dumps(record)}[/STATUS]", highlight=False, markup=False, soft_wrap=True)


def make_progress(console: Console, *, status: bool) -> ProgressReceiver:
    """A bar where `console` is a terminal, lines elsewhere; with `status`, stock's status lines too."""
    progress = BarProgress(console) if console.is_terminal else LineProgress(console)
    return StatusProgress(progress, console) if status else progress
