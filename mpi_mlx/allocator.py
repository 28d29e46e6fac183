"""Keep freed memory for the next array.

MLX's CPU back end takes every array from malloc and gives it back. On Linux, glibc maps larger blocks afresh
each time, and the kernel then zeroes them page by page: for arrays of a few megabytes that takes five times
as long as the arithmetic on them. Told so, glibc keeps what was freed; the process then stays at its peak.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed blocks of any size; whether it was told. Call before mlx is imported.

    The environment variable MPI_MLX_KEEP_MEMORY=0 leaves malloc as it is.
    """
    if sys.platform != "linux" or os.environ.get("MPI_MLX_KEEP_MEMORY") == "0":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
