"""Tiles and warps of the kernels, from one table.

The order of every sum depends on them, so they depend on channels, dtype and device, and never on
how many tokens, heads or sequences there are. Chosen by what compiles without spilling registers
(`make compile-check`); none of it has been timed on a GPU yet.
"""

from functools import cache
from typing import NamedTuple

import torch

INTERPRETER = 0  # compute capability of the CPU


class Sizes(NamedTuple):
    """C tokens a chunk; BK key channels at a time to prepare; BV value channels of one scan.

    Segments of L tokens, a multiple of C, are scanned at the same time.
    """

    C: int
    L: int
    BK: int
    prepare_warps: int
    BV: int
    scan_warps: int
    scan_stages: int
    merge_warps: int


TABLE = {  # (least compute capability * 10, bytes of an operand, most key channels)
    (90, 2, 64): Sizes(64, 8192, 32, 8, 64, 4, 2, 8),
    (90, 2, 128): Sizes(64, 8192, 32, 8, 64, 8, 2, 8),
    (90, 2, 256): Sizes(32, 8192, 32, 4, 16, 4, 1, 8),
    (90, 4, 64): Sizes(32, 8192, 16, 4, 16, 4, 1, 8),
    (90, 4, 256): Sizes(16, 8192, 16, 4, 32, 8, 1, 8),
    (80, 2, 128): Sizes(32, 8192, 32, 4, 32, 4, 2, 8),
    (80, 2, 256): Sizes(32, 8192, 32, 4, 16, 4, 1, 8),
    (80, 4, 64): Sizes(32, 8192, 16, 4, 16, 4, 1, 8),
    (80, 4, 256): Sizes(16, 8192, 16, 4, 16, 4, 1, 8),
    (INTERPRETER, 2, 256): Sizes(16, 64, 16, 4, 32, 4, 1, 4),
    (INTERPRETER, 4, 256): Sizes(16, 64, 16, 4, 32, 4, 1, 4),
}


def sizes_of(K: int, dtype: torch.dtype, capability: int) -> Sizes:
    """The row for the newest device that is no newer than this one, and the fewest channels."""
    fitting = [
        (-least, most, sizes)
        for (least, width, most), sizes in TABLE.items()
        if least <= capability and width == dtype.itemsize and most >= K
    ]
    return min(fitting)[2]


@cache
def capability(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
