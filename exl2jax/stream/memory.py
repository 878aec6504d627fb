"""Memory that was freed, back to the operating system."""

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system where the C library can, as glibc does; elsewhere do nothing.

    Compilations and small arrays come and go in several threads, and by itself glibc keeps what they leave.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
