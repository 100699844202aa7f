"""Where a run executes: the device, and the precision of its arithmetic there."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2.data import Batch
from gdn2.models.device import naming_full_memory, prepare_device

__all__ = ["autocast", "naming_full_memory", "prepare_device", "to_device"]


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
