"""The cost of a stage: seconds, CPU seconds of the process and its threads, and peak memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_PROCESS = Path("/proc/self")


@dataclass(kw_only=True, slots=True)
class Cost:
    """Filled in when the metered stage ends; `peak_memory` in bytes is None where the system does not tell."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory: int | None = None


@contextmanager
def metered() -> Iterator[Cost]:
    """Meter the block of the `with` statement."""
    cost = Cost()
    resettable = _reset_peak()
    start, cpu = time.monotonic(), time.process_time()
    try:
        yield cost
    finally:
        cost.seconds = round(time.monotonic() - start, 3)
        cost.cpu_seconds = round(time.process_time() - cpu, 3)
        cost.peak_memory = _peak() if resettable else psutil.Process().memory_info().rss


def _reset_peak() -> bool:
    """Reset the highest resident size that Linux keeps; False elsewhere, where the size at the end serves."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int | None:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
