"""Tiles and warps of the kernels, from the table in sizes.csv.

The order of every sum depends on them, so they depend on the form of the decay, channels, dtype and
device, and never on how many tokens, heads or sequences there are. `make tune` measures them on a
GPU and writes the table; until then a row is what compiles without spilling registers
(`make compile-check`).
"""

import csv
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("sizes.csv")
INTERPRETER = 0  # capability of the CPU


class Key(NamedTuple):
    """What a row is for.

    Attributes:
        capability: that of the device, times ten, or of an older one.
        width: bytes of an operand.
        decay: "channel", or "head" where there is one a head or none.
        K, V: at most so many channels.
    """

    capability: int
    width: int
    decay: str
    K: int
    V: int


class Sizes(NamedTuple):
    """C tokens a chunk; segments of L tokens, a multiple of C, that are scanned at the same time.

    prepare_BK key channels at a time to prepare, merge_BK to merge; BV value channels of one scan,
    back_BV of one back, step_BV of one program that decodes; gradients_BK by gradients_BV of states
    at a time, under a decay per channel of gradients_C tokens: half of C, or C.
    """

    C: int
    L: int
    prepare_BK: int
    prepare_warps: int
    BV: int
    scan_warps: int
    scan_stages: int
    merge_BK: int
    merge_warps: int
    step_BV: int
    step_warps: int
    back_BV: int
    back_warps: int
    back_stages: int
    gradients_C: int
    gradients_BK: int
    gradients_BV: int
    gradients_warps: int


Table = dict[Key, Sizes]


def read(path: Path) -> Table:
    table = {}
    with path.open(newline="") as file:
        for row in list(csv.reader(file))[1:]:
            values: list[Any] = [int(x) if x.isdigit() else x for x in row]
            table[Key(*values[: len(Key._fields)])] = Sizes(*values[len(Key._fields) :])
    return table


def write(table: Table, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Key._fields, *Sizes._fields])
        writer.writerows([*key, *sizes] for key, sizes in sorted(table.items()))


def nearest(table: Table, want: Key) -> Key:
    """The row for the newest device that is no newer, and then for the fewest channels."""
    fitting = [
        (-key.capability, key.K, key.V, key)
        for key in table
        if key.capability <= want.capability
        and (key.width, key.decay) == (want.width, want.decay)
        and key.K >= want.K
        and key.V >= want.V
    ]
    return min(fitting)[-1]


@cache
def sizes_of(decay: str, K: int, V: int, dtype: torch.dtype, capability: int) -> Sizes:
    table = read(FILE)
    return table[nearest(table, Key(capability, dtype.itemsize, decay, K, V))]


@cache
def capability(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
