"""Memory that was freed goes back to the system, so that the peak of a conversion is what it holds at a time."""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from exl2jax.stream import memory
from exl2jax.stream.memory import give_back

MEGABYTES = 200
PIECE = 64 * 1024
"""Bytes of an array that glibc takes from its heap, not from a mapping of its own."""


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what was freed, and gives it back")
def test_what_other_threads_freed_goes_back() -> None:
    def fill() -> list[np.ndarray]:
        return [np.ones(PIECE, np.uint8) for _ in range(MEGABYTES * 2**20 // PIECE)]

    give_back()
    with ThreadPoolExecutor(max_workers=1) as pool:
        before = resident()
        pieces = pool.submit(fill).result()
        full = resident()
        kept = pieces[-1]  # at the end of the heap, which can therefore not shrink
        del pieces
        give_back()
        after = resident()
    assert kept.all()
    assert full - before > 0.9 * MEGABYTES * 2**20
    assert after - before < 0.1 * MEGABYTES * 2**20


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("no library is asked"))
    give_back()
