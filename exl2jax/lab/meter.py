"""What a stage costs: seconds, CPU seconds of the process and its threads, and peak memory."""

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
    """Meter what happens inside."""
    cost = Cost()
    resettable = _reset_peak()
    begun, cpu = time.monotonic(), time.process_time()
    try:
        yield cost
    finally:
        cost.seconds = round(time.monotonic() - begun, 3)
        cost.cpu_seconds = round(time.process_time() - cpu, 3)
        cost.peak_memory = _peak() if resettable else psutil.Process().memory_info().rss


def _reset_peak() -> bool:
    """Linux keeps the highest resident size and takes it back on request; elsewhere the size at the end must do."""
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
