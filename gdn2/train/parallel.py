"""Where a run executes: the device, and the precision of its arithmetic there."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2.data import Batch


def prepare_device(name: str) -> torch.device:
    """The device called ``name``; raises where this machine does not have it."""
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device")
    # Products that autocast leaves in fp32 (gates, states, norms) are fp32: no TF32.
    torch.set_float32_matmul_precision("highest")
    return device


def autocast(device: torch.device) -> torch.autocast:
    """bf16 products over fp32 weights on a GPU; plain fp32 on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``, copied without waiting for the device."""
    if device.type == "cpu":
        return batch

    def send(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    packed = None if batch.cu_seqlens is None else send(batch.cu_seqlens)
    return Batch(send(batch.tokens), send(batch.labels), packed)
