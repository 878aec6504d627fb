"""The clock of a whole job: how long all of its stages will take, corrected as they finish."""

import time
from collections.abc import Callable, Mapping

from exl2jax.stream.progress import Progress


class JobClock:
    """Another progress, with the time left of the whole job after each message.

    `work` gives the work of each stage by name, in any unit; it is asked when the first stage starts. The work done so
    far and the time that it took give the speed of the rest, the stage that runs before all others: a stage that goes
    slower than the estimate slows the forecast.
    """

    def __init__(
        self, inner: Progress, work: Callable[[], Mapping[str, float]], now: Callable[[], float] = time.monotonic
    ) -> None:
        """Expect the stages of `work`."""
        self._inner, self._work, self._now = inner, work, now
        self._left: dict[str, float] = {}
        self._asked = False
        self._spent, self._done = 0.0, 0.0
        self._stage, self._total, self._begun, self._resumed, self._steps = "", 1, 0.0, 0, 0

    def start(self, stage: str, total: int, done: int) -> None:
        """Begin a stage; stages that come before it in `work` are over, by an earlier run."""
        if not self._asked:
            self._left, self._asked = dict(self._work()), True
        for name in list(self._left):
            if stage not in self._left or name == stage:
                break
            del self._left[name]
        self._stage, self._total, self._resumed, self._steps = stage, max(total, 1), done, done
        self._begun = self._now()
        self._inner.start(stage, total, done)

    def step(self, message: str) -> None:
        """Report a step, with the time left of the job where the stage is one of it."""
        self._steps += 1
        left = self.left()
        self._inner.step(message if left is None else f"{message} [{clock(left)} left of all]")

    def finish(self) -> None:
        """End a stage and learn from it."""
        work = self._left.pop(self._stage, None)
        if work is not None:
            self._done += work * (1 - self._resumed / self._total)
            self._spent += self._now() - self._begun
        self._inner.finish()

    def left(self) -> float | None:
        """Seconds left of the whole job, None before anything is known of its speed."""
        work = self._left.get(self._stage)
        if work is None:
            return None
        here = work * (self._steps - self._resumed) / self._total
        done, spent = self._done + here, self._spent + self._now() - self._begun
        if done <= 0:
            return None
        rest = sum(self._left.values()) - work * self._steps / self._total
        return rest * spent / done


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
