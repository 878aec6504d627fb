"""How a run reports itself and is asked to stop; the pipeline knows nothing of terminals."""

import logging
from dataclasses import dataclass, field
from typing import Protocol

log = logging.getLogger("exl2jax")


class Progress(Protocol):
    """Receives the events of a run; implementations draw bars or print lines."""

    def start(self, stage: str, total: int, done: int) -> None:
        """A stage of `total` steps begins, `done` of them finished by an earlier run."""

    def step(self, message: str) -> None:
        """One step of the stage is finished; `message` describes its result."""

    def finish(self) -> None:
        """The stage is over."""


class LogProgress:
    """Reports through `logging`, a line per step."""

    def __init__(self) -> None:
        """Start with no stage."""
        self._stage, self._total, self._done = "", 0, 0

    def start(self, stage: str, total: int, done: int) -> None:
        """Remember the stage."""
        self._stage, self._total, self._done = stage, total, done

    def step(self, message: str) -> None:
        """Log one step."""
        self._done += 1
        log.info("%s %d/%d: %s", self._stage, self._done, self._total, message)

    def finish(self) -> None:
        """Nothing to close."""


class StopFlag:
    """A request to stop at the next module boundary, set from a signal handler or another thread."""

    def __init__(self) -> None:
        """Nobody asked yet."""
        self.asked = False

    def ask(self) -> None:
        """Ask for a stop."""
        self.asked = True


@dataclass(frozen=True, kw_only=True, slots=True)
class RunControl:
    """Progress reports of a run, and the request to stop it."""

    progress: Progress = field(default_factory=LogProgress)
    stop: StopFlag = field(default_factory=StopFlag)
