"""The memory of a process that trains."""

import ctypes
import sys

MIB = 2**20
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # of malloc.h


def keep_memory() -> None:
    """Let this process keep the memory it frees, where the C library is glibc.

    Otherwise a step's tensors, some megabytes each, are given back and asked for again: 900 to 1,900 page faults and
    2 to 5 ms in each step of 10 ms, in one process and not in the next, as the heap happens to lie.
    """
    # Each thread that comes would be given memory of its own, and keep it: 2 GB after 600 checkpoints.
    settings = {M_MMAP_THRESHOLD: 32 * MIB, M_TRIM_THRESHOLD: 1024 * MIB, M_TOP_PAD: 64 * MIB, M_ARENA_MAX: 1}
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for option, value in settings.items():
            library.mallopt(option, value)
