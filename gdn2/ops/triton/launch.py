"""Launches: what every kernel of the gated delta rule is told of a call."""

from typing import Any

import torch
from torch import Tensor

from gdn2.ops.contract import Operands
from gdn2.ops.triton.layout import rows
from gdn2.ops.triton.sizes import Sizes, capability, sizes_of


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int, stages: int = 1
) -> None:
    """Each kernel takes what it names; nothing is launched on an empty grid."""
    if 0 not in grid:
        mine = {name: arguments[name] for name in kernel.arg_names}
        tensor = next(x for x in mine.values() if isinstance(x, Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device
            kernel[grid](**mine, num_warps=warps, num_stages=stages)


def describe(x: Operands) -> dict[str, Any]:
    """Operands with strides, heads and channels; gates: 0 absent, 1 per head, 2 per channel."""
    x = x.map(rows)
    there = {name: t for name, t in x._asdict().items() if t is not None}
    gates = {"DECAY": x.log_decay, "ERASE": x.erase, "WRITE": x.write}
    return {
        **x._asdict(),
        **{f"{name}_stride": 0 for name in x._fields},
        **{f"{name}_stride": t.stride(1) for name, t in there.items()},
        "LOG_DECAY_HEADS": 1,
        "ERASE_HEADS": 1,
        **{f"{name.upper()}_HEADS": t.shape[2] for name, t in there.items()},
        **{name: 0 if gate is None else gate.ndim - 2 for name, gate in gates.items()},
        "H": x.q.shape[2],
        "HV": x.v.shape[2],
        "K": x.q.shape[3],
        "V": x.v.shape[3],
    }


def sizes_for(x: Operands) -> Sizes:
    decay = "channel" if x.log_decay is not None and x.log_decay.ndim == 4 else "head"
    return sizes_of(decay, x.q.shape[3], x.v.shape[3], x.q.dtype, capability(x.q.device))
