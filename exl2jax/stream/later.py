"""Host work off the path of a pass: done in a thread while the next module computes, in the order it came."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

type Work = Callable[[], None]
type Later = Callable[[Work], None]
"""Takes a piece of work that is to be done before long."""


def at_once(work: Work) -> None:
    """Do the work now."""
    work()


class Behind:
    """One thread that does the work of a module while the next one computes."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        """Start with nothing to wait for."""
        self._pool = pool
        self._last: Future[None] | None = None

    def __call__(self, work: Work) -> None:
        """Wait for the work before, so that no more than one piece holds memory, and begin this one."""
        self.settle()
        self._last = self._pool.submit(work)

    def settle(self) -> None:
        """Wait until everything is done; the error of the work that failed is raised here."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


@contextmanager
def working_behind() -> Iterator[Behind]:
    """A thread for the length of a pass; leaving waits for its work, also where an error is on its way out."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        behind = Behind(pool)
        yield behind
        behind.settle()
